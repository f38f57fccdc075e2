"""A sweep file's variants and seeds become runs of a script, over as many sittings as it takes.

    uv run python sweep.py sweeps/NAME.yaml [--dry-run] [--variant NAME] [--gpus 0,1] [--keep-weights] [seeds=[0]]
                           [key=value ...]

Further `key=value` go to every run. A run is runs/<sweep>-<variant>-seed<k>, its output runs/<that>.log. When it ends
well its figures go to results/<sweep>/ (run_results.py), which is committed: it is finished from then on, also when
runs/ is gone, and whatever becomes of the preset's own values: who changes these removes the rows. Its weights (GBs)
are removed. An interrupted run goes on from its last checkpoint. With another preset than laptop the sweep's name is
<file>-<preset>, so that no row stands for another machine's.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from run_checkpoint import fingerprint
from run_config import (
    ExpertIterationConfig,
    GRPOConfig,
    SFTConfig,
    UserError,
    choose_preset,
    describe_changes,
    is_setting,
    load_config,
    read_yaml,
    run_main,
)
from run_directory import read_metrics
from run_results import collect_run, read_table

REPOSITORY = Path(__file__).parent
SCRIPTS = {
    "SFT_train.py": (SFTConfig, "config.yaml"),
    "GRPO_train.py": (GRPOConfig, "grpo_train.yaml"),
    "expert_iteration.py": (ExpertIterationConfig, "expert_iteration.yaml"),
    "policy_evaluation.py": (SFTConfig, "config.yaml"),
}
POLL_SECONDS = 0.5
Scalar = bool | int | float | str
Settings = dict[str, Scalar | list[Scalar]]


def _all_different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("each may stand there once")
    return seeds


class Sweep(BaseModel):
    """A sweep file. Its variants are `variants` and, beside them, every point of `grid`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    script: Literal[tuple(SCRIPTS)] = Field(description="what is run")  # pyright: ignore[reportInvalidTypeForm]
    presets: list[str] = Field([], description="for which it is meant; none: for all")
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1), AfterValidator(_all_different)] = Field(
        description="of each variant"
    )
    minutes: float | dict[str, float] = Field(description="estimate per run on the laptop preset, or one per variant")
    settings: Settings = Field({}, description="of all runs")
    laptop: Settings = Field({}, description="of all runs, with the laptop preset alone")
    variants: dict[str, Settings] = Field({}, description="name -> settings of the variant")
    grid: dict[str, Annotated[list[Scalar], Field(min_length=1)]] = Field(
        {}, description="key -> values: the product, named like `a=1,b=2`"
    )


@dataclass(frozen=True, eq=False)
class Run:
    """One variant with one seed; `settings` are its overrides as the script's schema reads them."""

    script: str
    variant: str
    seed: int
    folder: Path
    arguments: Sequence[str]
    settings: Mapping[str, Any]
    minutes: float

    @property
    def fingerprint(self) -> str:
        """What tells its settings from others."""
        return fingerprint([self.script, *sorted(self.settings.items())])[:12]

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.folder.with_name(f"{self.folder.name}.log")


def main(arguments: list[str]) -> None:
    """Print the plan, then run what is left of it."""
    parser = argparse.ArgumentParser(prog="sweep.py", description="Run the variants and seeds of a sweep file.")
    parser.add_argument("sweep", type=Path, help="sweeps/NAME.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run; seeds=[0]: these seeds alone")
    parser.add_argument("--dry-run", action="store_true", help="only print the runs, their states and estimated time")
    parser.add_argument("--variant", action="append", default=[], help="this variant alone (may be given again)")
    parser.add_argument("--gpus", default="", help="0,1: one run at a time on each of these (CUDA_VISIBLE_DEVICES)")
    parser.add_argument("--keep-weights", action="store_true", help="leave final/ and checkpoints/ of finished runs")
    options = parser.parse_intermixed_args(arguments)
    gpus = re.findall(r"[^, ]+", options.gpus)

    results, runs = plan(options.sweep, options.overrides, "one-gpu" if gpus else "auto")
    order = list(dict.fromkeys(run.variant for run in runs))
    if unknown := set(options.variant) - set(order):
        raise UserError(f"--variant {min(unknown)}: {options.sweep} has {' '.join(order)}")
    runs = [run for run in runs if run.variant in (options.variant or order)]
    states = {run: state_of(run, results) for run in runs}
    for run, state in states.items():
        print(f"{state:<11}  {run.minutes:>5.0f} min  {run.folder.name}")
    left = [run for run, state in states.items() if state in ("interrupted", "to do")]
    hours = sum(run.minutes for run in left) / 60 / max(len(gpus), 1)
    print(f"{len(left)} of {len(runs)} runs to go, about {hours:.1f} hours on the laptop preset; results: {results}")
    if options.dry_run:
        return

    for run, state in states.items():
        if state == "to collect":
            collect(run, results, order, options.keep_weights)
    failures = execute(left, gpus, lambda run: collect(run, results, order, options.keep_weights))
    if failures:
        print("\n".join(["failed:", *(f"  {run.log}: {line}" for run, line in failures.items())]), file=sys.stderr)
        sys.exit(1)


