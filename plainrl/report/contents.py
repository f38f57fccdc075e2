"""What a page shows of one run, as JSON can hold it: read from the run's folder alone.

A page has a limit. Of a metric with many values those are shown between which the curve moves most: the least and the
greatest of each stretch. Their means are those of all values. Of the responses, groups are taken until their share of
the bytes is used up: first what was printed, then the first question of every file, and so on. The page says how many
there are in all.
"""

import datetime
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from plainrl.changes import changed_keys, with_defaults
from plainrl.cli import read_yaml, resolve
from plainrl.clock import OF_ALL_EVALUATIONS
from plainrl.config import NUM_STEPS_KEYS, GRPOConfig, RunConfig
from plainrl.diagnosis import find_remarks
from plainrl.help import SCHEMAS
from plainrl.records import UserError
from plainrl.report.curves import names_in, step_name, with_axes
from plainrl.report.samples import (
    LONGEST_SHOWN,
    ROLLOUTS,
    SHOWN_BYTES,
    Sample,
    Template,
    choose_printed,
    coarse_to_fine,
    count_lines,
    list_sample_files,
    read_samples,
    read_template,
    shorten,
    split_into_groups,
)
from plainrl.run_records import EVAL_SCORE, read_json_object, read_metrics
from plainrl.several_samples import wilson_interval
from plainrl.shared_config import validation_source

MOST_POINTS = 1000  # of a metric in a page
MOST_FILES = 200  # of samples, of each kind, that a page shows responses of; of the others it counts the lines
FINAL_SCORE = "eval_all/answer_reward"
REPOSITORY = Path(__file__).parent.parent.parent
Row = Mapping[str, Any]


def read_run(folder: Path, state: str, ending: str = "", config: RunConfig | None = None) -> dict[str, Any]:
    """Return everything that a page shows of a run.

    Args:
        folder: of the run.
        state: running, finished, or how it stopped.
        ending: what ended it, if it was not its last step.
        config: of the run; by default the one in its folder.

    Raises:
        UserError: the folder holds no run, or its metrics are damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run, for it has no config.yaml; name the folder of a run")
    settings, environment = read_yaml(folder / "config.yaml"), read_json_object(folder / "environment.json")
    rows = with_axes(read_metrics(folder))
    schema = schema_of(settings)
    settings = with_defaults(settings, schema) if schema else settings
    if config is None and schema is not None:
        config = _load_config(schema, settings)
    responses = describe_responses(folder, settings)
    return {
        "name": folder.resolve().name,
        "folder": str(folder),
        "state": state,
        "ending": ending,
        "stepName": step_name(rows),
        "facts": describe_facts(settings, environment),
        "tiles": describe_tiles(rows, settings),
        "summary": summarize(rows, settings),
        "curves": describe_curves(rows),
        "times": sum_times(rows),
        "remarks": collect_remarks(rows, config),
        "preset": describe_preset(settings, schema),
        "settings": [[key, _text(value)] for key, value in settings.items()],
        **responses,
    }


def schema_of(settings: Row) -> type[RunConfig] | None:
    """Return the schema of a run's settings: the first one that knows all of its keys, or None."""
    return next((schema for schema in SCHEMAS if settings.keys() <= schema.model_fields.keys()), None)


def describe_facts(settings: Row, environment: Row) -> list[list[str]]:
    """Return label and text of what is run, with what, since when and where."""
    devices = environment.get("cuda_devices") or [f"{environment.get('cpu_count')} cores, {environment.get('cpu')}"]
    commit = str(environment.get("git_commit") or "")[:10]
    data = dict.fromkeys(filter(None, [str(settings.get("train_data")), validation_source(settings)]))
    facts = {
        "script": environment.get("script"),
        "model": settings.get("model"),
        "data": ", validated on ".join(data),
        "reward": settings.get("reward"),
        "preset": settings.get("preset"),
        "seed": settings.get("seed"),
        "started": str(environment.get("time") or "").replace("T", " ").replace("+00:00", " UTC"),
        "on": ", ".join(devices) if environment.get("platform") else None,
        "commit": f"{commit}{' with changes' if environment.get('git_diff') else ''}" if commit else None,
        "command": " ".join(map(str, environment.get("command", []))),
    }
    return [[label, str(value)] for label, value in facts.items() if value not in (None, "")]


