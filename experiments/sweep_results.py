"""The committed figures of a sweep, results/<sweep>/: their columns, how a run comes in, how they are read.

    runs.csv      one row per run, RUN_COLUMNS. A run with a row is finished, also when its folder is gone
    metrics.csv   the METRICS of its metrics.jsonl, in the order in which they were logged, and FURTHER_COLUMNS

    minutes         of training steps and evaluations, as logged, without loading, saving and lost work
    wall_minutes    of the run's processes, with a warm start that was made first
    last_*, best_*  over the evaluations on the validation subset
    final_*         on the whole validation set, at the end
    sampled_tokens  in training

A cell is empty where the run logged no such value. Numbers have 5 significant digits.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plainrl.cli import read_yaml
from plainrl.clock import OF_RUN
from plainrl.folder_lock import take_lock
from plainrl.records import UserError
from plainrl.run_records import EVAL_SCORE, read_metrics

FINAL_SCORE = "eval_all/answer_reward"
METRICS = (
    *("train/loss_per_token", "train/loss", "train/token_entropy", "train/grad_norm"),
    *("rollout/reward", "rollout/response_length", "rollout/num_sampled_tokens", "rollout/zero_advantage_fraction"),
    *("rollout/log_prob_gap_multiplicative", "time/sync", "time/rollout", "time/train", "time/step"),
    *(EVAL_SCORE, "eval/format_reward", "eval/response_length", "eval/token_entropy", "eval/seconds"),
    *("eval/num_format_1_answer_1", "eval/num_format_1_answer_0", "eval/num_format_0"),
    *(FINAL_SCORE, "eval_all/num_examples"),
)
METRIC_COLUMNS = ("variant", "seed", "train_step", "eval_step", *METRICS)
RUN_COLUMNS = (
    *("variant", "seed", "fingerprint", "minutes", "wall_minutes", "train_steps"),
    *("last_answer_reward", "best_answer_reward", "num_eval_examples", "final_answer_reward", "num_final_examples"),
    *("sampled_tokens", "peak_memory_gib"),
)
# Columns that only some sweeps have: those of extra_validation_data, and of DPO.
FURTHER_COLUMNS = re.compile(r"eval(_all)?/[^/]+/answer_reward|eval/accuracy|train/loss_per_pair")
COLUMNS = {"runs.csv": RUN_COLUMNS, "metrics.csv": METRIC_COLUMNS}


def collect_run(
    folder: Path, results: Path, names: Mapping[str, Any], wall_minutes: float | None, order: Sequence[str]
) -> dict[str, Any]:
    """Write a run's figures into a sweep's results; return its row of runs.csv.

    Args:
        folder: the folder of the run.
        results: the folder of the sweep's results; made if it does not exist.
        names: variant, seed and fingerprint.
        wall_minutes: time that the run's processes took; None if it is not known.
        order: the sweep's variants; rows are sorted by this order, then by seed.
    """
    rows = read_metrics(folder)
    summary = {**names, "wall_minutes": wall_minutes, **summarize_run(folder)}
    kept = [
        {**names, **row}
        for row in rows
        if any(row.get(name) is not None for name in [*METRICS, *_further_columns(row)])
    ]
    results.mkdir(parents=True, exist_ok=True)
    with _one_writer(results):
        _replace_rows(results / "metrics.csv", METRIC_COLUMNS, kept, order)
        _replace_rows(results / "runs.csv", RUN_COLUMNS, [summary], order)  # last: this row makes the run finished
    return summary


def forget_run(results: Path, variant: str, seed: int) -> None:
    """Remove a run's figures from a sweep's results, so that it is no longer finished."""
    if not results.is_dir():
        return
    with _one_writer(results):
        for name, columns in COLUMNS.items():  # the row of a finished run first
            if (results / name).exists():
                rows = read_table(results / name)
                kept = [row for row in rows if (row["variant"], row["seed"]) != (variant, str(seed))]
                write_rows(results / name, columns, kept)


def summarize_run(folder: Path) -> dict[str, Any]:
    """Return a run's values for runs.csv, None where it logged nothing."""
    rows = read_metrics(folder)

    def known(name: str) -> list[Any]:
        return [row[name] for row in rows if row.get(name) is not None]

    def last(name: str) -> Any:
        return known(name)[-1] if known(name) else None

    lengths, tokens = known("rollout/response_length"), known("rollout/num_sampled_tokens")
    settings = read_yaml(folder / "config.yaml")
    batch_size = settings.get("rollout_batch_size") or settings.get("ei_batch_size", 0) * settings.get("group_size", 0)
    return {
        "minutes": sum(sum(known(name)) for name in OF_RUN) / 60,
        "train_steps": last("train_step"),
        "last_answer_reward": last(EVAL_SCORE),
        "best_answer_reward": max(known(EVAL_SCORE), default=None),
        "num_eval_examples": last("eval/num_examples"),
        "final_answer_reward": last(FINAL_SCORE),
        "num_final_examples": last("eval_all/num_examples"),
        # Runs of before num_sampled_tokens was logged sampled batches of one size.
        "sampled_tokens": sum(tokens) or (round(sum(lengths) * batch_size) if lengths and batch_size else None),
        "peak_memory_gib": max(known("memory/peak_gib"), default=None),
    }


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; an empty list if the file does not exist.

    Raises:
        UserError: a row is damaged; names file and line.
    """
    if not path.exists():
        return []
    texts = {"variant", "fingerprint"}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        try:
            if missing := {*COLUMNS.get(path.name, ())} - {*(reader.fieldnames or ())}:
                raise ValueError(f"has no column {min(missing)}")
            rows = []
            for row in reader:
                for column, cell in row.items():
                    if column is None or cell is None:
                        raise ValueError("has not one cell for each column")
                    if cell and column not in texts:
                        float(cell)
                rows.append(row)
        except (ValueError, csv.Error) as error:
            raise UserError(
                f"{path}, line {reader.line_num}: {error}; bring the file back from git, or correct that line"
            ) from None
    return rows


@contextmanager
def _one_writer(results: Path) -> Iterator[None]:
    """Let one session at a time write to a folder of results. Several may run seeds of one sweep."""
    with (results / ".lock").open("a") as file:
        take_lock(file, results)
        yield


def _replace_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], order: Sequence[str]) -> None:
    """Replace a run's rows in a CSV file."""
    texts = [{name: as_text(row.get(name)) for name in [*columns, *_further_columns(row)]} for row in rows]
    replaced = {(row["variant"], row["seed"]) for row in texts}
    texts += [row for row in read_table(path) if (row["variant"], row["seed"]) not in replaced]
    places = {variant: place for place, variant in enumerate(order)}
    texts.sort(key=lambda row: (places.get(row["variant"], len(places)), row["variant"], int(row["seed"])))
    write_rows(path, columns, texts)


def _further_columns(row: Mapping[str, Any]) -> list[str]:
    return [name for name in row if FURTHER_COLUMNS.fullmatch(name)]


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Write a CSV file of texts anew, and rename it, so that it is never half written."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        further = sorted({name for row in rows for name in _further_columns(row) if row[name]})
        writer = csv.DictWriter(file, [*columns, *further], "", "ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)


def as_text(value: object) -> str:
    """Return a figure as the committed CSV files have it: numbers with five digits, None empty."""
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