def plan(path: Path, overrides: Sequence[str] = (), preset: str = "auto") -> tuple[Path, list[Run]]:
    """Return the folder of a sweep's results, and its runs, seed by seed, with settings that are known to be valid.

    Args:
        path: the sweep file.
        overrides: `key=value`, for every run; `seeds=[...]` stands in for the file's.
        preset: where neither overrides nor file name one; auto: by the CUDA devices.

    Raises:
        UserError: a key or value is wrong; names the file and the field.
    """
    sweep = read_sweep(path)
    extra = dict(_split(override) for override in overrides)
    seed_text = extra.pop("seeds", str(sweep.seeds))
    seeds = [int(digits) for digits in re.findall(r"\d+", seed_text)]
    if not re.fullmatch(r"\[\d+(, ?\d+)*\]", seed_text) or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds = {seed_text}: write a list of different whole numbers, like seeds=[0,1]")
    preset = extra.get("preset") or str(sweep.settings.get("preset", preset))
    preset = choose_preset()[0] if preset == "auto" else preset
    if sweep.presets and preset not in sweep.presets:
        raise UserError(
            f"{path}: written for preset={' or '.join(sweep.presets)}, not {preset}: its settings are theirs"
        )
    name = path.stem if preset == "laptop" else f"{path.stem}-{preset}"
    shared = sweep.settings | (sweep.laptop if preset == "laptop" else {})
    if any("preset" in settings for settings in (sweep.laptop, *variants_of(sweep).values())):
        raise UserError(f"{path}: preset is one for all variants: put it among the settings, or on the command line")
    runs = []
    for variant, settings in variants_of(sweep).items():
        texts = {key: _text(value) for key, value in (shared | settings).items()} | extra | {"preset": preset}
        if decided := set(settings) & set(extra):
            raise UserError(f"{min(decided)} on the command line: {path} has it in its variants ({variant})")
        own = {"seed", "run_name", "resume", "resume_with_changes", "config"} & set(texts)
        if own:
            raise UserError(f"{path}: {min(own)} is not among the settings of a sweep, which sets it itself")
        arguments = [f"{key}={text}" for key, text in texts.items()]
        resolved = _resolve(sweep.script, arguments, f"{path}, {variant}")
        chosen = {key: resolved[key] for key in texts if is_setting(key)}
        minutes = sweep.minutes[variant] if isinstance(sweep.minutes, dict) else sweep.minutes
        for seed in seeds:
            folder = Path(resolved["runs_dir"]) / f"{name}-{variant}-seed{seed}"
            own_arguments = [f"seed={seed}", f"run_name={folder.name}", "resume=auto"]
            runs.append(Run(sweep.script, variant, seed, folder, [*arguments, *own_arguments], chosen, minutes))
    runs.sort(key=lambda run: seeds.index(run.seed))  # a sitting that ends early leaves whole seeds
    return Path("results") / name, runs


def read_sweep(path: Path) -> Sweep:
    """Return a sweep file.

    Raises:
        UserError: it is not there, or a field is wrong; names file and field.
    """
    try:
        sweep = Sweep.model_validate(read_yaml(path))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise UserError(f"{path}: {'; '.join(problems)}") from None
    names = variants_of(sweep)
    for name in names:
        if not re.fullmatch(r"[\w.,=+-]+", name):
            raise UserError(f"{path}: variants: {name!r} is to name a folder: use letters, digits and . , = + - _")
    if isinstance(sweep.minutes, dict) and set(sweep.minutes) != set(names):
        raise UserError(f"{path}: minutes: give one number, or one for each of {', '.join(names)}")
    return sweep


def variants_of(sweep: Sweep) -> Mapping[str, Settings]:
    """Return the settings of each variant by its name.

    >>> list(variants_of(Sweep(script="SFT_train.py", seeds=[0], minutes=1, grid={"a": [1e-5, 2], "b": [True]})))
    ['a=1e-05,b=true', 'a=2,b=true']
    """
    variants = dict(sweep.variants)
    for values in itertools.product(*sweep.grid.values()) if sweep.grid else ():
        point: Settings = dict(zip(sweep.grid, values, strict=True))
        variants[",".join(f"{key}={_text(value)}" for key, value in point.items())] = point
    return variants or {"default": {}}


