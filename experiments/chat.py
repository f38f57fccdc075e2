"""Ask a model, or several side by side: `uv run python -m experiments.chat model=runs/NAME/final`.

    model=FOLDER                    a run, a model in Transformers format, or a hub name; empty: the embedded model
    model=BEFORE model=AFTER        several models of one architecture, in columns
    question="What is 3 + 4?"       ask this alone; without it questions are read from the terminal until Ctrl-D
    answer=7                        the right answer: responses are graded. In the terminal: question => answer
    num_samples=4                   responses to each question

Any key of config.yaml may follow, such as sampling_temperature=0. A run's model is asked as it was trained: prompt
template, stop string, limits and reward are those of its config.yaml. There is one engine. With several models the
weights of each are copied into it in turn, as in training.
"""

import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plainrl.chat_config import ChatConfig
from plainrl.checkpoint_files import policy_of_run
from plainrl.cli import Resolved, answer_questions, read_yaml, require_one_process, resolve, run_main
from plainrl.data import derive_seed
from plainrl.devices import check_devices
from plainrl.engine import engine_settings, init_vllm, load_policy_into_vllm_instance, sample_responses, sampling_params
from plainrl.grading.rewards import grade_response
from plainrl.help import FLAGS, show_text
from plainrl.policy import ON_CPU, load_policy
from plainrl.prompting import fill_prompt, load_prompt_template
from plainrl.records import Response, UserError
from plainrl.report.samples import printable
from SFT_helper import encode_prompt

if TYPE_CHECKING:
    from vllm import LLM

COMMAND = "-m experiments.chat"
YAML = Path(__file__).parent.parent / "config.yaml"
# What a run's model is asked with, if neither the command line nor a file config=FILE says otherwise.
OF_THE_RUN = (
    *("prompt", "reward", "stop_string", "sampling_temperature", "sampling_top_p", "sampling_min_tokens"),
    *("sampling_max_tokens", "max_context_tokens"),
)
# What config.json says that changes no response.
WITHOUT_EFFECT = re.compile(
    r"_name_or_path|architectures|transformers_version|.*dtype|use_cache|(pad|bos)_token_id|.*dropout|quantization_config"
)
GAP, LEAST_WIDTH = " | ", 20  # between columns, and of one, in characters


class Model(NamedTuple):
    """A model that is asked: its name, how it is asked, its weights and tokenizer."""

    name: str
    config: ChatConfig
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def main(arguments: list[str]) -> None:
    """Load the models, start the engine, answer questions."""
    require_one_process("chat")
    is_shown = FLAGS & set(arguments) == {"--show"}
    if not is_shown:
        answer_questions(COMMAND, ChatConfig, YAML, arguments)
    names = [argument.partition("=")[2] for argument in arguments if argument.startswith("model=")]
    others = [argument for argument in arguments if not argument.startswith(("model=", "--show"))]
    resolved = [resolve_for(name, others) for name in names or [""]]
    if is_shown:
        print("\n\n".join(show_text(*one) for one in resolved))
        return
    configs = [one.config for one in resolved]
    check_devices(configs[0])
    models = [load_model(name or config.model, config) for name, config in zip(names or [""], configs, strict=True)]
    require_one_architecture(models)
    llm = start_engine(models)
    for number, (question, answer) in enumerate(read_questions(configs[0])):
        ask(models, llm, number, question, answer)


def resolve_for(model: str, others: Sequence[str]) -> Resolved[ChatConfig]:
    """Return how a model is asked: as its run was trained, where the user does not say otherwise.

    A run is represented by its final/.
    """
    folder = Path(model)
    if model and (folder / "config.yaml").is_file() and (folder / "final").is_dir():
        folder = policy_of_run(folder, f"model = {model}")
    run = next((parent for parent in folder.parents if (parent / "config.yaml").is_file()), None) if model else None
    of_run: dict[Path, dict[str, Any]] = {}
    if run and (run / "environment.json").is_file():
        settings = read_yaml(run / "config.yaml")
        of_run[run / "config.yaml"] = {key: settings[key] for key in OF_THE_RUN if key in settings}
    arguments = [*others, *([f"model={folder}"] if model else [])]
    return resolve(ChatConfig, YAML, arguments, of_run=of_run)


def load_model(name: str, config: ChatConfig) -> Model:
    """Load the weights of a model into the CPU's memory, and its tokenizer."""
    return Model(name, config, *load_policy(config.model_copy(update=ON_CPU), for_training=False))


