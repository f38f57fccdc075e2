"""Every figure and table of results/, again from the committed CSVs: `uv run python plot_results.py`.

FIGURES and TABLES below say what there is; a curve is a variant of a sweep (sweep.py, run_results.py), and an
experiment may borrow variants of another one's. What has no CSV yet is skipped, and named. `preset=one-gpu` draws the
results of the sweeps that ran with that preset.

Figures: the line is the mean over seeds, the band its 95 % interval by Student's t,

    m +- t_{0.975, n-1} s / sqrt(n),    s: sample standard deviation,    no band where n < 3

at the steps that all seeds of the variant have. A table, per variant: the validation answer reward after the last step,
the best one (that before the first step included), and the one on the whole validation set after the last step, each as
mean +- that interval over seeds; by how much the last of these differs from the table's first line, +- Welch's 95 %
interval (two means whose own intervals overlap may differ all the same); the Wilson interval of seed 0 alone, of its
value on the whole validation set, or else of its last one; the median minutes that training steps and evaluations
took. It is printed, and written between the two marks of results/<experiment>/README.md. The README's own table, of
the laptop preset, has a line per method: the value on the whole validation set.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from scipy import stats

from run_config import UserError, run_main
from run_directory import EVAL_SCORE
from run_results import read_table

FEWEST_SEEDS = 3
START_OF_TABLE, END_OF_TABLE = "<!-- table -->", "<!-- end of table -->"
COLUMNS = (
    *("variant", "last", "best", "last, all questions", "difference to the first line", "seeds", "questions"),
    *("all questions", "one run (seed 0), Wilson", "median minutes, steps and evaluations"),
)


class Curve(NamedTuple):
    """A variant of a sweep, and what figures and tables call it."""

    sweep: str
    variant: str
    label: str


class Panel(NamedTuple):
    """A metric over an axis.

    minutes: of the training steps so far, evaluations left out. sampled_tokens: so far, in training; a curve that
    samples nothing is left out.
    """

    title: str
    axis: Literal["train_step", "eval_step", "minutes", "sampled_tokens"]
    metric: str
    curves: Sequence[Curve]


class Point(NamedTuple):
    """Where a curve passes: median x and mean y over seeds, and half the width of its interval."""

    x: float
    mean: float
    half: float


SFT_EXAMPLES = [Curve("sft_examples", f"num_sft_examples={n}", f"{n} examples") for n in (128, 256, 512, 1024, "all")]
SFT_FILTER = [
    Curve("sft_filter", "filter_correct=false", "all traces"),
    Curve("sft_filter", "filter_correct=true", "correct traces alone"),
    Curve("sft_examples", "num_sft_examples=1024", "none corrupted"),
]
LEARNING_RATES = [
    Curve("grpo_learning_rate", f"learning_rate={rate}", f"learning rate {float(rate):g}")
    for rate in ("5e-06", "1e-05", "2e-05", "0.0001")
]
ON_POLICY = Curve("grpo_off_policy", "on_policy", "on-policy")  # the baseline again, where later experiments ran
BASELINE = Curve("grpo_learning_rate", "learning_rate=2e-05", "baseline: masked_mean, std, on-policy")
LENGTH_NORMALIZATION = [
    BASELINE,
    Curve("grpo_ablation", "masked_normalize", "masked_normalize"),
    Curve("grpo_ablation", "token_mean", "token_mean"),
]
ADVANTAGES = [
    BASELINE,
    Curve("grpo_ablation", "no_std_normalization", "without std normalization"),
    Curve("grpo_ablation", "no_baseline", "without baseline and std"),
]
CLIP = [
    ON_POLICY,
    Curve("grpo_ablation", "off_policy_clip", "off-policy, clip"),
    Curve("grpo_ablation", "off_policy_no_clip", "off-policy, no clip"),
]
OFF_POLICY = [
    ON_POLICY,
    Curve("grpo_ablation", "off_policy_clip", "1 x 32"),
    Curve("grpo_off_policy", "2x64", "2 x 64"),
    Curve("grpo_off_policy", "4x128", "4 x 128"),
]
CHECKPOINTS = [
    ON_POLICY._replace(label="from the early checkpoint"),
    Curve("sft_checkpoint", "final", "from the late checkpoint"),
]
PROMPTS = [ON_POLICY._replace(label="r1_zero"), Curve("prompt", "question_only", "question_only")]
SFT_CONTINUED = [
    BASELINE._replace(label="GRPO"),
    Curve("sft_continued", "all_traces", "SFT continued, 1,600 traces"),
    Curve("sft_continued", "same_traces", "SFT continued, the warm start's traces"),
]
METHODS = [*SFT_CONTINUED, Curve("expert_iteration", "default", "expert iteration")]
METHODS_TABLE = [
    Curve("zero_shot", "r1_zero", "untrained (zero-shot)"),
    Curve("warm-start", "default", "warm start: 16 SFT steps on 256 traces"),
    BASELINE._replace(label="GRPO from the warm start, 24 steps, no further traces"),
    Curve("expert_iteration", "default", "expert iteration from the warm start, 6 steps, no further traces"),
    Curve("sft_continued", "same_traces", "SFT from the warm start, 100 steps on its own 256 traces"),
    Curve("sft_continued", "all_traces", "SFT from the warm start, 100 steps on 1,600 traces"),
]
FIGURES = {
    "SFT-train-loss.png": [
        Panel("training loss per token (nats)", "train_step", "train/loss_per_token", SFT_EXAMPLES),
        Panel("validation answer reward", "eval_step", EVAL_SCORE, SFT_EXAMPLES),
        Panel("training loss per token (nats), corrupted traces", "train_step", "train/loss_per_token", SFT_FILTER),
        Panel("validation answer reward, corrupted traces", "eval_step", EVAL_SCORE, SFT_FILTER),
    ],
    "RL-eval-reward.png": [
        Panel("validation answer reward", "eval_step", EVAL_SCORE, LEARNING_RATES),
        Panel("token entropy on validation (nats)", "eval_step", "eval/token_entropy", LEARNING_RATES),
    ],
    "Module-ablation-eval.png": [
        Panel("length normalization: validation answer reward", "eval_step", EVAL_SCORE, LENGTH_NORMALIZATION),
        Panel("length normalization: gradient norm", "train_step", "train/grad_norm", LENGTH_NORMALIZATION),
        Panel("advantages: validation answer reward", "eval_step", EVAL_SCORE, ADVANTAGES),
        Panel("off-policy: validation answer reward", "eval_step", EVAL_SCORE, CLIP),
    ],
    "GRPO-eval-reward.png": [
        Panel("validation answer reward, epochs x batch", "eval_step", EVAL_SCORE, OFF_POLICY),
        Panel("by time", "minutes", EVAL_SCORE, OFF_POLICY),
        Panel("from two SFT checkpoints: validation answer reward", "eval_step", EVAL_SCORE, CHECKPOINTS),
        Panel("from two SFT checkpoints: entropy (nats)", "eval_step", "eval/token_entropy", CHECKPOINTS),
    ],
    "prompt/prompts.png": [
        Panel("validation answer reward", "eval_step", EVAL_SCORE, PROMPTS),
        Panel("response length on validation (tokens)", "eval_step", "eval/response_length", PROMPTS),
    ],
    "expert_iteration/methods.png": [
        Panel("validation answer reward", "minutes", EVAL_SCORE, METHODS),
        Panel("validation answer reward", "sampled_tokens", EVAL_SCORE, METHODS),
        Panel("token entropy on validation (nats)", "minutes", "eval/token_entropy", METHODS),
    ],
}
TABLES = {
    "sft_examples": SFT_EXAMPLES,
    "sft_filter": SFT_FILTER,
    "grpo_learning_rate": LEARNING_RATES,
    "grpo_ablation": [*LENGTH_NORMALIZATION, *ADVANTAGES[1:], *CLIP[1:]],
    "grpo_off_policy": OFF_POLICY,
    "sft_checkpoint": CHECKPOINTS,
    "prompt": PROMPTS,
    "sft_continued": SFT_CONTINUED,
    "expert_iteration": METHODS,
    "zero_shot": [Curve("zero_shot", "r1_zero", "untrained, r1_zero prompt")],
}


def main(arguments: list[str]) -> None:
    """Draw every figure, write every table."""
    key, _, preset = (arguments or ["preset=laptop"])[0].partition("=")
    if len(arguments) > 1 or key != "preset" or not preset:
        raise UserError("usage: plot_results.py [preset=one-gpu]")
    readme = Path("README.md")
    if not readme.is_file():
        raise UserError("README.md is not here: start plot_results.py in the repository's folder")
    write_all(Path("results"), Path("results"), "" if preset == "laptop" else f"-{preset}")
    readme.write_text(put_table(readme.read_text(), make_methods_table(Path("results"))))


def write_all(results: Path, output: Path, suffix: str = "") -> None:
    """Draw figures and write tables.

    Args:
        results: the folder with the sweeps' folders.
        output: where the figures go, and where the READMEs are, in folders of the same names.
        suffix: of the sweeps' folders, and then of figures and READMEs' folders.
    """
    for name, panels in FIGURES.items():
        path = output / name
        if draw(panels, results, path.with_stem(path.stem + suffix), suffix):
            print(f"drawn: {path.with_stem(path.stem + suffix)}")
    for experiment, curves in TABLES.items():
        table = make_table(experiment, curves, results, suffix)
        path = output / f"{experiment}{suffix}" / "README.md"
        if table:
            print(f"\n{experiment}{suffix}:\n{table}")
        if table and path.exists():
            path.write_text(put_table(path.read_text(), table))


def draw(panels: Sequence[Panel], results: Path, path: Path, suffix: str = "") -> bool:
    """Draw a figure of what there is; return whether there is anything."""
    from matplotlib.figure import Figure

    data = [[(curve, *read_curve(curve, panel, results, suffix)) for curve in panel.curves] for panel in panels]
    num_seeds: dict[Curve, int] = {}
    for curve, _, n in itertools.chain(*data):
        num_seeds[curve] = max(n, num_seeds.get(curve, 0))
    missing = [f"{curve.sweep}{suffix} {curve.variant}" for curve, n in num_seeds.items() if n == 0]
    is_skipped = not any(num_seeds[curve] for curve in own_curves(list(num_seeds)))
    if missing:
        print(f"{path}: {'skipped, ' if is_skipped else ''}no results yet of {', '.join(missing)}")
    if is_skipped:
        return False
    for curve, n in num_seeds.items():
        if 0 < n < FEWEST_SEEDS:
            print(f"{path}: {curve.sweep}{suffix} {curve.variant} has {n} of at least {FEWEST_SEEDS} seeds")
    columns = 2 if len(panels) == 4 else len(panels)
    num_rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.6 * columns, 3.8 * num_rows), layout="constrained")
    figure.suptitle("lines: mean over n seeds; bands: 95 % t-interval of the mean", fontsize="small")
    for index, (panel, row) in enumerate(zip(panels, data, strict=True)):
        xlabel = "minutes of training steps" if panel.axis == "minutes" else panel.axis.replace("_", " ")
        plot = figure.add_subplot(num_rows, columns, index + 1, title=panel.title, xlabel=xlabel)
        for number, (curve, points, n) in enumerate(row):
            if points:
                x, mean, low, high = zip(
                    *((p.x, p.mean, p.mean - p.half, p.mean + p.half) for p in points), strict=True
                )
                marker = "o" if len(points) < 30 else None
                label = f"{curve.label} (n = {n}{', no band' * (n < FEWEST_SEEDS)})"
                plot.plot(x, mean, color=f"C{number}", marker=marker, markersize=3, label=label)
                if n >= FEWEST_SEEDS:
                    plot.fill_between(x, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        if panel.metric == "train/loss_per_token":
            plot.set_yscale("log")  # it falls by a factor of 100
        plot.grid(alpha=0.3)
        if plot.get_legend_handles_labels()[0]:
            plot.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True


def own_curves(curves: Sequence[Curve]) -> Sequence[Curve]:
    """Return a figure's curves without the baseline's sweep, unless it is about that sweep."""
    return [curve for curve in curves if curve.sweep != BASELINE.sweep] or curves


def read_curve(curve: Curve, panel: Panel, results: Path, suffix: str = "") -> tuple[list[Point], int]:
    """Return a panel's points of a curve, and the number of seeds."""
    rows, runs = (rows_of(curve, results, suffix, name) for name in ("metrics.csv", "runs.csv"))
    by_seed = [_by_step([row for row in rows if row["seed"] == run["seed"]], panel, run) for run in runs]
    by_seed = [points for points in by_seed if points]
    shared = [step for step in by_seed[0] if all(step in points for points in by_seed)] if by_seed else []
    points = []
    for step in shared:
        x = [points[step][0] for points in by_seed]
        points.append(Point(statistics.median(x), *mean_and_half_width([points[step][1] for points in by_seed])))
    return points, len(by_seed)