def state_of(run: Run, results: Path) -> str:
    """Return `finished`, `to collect` (ended well, but its figures are not in the results), `interrupted` or `to do`.

    Raises:
        UserError: what stands there was run with other settings.
    """
    for row in read_table(results / "runs.csv"):
        if (row["variant"], row["seed"]) == (run.variant, str(run.seed)):
            if row["fingerprint"] != run.fingerprint:
                raise UserError(
                    f"{results / 'runs.csv'}: {run.variant}, seed {run.seed} was run with other settings (fingerprint "
                    f"{row['fingerprint']}, now {run.fingerprint}); remove the row, and {run.folder}, to run it again"
                )
            return "finished"
    if not (run.folder / "config.yaml").is_file():
        return "to do"
    saved = read_yaml(run.folder / "config.yaml")
    changes = describe_changes({key: saved.get(key) for key in run.settings}, run.settings)
    if changes:
        raise UserError(f"{run.folder} was run with other settings: {', '.join(changes)}; remove it to run it again")
    is_evaluated = run.script == "policy_evaluation.py" and bool(read_metrics(run.folder))
    return "to collect" if is_evaluated or (run.folder / "final").is_dir() else "interrupted"


def execute(runs: Sequence[Run], gpus: Sequence[str], take_in: Callable[[Run], None]) -> dict[Run, str]:
    """Run one at a time, or one at a time on each GPU, and take in those that end well.

    Whatever ends this before its time, the runs in progress get SIGTERM and save themselves before it returns.

    Returns:
        The last line that each run which failed has written.
    """
    waiting, failures = list(runs), {}
    slots: dict[str, tuple[Run, subprocess.Popen[bytes], float]] = {}
    try:
        while waiting or slots:
            for gpu in gpus or [""]:
                if gpu not in slots and waiting:
                    run = waiting.pop(0)
                    slots[gpu] = (run, _start(run, gpu), time.monotonic())
                    print(f"{len(runs) - len(waiting)} of {len(runs)}: {run.log}", flush=True)
            time.sleep(POLL_SECONDS)
            for gpu, (run, process, started) in list(slots.items()):
                if process.poll() is not None:
                    del slots[gpu]
                    last_line = _note_end(run, process, started)
                    if process.returncode == 0:
                        take_in(run)
                    else:
                        failures[run] = last_line
    finally:
        if slots:
            print("stopping: the runs in progress save themselves; a second signal stops them at once", flush=True)
            try:
                _stop([process for _, process, _ in slots.values()])
            except KeyboardInterrupt:
                _stop([process for _, process, _ in slots.values()])
            for run, process, started in slots.values():
                _note_end(run, process, started)
            print(f"to go on: uv run python sweep.py {shlex.join(sys.argv[1:])}", flush=True)
    return failures


def collect(run: Run, results: Path, order: Sequence[str], keep_weights: bool) -> None:
    """Bring a run's figures into the results; then remove its weights."""
    log = run.log.read_text(errors="replace") if run.log.exists() else ""
    wall_minutes = sum(map(float, re.findall(r"^sweep: .* after ([\d.]+) minutes$", log, re.MULTILINE)))
    names = {"variant": run.variant, "seed": run.seed, "fingerprint": run.fingerprint}
    row = collect_run(run.folder, results, names, wall_minutes, order)
    for name in () if keep_weights else ("final", "checkpoints"):
        shutil.rmtree(run.folder / name, ignore_errors=True)
    reward = row["last_answer_reward"]
    print(f"finished: {run.folder.name}, {wall_minutes:.1f} minutes, answer reward {reward}", flush=True)


def _start(run: Run, gpu: str) -> subprocess.Popen[bytes]:
    if run.script == "policy_evaluation.py":
        shutil.rmtree(run.folder, ignore_errors=True)  # an evaluation that was interrupted cannot be gone on with
    run.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(REPOSITORY / run.script), *run.arguments]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    is_resumed = (run.folder / "config.yaml").exists()  # else what the log says is of a run that was removed
    with run.log.open(
        "a" if is_resumed else "w"
    ) as log:  # in a session of its own, so that Ctrl-C reaches it once, from here
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def _note_end(run: Run, process: subprocess.Popen[bytes], started: float) -> str:
    """Write status and time into the log; return the last line that stood there before."""
    lines = [line.strip() for line in run.log.read_text(errors="replace").splitlines() if line.strip()]
    minutes = (time.monotonic() - started) / 60
    with run.log.open("a") as log:
        log.write(f"\nsweep: ended with status {process.returncode} after {minutes:.4f} minutes\n")
    return lines[-1] if lines else f"status {process.returncode}"


def _resolve(script: str, arguments: list[str], where: str) -> dict[str, Any]:
    schema, yaml_name = SCRIPTS[script]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the run itself says it
            return load_config(schema, REPOSITORY / yaml_name, arguments).model_dump(mode="json")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _split(override: str) -> tuple[str, str]:
    key, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"argument {override!r}: write key=value")
    return key, text


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    run_main(main)