def require_one_architecture(models: Sequence[Model]) -> None:
    """Raise a UserError if the engine of the first model would compute or end another one's responses differently."""
    must_be_alike = {
        "weights": lambda m: {name: tuple(tensor.shape) for name, tensor in m.policy.state_dict().items()},
        "settings in config.json": lambda m: {
            key: value for key, value in m.policy.config.to_dict().items() if not WITHOUT_EFFECT.fullmatch(key)
        },
        "vocabulary": lambda m: m.tokenizer.get_vocab(),
    }
    for model in models[1:]:
        for what, read in must_be_alike.items():
            if read(model) != read(models[0]):
                raise UserError(
                    f"model = {model.name} has other {what} than {models[0].name}, and both share one engine: ask each "
                    "by a command of its own"
                )


def start_engine(models: Sequence[Model]) -> "LLM":
    """Start the engine that all models share, with the weights of the first."""
    config = models[0].config
    longest: dict[str, Any] = {"max_model_len": max(model.config.max_context_tokens for model in models)}
    return init_vllm(models[0].tokenizer.name_or_path, **(engine_settings(config) | longest))


def read_questions(config: ChatConfig) -> Iterator[tuple[str, str]]:
    """Yield each question with its answer, which is empty if none is given: the only one, or those of the terminal."""
    if config.question:
        yield config.question, config.answer
        return
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("type a question, or question => answer; Ctrl-D ends")
    while True:
        try:
            line = input("\n> " if is_terminal else "")
        except EOFError:
            return
        question, arrow, answer = line.rpartition("=>")
        if question.strip() or (not arrow and line.strip()):
            yield (question.strip(), answer.strip()) if arrow else (line.strip(), "")


def ask(models: Sequence[Model], llm: "LLM", number: int, question: str, answer: str) -> None:
    """Sample the responses of every model to a question, and print them: of several models in columns."""
    columns = []
    for model in models:
        config = model.config
        prompt = fill_prompt(load_prompt_template(config.prompt), question)
        ids = encode_prompt(prompt, model.tokenizer)
        if len(ids) + config.sampling_max_tokens > config.max_context_tokens:
            print(
                f"the prompt has {len(ids)} tokens, at most {config.max_context_tokens - config.sampling_max_tokens} "
                "fit: ask a shorter question, or raise max_context_tokens"
            )
            return
        if len(models) > 1:
            load_policy_into_vllm_instance(model.policy, llm)
        seeds = [derive_seed(config.seed, "chat", number, sample) for sample in range(config.num_samples)]
        responses = sample_responses(llm, [ids] * len(seeds), sampling_params(config), seeds, with_log_probs=False)
        columns.append([describe_response(response, question, prompt, answer, config) for response in responses])
    if len(models) > 1:
        print(f"\n{side_by_side([model.name for model in models], shutil.get_terminal_size().columns)}")
    for row in zip(*columns, strict=True):
        print(f"\n{side_by_side(row, shutil.get_terminal_size().columns)}", flush=True)


def describe_response(response: Response, question: str, prompt: str, answer: str, config: ChatConfig) -> str:
    """Return a response as it is shown: its text, its length, and its grade if an answer is given."""
    notes = [f"{len(response.token_ids)} tokens"]
    notes += ["cut"] if response.finish_reason == "length" else []
    if answer:
        fields = {"question": question, "prompt": prompt}
        grade = grade_response(response.text, answer, config.reward_function, fields)
        shown = "right" if grade.rewards["answer_reward"] == 1 else "wrong"
        shown += f", reward {grade.rewards['reward']:g}"
        # A function of one's own may want a column of the training data, which a typed question does not have.
        notes.insert(0, f"not graded: {grade.problem}" if grade.problem else shown)
    return f"{printable(response.text.strip())}\n[{', '.join(notes)}]"


def side_by_side(texts: Sequence[str], width: int) -> str:
    """Return texts in columns of equal width, wrapped. A single text stays as it is.

    >>> print(side_by_side(["one two three four five six", "seven"], width=45))
    one two three four    | seven
    five six              |
    """
    if len(texts) == 1:
        return texts[0]
    own = max(LEAST_WIDTH, (width - len(GAP) * (len(texts) - 1)) // len(texts))
    columns = [[piece for line in text.splitlines() for piece in textwrap.wrap(line, own) or [""]] for text in texts]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(GAP.join(piece.ljust(own) for piece in row).rstrip() for row in rows)


if __name__ == "__main__":
    run_main(main)
