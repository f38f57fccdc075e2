"""The tables of results/*/README.md and of README.md, from the committed CSVs.

A table has one line per variant:

    last, best, last on all questions    answer reward, mean +- 95 % t-interval over seeds (intervals.py); best
                                         counts the evaluation before the first step too
    difference to the first line         of the last on all questions, +- Welch's 95 % interval. Two means may differ
                                         although their own intervals overlap
    one run (seed 0), Wilson             95 % interval of seed 0 alone: on all questions if it has that value, else
                                         its last evaluation
    median minutes                       of training steps and evaluations
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.catalog import METHODS_TABLE
from experiments.curves import Curve, rows_of
from experiments.intervals import difference_and_half_width, mean_and_half_width
from plainrl.several_samples import wilson_interval

START_OF_TABLE, END_OF_TABLE = "<!-- table -->", "<!-- end of table -->"
COLUMNS = (
    *("variant", "last", "best", "last, all questions", "difference to the first line", "seeds", "questions"),
    *("all questions", "one run (seed 0), Wilson", "median minutes, steps and evaluations"),
)


def make_table(experiment: str, curves: Sequence[Curve], results: Path, suffix: str = "") -> str:
    """Return a Markdown table, one line per variant that has results.

    It is empty if none of the experiment's own variants has results.
    """
    found = {curve: rows_of(curve, results, suffix, "runs.csv") for curve in curves}
    if not any(rows for curve, rows in found.items() if curve.sweep == experiment):
        return ""
    first = found[curves[0]]
    lines = [f"| {' | '.join([curve.label, *_cells(rows, first)])} |" for curve, rows in found.items() if rows]
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *lines])


def make_methods_table(results: Path) -> str:
    """Return the table of README.md: each method's answer reward on the whole validation set, and its time.

    The interval is the 95 % t-interval over seeds; a single run has its Wilson interval. Minutes: the median over
    seeds, of the whole process. A method's name is a link to its folder.
    """
    lines = ["| method | answer reward | seeds | questions | minutes |", "|---|---|---|---|---|"]
    for curve in METHODS_TABLE:
        rows = [row for row in rows_of(curve, results, "", "runs.csv") if _final_score(row)[0]]  # DPO may ask nothing
        if not rows:
            continue
        questions = _final_score(rows[0])[1]
        mean, half = mean_and_half_width([float(_final_score(row)[0]) for row in rows])
        interval = f"{mean:.3f} +- {half:.3f}"
        if len(rows) == 1:
            low, high = wilson_interval(mean, int(questions))
            interval = f"{mean:.3f} ({low:.3f} to {high:.3f})"
        known = [float(row["wall_minutes"]) for row in rows if row["wall_minutes"]]
        minutes = f"{statistics.median(known):.1f}" if known else "-"
        name = f"[{curve.label}](results/{curve.sweep})"
        lines.append(f"| {name} | {interval} | {len(rows)} | {int(questions):,} | {minutes} |")
    return "\n".join(lines)


def put_table(text: str, table: str) -> str:
    """Return a README with the table between its two marks; a README without marks stays as it is.

    >>> put_table("a\\n<!-- table -->\\nold\\n<!-- end of table -->\\nb\\n", "new")
    'a\\n<!-- table -->\\nnew\\n<!-- end of table -->\\nb\\n'
    """
    before, start, rest = text.partition(START_OF_TABLE)
    _, end, after = rest.partition(END_OF_TABLE)
    return f"{before}{start}\n{table}\n{end}{after}" if end else text


def _cells(rows: Sequence[Mapping[str, str]], first_rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a variant's cells after its name, from its runs and those of the table's first line."""

    def over_seeds(name: str) -> str:
        values = [float(row[name]) for row in rows if row[name]]
        if not values:
            return "-"
        mean, half = mean_and_half_width(values)
        interval = f" +- {half:.3f}" if len(values) > 1 else ""
        return f"{mean:.3f}{interval}" + (f" (n = {len(values)})" if len(values) < len(rows) else "")

    scores = [over_seeds(f"{kind}_answer_reward") for kind in ("last", "best", "final")]
    finals, first_finals = (
        [float(row["final_answer_reward"]) for row in of if row["final_answer_reward"]] for of in (rows, first_rows)
    )
    if rows == first_rows or min(len(finals), len(first_finals)) < 2:
        scores.append("-")
    else:
        scores.append("{:+.3f} +- {:.3f}".format(*difference_and_half_width(finals, first_finals)))
    counts = [
        ", ".join(dict.fromkeys(row[f"num_{kind}_examples"] or "-" for row in rows)) for kind in ("eval", "final")
    ]
    wilson = "-"
    for row in rows:
        score, questions = _final_score(row)
        if row["seed"] == "0" and score and _is_share(float(score), int(questions)):
            low, high = wilson_interval(float(score), int(questions))
            wilson = f"{low:.3f} to {high:.3f}"
    minutes = [float(row["minutes"]) for row in rows if row["minutes"]]
    return [*scores, str(len(rows)), *counts, wilson, f"{statistics.median(minutes):.1f}" if minutes else "-"]


def _is_share(score: float, questions: int) -> bool:
    """Return whether a score with five digits can be a share of the questions: a reward of one's own may be anything.

    >>> _is_share(0.33333, 3), _is_share(0.5, 3), _is_share(-1.0, 3)
    (True, False, False)
    """
    return 0 <= score <= 1 and math.isclose(score * questions, round(score * questions), abs_tol=0.05)


def _final_score(row: Mapping[str, str]) -> tuple[str, str]:
    """Return a run's answer reward and its number of questions: on all questions, or else the last evaluation."""
    kind, subset = ("final", "final") if row["final_answer_reward"] else ("last", "eval")
    return row[f"{kind}_answer_reward"], row[f"num_{subset}_examples"]
