"""Print examples of an evaluation, and write anew what one looks at while a run goes on.

training.png is drawn like any record of the run: if that fails, the run fails. A page that cannot be written is a
warning, for nothing of the run depends on it.
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from plainrl.cli import say
from plainrl.config import RunConfig, TrainConfig
from plainrl.records import first_line
from plainrl.report.contents import read_run
from plainrl.report.curves import draw_training_figure
from plainrl.report.page import NAME, write_page
from plainrl.report.samples import describe_examples, read_samples, read_template
from plainrl.run_records import describe_scores


def show_evaluation(folder: Path, step: int, num_printed: int, config: RunConfig) -> list[dict[str, Any]]:
    """Print the first right and wrong responses of an evaluation, at most `num_printed` each; renew figure and page.

    Returns:
        All its responses, as in samples/, with the question in place of the whole prompt.
    """
    samples, _ = read_samples(folder / "samples" / f"eval_{step:06d}.jsonl")
    template = read_template(config.prompt)
    for text in describe_examples(samples, num_printed, template):
        tqdm.write(text, file=sys.stdout)
    draw_training_figure(folder)
    renew_page(folder, config, "running")
    rows = [{**sample, "question": template.question_in(str(sample["prompt"]))} for sample in samples]
    return [{key: value for key, value in row.items() if key != "prompt"} for row in rows]


def show_first_result(
    samples: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], num_questions: int, config: TrainConfig
) -> None:
    """Print the scores of the first questions of an evaluation, and one response. The others are still to be sampled.

    An untrained model never ends a response, so that its first evaluation takes minutes without fast matmuls.

    Args:
        samples: the responses to the first questions.
        metrics: of these.
        num_questions: of the whole evaluation.
        config: of the run.
    """
    print(f"first {metrics['num_examples']} of {num_questions} questions: {describe_scores(metrics)}", flush=True)
    for text in islice(describe_examples(samples, config.num_printed_examples, read_template(config.prompt)), 1):
        print(text, flush=True)


def renew_page(folder: Path, config: RunConfig, state: str, ending: str = "") -> None:
    """Write a run's report.html anew; say so if that fails.

    Args:
        folder: of the run.
        config: of the run.
        state: running, finished, or how it stopped.
        ending: what ended it, if it was not its last step.
    """
    try:
        write_page([read_run(folder, state, ending, config)], folder / NAME)
    except Exception as error:  # of any type, because a page must not end a run
        say(f"warning: {folder / NAME} could not be written ({first_line(error)})")