def summarize(rows: Sequence[Row], settings: Row) -> dict[str, str]:
    """Return a line of the table of runs: step, scores and time."""
    scores = [row[EVAL_SCORE] for row in rows if row.get(EVAL_SCORE) is not None]
    finals = [row[FINAL_SCORE] for row in rows if row.get(FINAL_SCORE) is not None]
    return {
        "step": _describe_step(rows, settings),
        "first": f"{scores[0]:.3f}" if scores else "-",
        "last": f"{scores[-1]:.3f}" if scores else "-",
        "best": f"{max(scores):.3f}" if scores else "-",
        "all questions": f"{finals[-1]:.3f}" if finals else "-",
        "time": describe_minutes(rows[-1]["minutes"]) if rows else "-",
    }


def describe_tiles(rows: Sequence[Row], settings: Row) -> list[dict[str, str]]:
    """Return the few figures that one wants first: label, value, note."""
    tiles = []
    evaluations = [row for row in rows if row.get(EVAL_SCORE) is not None]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        best = max(evaluations, key=lambda row: row[EVAL_SCORE])
        value, note = f"{last[EVAL_SCORE]:.3f}", _describe_interval(last, "eval")
        if len(evaluations) > 1:
            value = f"{first[EVAL_SCORE]:.3f} \u2192 {value}"
            note = f"{note}; best {best[EVAL_SCORE]:.3f} at step {best['eval_step']}"
        tiles.append(_tile("validation answer reward", value, note))
    for row in [row for row in rows if row.get(FINAL_SCORE) is not None][-1:]:
        tiles.append(_tile("at the end", f"{row[FINAL_SCORE]:.3f}", _describe_interval(row, "eval_all")))
    tiles += _benchmark_tiles(rows)
    quantities = {
        "training reward": ("rollout/reward", "{:.3f}", "of all sampled responses"),
        "training loss": ("train/loss_per_token", "{:.4f}", "nats per token"),
        "response length": ("eval/response_length", "{:.0f}", "tokens, validation"),
    }
    for label, (name, form, note) in quantities.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            begin = f"; {form.format(values[0])} at first" if len(values) > 1 else ""
            tiles.append(_tile(label, form.format(values[-1]), note + begin))
    time = f", {describe_minutes(rows[-1]['minutes'])} of steps and evaluations" if rows else ""
    tiles.append(_tile("step", _describe_step(rows, settings), step_name(rows) + time))
    return tiles