def make_table(experiment: str, curves: Sequence[Curve], results: Path, suffix: str = "") -> str:
    """Return a Markdown table, one line per variant that has results; empty if none of the experiment's own has."""
    found = {curve: rows_of(curve, results, suffix, "runs.csv") for curve in curves}
    if not any(rows for curve, rows in found.items() if curve.sweep == experiment):
        return ""
    first = found[curves[0]]
    lines = [f"| {' | '.join([curve.label, *_cells(rows, first)])} |" for curve, rows in found.items() if rows]
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *lines])


def make_methods_table(results: Path) -> str:
    """Return the README's table: the answer reward on the whole validation set, and what it took.

    After the mean stands its 95 % t-interval over seeds, after the value of a single run its Wilson interval. Minutes:
    the median over seeds, of the whole process.
    """
    lines = ["| method | answer reward | seeds | questions | minutes |", "|---|---|---|---|---|"]
    for curve in METHODS_TABLE:
        rows = rows_of(curve, results, "", "runs.csv")
        if not rows:
            continue
        questions = _final_score(rows[0])[1]
        mean, half = mean_and_half_width([float(_final_score(row)[0]) for row in rows])
        interval = f"{mean:.3f} +- {half:.3f}"
        if len(rows) == 1:
            low, high = wilson_interval(mean, int(questions))
            interval = f"{mean:.3f} ({low:.3f} to {high:.3f})"
        minutes = statistics.median(float(row["wall_minutes"]) for row in rows)
        lines.append(f"| {curve.label} | {interval} | {len(rows)} | {int(questions):,} | {minutes:.1f} |")
    return "\n".join(lines)


def rows_of(curve: Curve, results: Path, suffix: str, name: str) -> list[dict[str, str]]:
    """Return a curve's rows of its sweep's runs.csv or metrics.csv."""
    return [row for row in read_table(results / f"{curve.sweep}{suffix}" / name) if row["variant"] == curve.variant]


def put_table(text: str, table: str) -> str:
    """Return a README with the table between its two marks; as it was if it has none.

    >>> put_table("a\\n<!-- table -->\\nold\\n<!-- end of table -->\\nb\\n", "new")
    'a\\n<!-- table -->\\nnew\\n<!-- end of table -->\\nb\\n'
    """
    before, start, rest = text.partition(START_OF_TABLE)
    _, end, after = rest.partition(END_OF_TABLE)
    return f"{before}{start}\n{table}\n{end}{after}" if end else text


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % t-interval: 0 of one value, which has none."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, 0.0
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def difference_and_half_width(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Return by how much two means differ, and half the width of the 95 % interval of it.

    Neither standard deviation need equal the other; each has at least two values. Source: Welch, 1947.
    """
    if statistics.pstdev(values) == statistics.pstdev(baseline) == 0:
        return statistics.fmean(values) - statistics.fmean(baseline), 0.0
    low, high = stats.ttest_ind(values, baseline, equal_var=False).confidence_interval()
    return float(low + high) / 2, float(high - low) / 2


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a probability, of which n trials gave a share of successes. Source: Wilson, 1927."""
    interval = stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _cells(rows: Sequence[Mapping[str, str]], first_rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a variant's cells but for its name, from its runs and those of the table's first line."""

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
        if row["seed"] == "0" and score:
            low, high = wilson_interval(float(score), int(questions))
            wilson = f"{low:.3f} to {high:.3f}"
    minutes = [float(row["minutes"]) for row in rows if row["minutes"]]
    return [*scores, str(len(rows)), *counts, wilson, f"{statistics.median(minutes):.1f}" if minutes else "-"]


def _final_score(row: Mapping[str, str]) -> tuple[str, str]:
    """Return a run's answer reward on the whole validation set, or else its last one, and of how many questions."""
    kind, subset = ("final", "final") if row["final_answer_reward"] else ("last", "eval")
    return row[f"{kind}_answer_reward"], row[f"num_{subset}_examples"]


def _by_step(rows: Sequence[Mapping[str, str]], panel: Panel, run: Mapping[str, str]) -> dict[int, tuple[float, float]]:
    """Return x and y of one run's metric by step."""
    total_length = sum(float(row["rollout/response_length"] or 0) for row in rows)
    if panel.axis == "sampled_tokens" and not total_length:
        return {}
    points, minutes, length = {}, 0.0, 0.0
    for row in rows:
        minutes += float(row["time/step"] or 0) / 60
        length += float(row["rollout/response_length"] or 0)
        if row[panel.metric]:
            step = int(row["eval_step"] or row["train_step"])
            x = {"minutes": minutes, "sampled_tokens": length * float(run["sampled_tokens"] or 0) / (total_length or 1)}
            points[step] = (x.get(panel.axis, step), float(row[panel.metric]))
    return points


if __name__ == "__main__":
    run_main(main)