def describe_minutes(minutes: float) -> str:
    """Return a time in hours, minutes and seconds.

    >>> describe_minutes(0.5), describe_minutes(61.25)
    ('30 s', '1 h 1 min')
    """
    seconds = round(minutes * 60)
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"
    hours, rest = divmod(seconds // 60, 60)
    return f"{hours} h {rest} min" if hours else f"{rest} min"


def describe_curves(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the metrics over both axes: `step`, `minutes`, and for each metric the places in them and its values.

    A metric that is thinned out also has its smoothed values at these places, and how many values each is the mean of.
    The page smooths the others itself.
    """
    metrics = {}
    for name in names_in(rows):
        if name not in ("step", "minutes"):
            points = [(place, row[name]) for place, row in enumerate(rows) if row.get(name) is not None]
            shown = thin_out(points, MOST_POINTS)
            metrics[name] = [list(column) for column in zip(*shown, strict=True)]
            if len(shown) < len(points):  # the mean of what is shown would be that of the extremes
                window = len(points) // 20
                metrics[name] += [smooth_at([place for place, _ in shown], points, window), window]
    return {
        "step": [row["step"] for row in rows],
        "minutes": [row["minutes"] for row in rows],
        "metrics": metrics,
    }


def thin_out(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """Return at most `most` points: the least and the greatest of each of most / 2 stretches of the same length.

    No peak is lost, and what is left has its own value.

    >>> thin_out([(0, 1.0), (1, 9.0), (2, 2.0), (3, 2.5), (4, 0.0), (5, 3.0)], most=4)
    [(0, 1.0), (1, 9.0), (4, 0.0), (5, 3.0)]
    """
    if len(points) <= most:
        return list(points)
    kept: list[tuple[int, float]] = []
    num_stretches = most // 2
    for number in range(num_stretches):
        stretch = points[number * len(points) // num_stretches : (number + 1) * len(points) // num_stretches]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept


def smooth_at(places: Sequence[int], points: Sequence[tuple[int, float]], window: int) -> list[float]:
    """Return the mean of the last `window` values at some places, to 5 digits; of all so far where there are fewer.

    >>> smooth_at([3, 6], [(0, 4.0), (3, 2.0), (5, 0.0), (6, 1.0)], window=2)
    [3.0, 0.5]
    """
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    ends = {place: end for end, (place, _) in enumerate(points, start=1)}
    spans = [(max(0, ends[place] - window), ends[place]) for place in places]
    return [float(f"{(sums[end] - sums[begin]) / (end - begin):.5g}") for begin, end in spans]


def sum_times(rows: Sequence[Row]) -> list[list[Any]]:
    """Return the seconds of each phase of the steps, and of the evaluations."""
    phases = [name for name in names_in(rows) if name.startswith("time/")]
    phases = [name for name in phases if name not in ("time/step", "time/tokens_per_second")] or ["time/step"]
    names = {"evaluation": list(OF_ALL_EVALUATIONS)}
    names = {name.removeprefix("time/"): [name] for name in phases} | names
    sums = [[label, sum(row.get(name) or 0.0 for row in rows for name in of)] for label, of in names.items()]
    return [entry for entry in sums if entry[1] > 0]


def collect_remarks(rows: Sequence[Row], config: RunConfig | None) -> list[list[str]]:
    """Return each remark on the steps of a run, with the steps that it holds for; see plainrl/diagnosis.py."""
    found: dict[str, list[int]] = {}
    if isinstance(config, GRPOConfig):
        for row in rows:
            for remark in find_remarks(row, config):
                found.setdefault(remark, []).append(-(-int(row["step"] * 1_000_000) // 1_000_000))
    return [[remark, describe_steps(steps)] for remark, steps in found.items()]


def describe_steps(steps: Sequence[int]) -> str:
    """Return step numbers in words.

    >>> describe_steps([3]), describe_steps([1, 2, 3, 7, 9, 10])
    ('step 3', 'steps 1 to 3, 7, 9 to 10')
    """
    ranges: list[list[int]] = []
    for step in sorted(set(steps)):
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    texts = [f"{first} to {last}" if first != last else str(first) for first, last in ranges]
    return f"step{'s' * (len(set(steps)) > 1)} {', '.join(texts)}"


def describe_preset(settings: Row, schema: type[RunConfig] | None) -> dict[str, Any]:
    """Return the preset of a run, and the settings that differ from it: key, the preset's value, the run's."""
    name = str(settings.get("preset", ""))
    if schema is None:
        return {"name": name, "changed": [], "isKnown": False}
    try:
        expected = resolve(schema, REPOSITORY / SCHEMAS[schema][1], [f"preset={name}"]).config.model_dump(mode="json")
    except UserError:  # a preset of a file of the user's own, or of another version
        return {"name": name, "changed": [], "isKnown": False}
    changed = [[key, _text(expected.get(key)), _text(settings[key])] for key in changed_keys(expected, settings)]
    return {"name": name, "changed": changed, "isKnown": True}


def describe_responses(folder: Path, settings: Row) -> dict[str, Any]:
    """Return the groups of responses that a page shows, the template of their prompts, and how many there are."""
    template = read_template(str(settings.get("prompt", "")))
    group_size = int(settings.get("group_size") or 1)
    num_printed = int(settings.get("num_printed_examples") or 1)  # they are never left out of a full page
    num_responses = num_damaged = 0
    found: list[tuple[tuple[bool, int, int], dict[str, Any]]] = []  # the order in which groups are taken, and each
    for kind, files in _by_kind(folder).items():
        places = {place: rank for rank, place in enumerate(coarse_to_fine(len(files)))}
        for place, file in enumerate(files):
            if places[place] >= MOST_FILES:
                num_responses += count_lines(file.path)
                continue
            samples, damaged = read_samples(file.path)
            num_responses, num_damaged = num_responses + len(samples), num_damaged + damaged
            printed = {index for indices in choose_printed(samples, num_printed).values() for index in indices}
            for rank, indices in enumerate(split_into_groups(samples, kind, group_size)):
                group = describe_group([samples[index] for index in indices], template)
                group = {"kind": kind, "step": file.step, "rank": rank, **group}
                is_printed = kind == "eval" and bool(printed & set(indices))
                found.append(((not is_printed, rank, places[place]), group))
    trained = _take(found, lambda kind: kind == ROLLOUTS, SHOWN_BYTES)
    # Half of the bytes, and what training leaves of the other half.
    shown = _take(found, lambda kind: kind != ROLLOUTS, max(SHOWN_BYTES // 2, SHOWN_BYTES - _num_bytes(trained)))
    shown += _take(found, lambda kind: kind == ROLLOUTS, SHOWN_BYTES - _num_bytes(shown))
    shown.sort(key=lambda group: (group["kind"] == ROLLOUTS, group["kind"], group["step"], group["rank"]))
    return {
        "template": list(template),
        "groups": shown,
        "numResponses": num_responses,
        "numDamaged": num_damaged,
    }


def describe_group(samples: Sequence[Sample], template: Template) -> dict[str, Any]:
    """Return what is shown of the responses to one question."""
    first = samples[0]
    question = template.question_in(str(first["prompt"]))
    group: dict[str, Any] = {
        "question": shorten(question, LONGEST_SHOWN),
        "hasTemplate": question != first["prompt"],
        "truth": shorten(str(first.get("ground_truth")), LONGEST_SHOWN),
    }
    known = {
        *("prompt", "question", "sample", "response", "ground_truth", "response_length", "finish_reason"),
        *("reward", "format_reward", "answer_reward", "advantage", "token_entropy"),
    }
    members = []
    for sample in samples:
        member = {
            "response": shorten(str(sample["response"]), LONGEST_SHOWN),
            "reward": sample.get("reward", sample["answer_reward"]),
            "format": sample.get("format_reward"),
            "answer": sample["answer_reward"],
            "advantage": sample.get("advantage"),
            "entropy": sample.get("token_entropy"),
            "tokens": sample.get("response_length"),
            "isCut": sample.get("finish_reason") == "length" or None,
            "more": {key: value for key, value in sample.items() if key not in known} or None,
        }
        members.append({key: value for key, value in member.items() if value is not None})
    return group | {"members": members}


def _by_kind(folder: Path) -> dict[str, list[Any]]:
    kinds: dict[str, list[Any]] = {}
    for file in list_sample_files(folder):
        kinds.setdefault(file.kind, []).append(file)
    return kinds


def _take(found: Sequence[tuple[Any, dict[str, Any]]], is_wanted: Any, most_bytes: int) -> list[dict[str, Any]]:
    """Return the first groups of the wanted kinds, in their order, that fit into a number of bytes."""
    taken, num_bytes = [], 0
    for _, group in sorted(((order, group) for order, group in found if is_wanted(group["kind"])), key=lambda x: x[0]):
        num_bytes += _num_bytes(group)
        if num_bytes > most_bytes:
            break
        taken.append(group)
    return taken


def _num_bytes(value: Any) -> int:
    return len(to_json(value))


def to_json(value: Any) -> str:
    """Return JSON that can stand inside an HTML element: no `<` begins or ends one."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _describe_step(rows: Sequence[Row], settings: Row) -> str:
    step = max((int(row["step"]) for row in rows), default=0)
    total = next((settings[key] for key in NUM_STEPS_KEYS if settings.get(key)), None)
    return f"{step} of {total}" if total else str(step)


def _describe_interval(row: Row, prefix: str) -> str:
    """Return how many questions were asked, with the 95 % interval of a score that is the share of right ones."""
    score, num_questions = row[f"{prefix}/answer_reward"], row.get(f"{prefix}/num_examples")
    if not num_questions:
        return ""
    categories = [row.get(f"{prefix}/num_format_{name}") or 0 for name in ("1_answer_1", "1_answer_0", "0")]
    text = f"{num_questions} questions"
    interval: Sequence[float] = ()
    is_share = math.isclose(categories[0], score * num_questions, abs_tol=1e-6)  # of right answers
    if sum(categories) == num_questions and is_share:
        interval = wilson_interval(score, num_questions)
    elif (share := row.get(f"{prefix}/pass_at_1")) is not None and math.isclose(share, score, abs_tol=1e-9):
        # several responses to each question
        interval = [row[f"{prefix}/pass_at_1_{end}"] for end in ("low", "high")]
    return text + (", 95 % interval {:.3f} to {:.3f}".format(*interval) if interval else "")


def _benchmark_tiles(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return the accuracy of each task of supplement/evaluate_benchmark.py that has one."""
    tiles = []
    for row in rows:
        for name in row:
            task = name.removesuffix("_accuracy")
            if task != name and row.get(f"{name}_low") is not None:
                interval = "95 % interval {:.3f} to {:.3f}".format(row[f"{name}_low"], row[f"{name}_high"])
                note = f"{row[f'{task}_num_examples']} questions, {interval}"
                tiles.append(_tile(f"{task.removeprefix('eval/')}, accuracy", f"{row[name]:.3f}", note))
    return tiles


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _load_config(schema: type[RunConfig], settings: Row) -> RunConfig | None:
    try:
        return schema.model_validate(settings)
    except (ValidationError, UserError):  # a file of the user's own is gone, or the run is of another version
        return None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def now() -> str:
    """Return the time, as a page says when it was written."""
    return datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
