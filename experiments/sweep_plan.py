"""What a sweep file asks for: its variants and seeds, as runs of a script with valid settings.

A sweep file names a script, seeds, settings of all runs, and variants. Each variant with each seed is one run.

A fingerprint tells what a committed row was computed with. Its first half is a hash of script and settings, its second
one of all values that differ from the schema's defaults: the preset's, and those of the warm start's preset. Rows of
before the second half was there have the first alone.
"""

import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from plainrl.changes import is_setting, with_defaults
from plainrl.cli import EVALUATION_SCRIPT, PROGRAMS, read_yaml, resolve
from plainrl.config import RunConfig, SFTConfig
from plainrl.devices import choose_preset
from plainrl.help import blocks_of
from plainrl.records import UserError
from plainrl.shared_config import DTYPE_KEYS

REPOSITORY = Path(__file__).parent.parent
WARM_START_YAML = REPOSITORY / PROGRAMS["SFT_train.py"][1]  # a warm start is a run of SFT
KEPT_WEIGHTS = Literal["none", "last", "best", "all"]
SET_BY_THE_SWEEP = {"seed", "run_name", "resume", "resume_with_changes", "config"}
Scalar = bool | int | float | str | None
Settings = dict[str, Scalar | list[Scalar] | dict[str, Scalar]]


SCRIPTS = {  # name -> command. The names are part of every committed fingerprint: keep them, wherever the script moves
    "SFT_train.py": "SFT_train.py",
    "GRPO_train.py": "GRPO_train.py",
    "expert_iteration.py": "-m experiments.expert_iteration",
    "DPO_train.py": "-m supplement.DPO_train",
    EVALUATION_SCRIPT: EVALUATION_SCRIPT,
}


def _all_different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed stands there twice")
    return seeds


class Sweep(BaseModel):
    """A sweep file. Its variants are `variants` and, beside them, every point of `grid`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    script: Literal[tuple(SCRIPTS)] = Field(description="the script to run")  # pyright: ignore[reportInvalidTypeForm]
    presets: list[str] = Field([], description="the presets it is written for; empty: all")
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1), AfterValidator(_all_different)] = Field(
        description="the seeds of each variant"
    )
    minutes: float | dict[str, float] = Field(description="estimate per run on the laptop preset, or one per variant")
    keep_weights: KEPT_WEIGHTS = Field(
        "none",
        description="weights of a finished run that stay. none. last: final/. best: the checkpoint of the best "
        "evaluation, as best/. all: final/ and checkpoints/",
    )
    settings: Settings = Field({}, description="settings of all runs")
    laptop: Settings = Field({}, description="settings of all runs, with the laptop preset alone")
    variants: dict[str, Settings] = Field({}, description="name -> settings of the variant")
    grid: dict[str, Annotated[list[Scalar], Field(min_length=1)]] = Field(
        {}, description="key -> values: every combination is a variant, named like `a=1,b=2`"
    )


@dataclass(frozen=True, eq=False)
class Run:
    """One variant with one seed.

    `settings` are its overrides as the script's schema reads them, `values` all that differ from the defaults.
    """

    script: str
    variant: str
    seed: int
    folder: Path
    arguments: Sequence[str]
    settings: Mapping[str, Any]
    values: Mapping[str, Any]
    minutes: float
    keep_weights: str

    @property
    def fingerprint(self) -> str:
        """Two hashes, see the module's docstring. Committed results carry them."""
        from plainrl.checkpoint import fingerprint  # here, because it imports torch

        of_settings = fingerprint([self.script, *sorted(self.settings.items())])[:12]
        return f"{of_settings}-{fingerprint(sorted(self.values.items()))[:12]}"

    def describe_difference(self, committed: str) -> str | None:
        """Return what a row with another fingerprint was run with; None if it was run with the same."""
        if committed in (self.fingerprint, self.fingerprint.partition("-")[0]):
            return None
        is_of_preset = committed.partition("-")[0] == self.fingerprint.partition("-")[0]
        changed = "other values of its preset, or of a default (compute_dtype is the processor's)"
        return changed if is_of_preset else "other settings"

    @property
    def log(self) -> Path:
        """The file that receives its output."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def command(self) -> list[str]:
        """The command that starts it."""
        *options, target = SCRIPTS[self.script].split()
        return [sys.executable, *options, target if options else str(REPOSITORY / target), *self.arguments]


def plan(
    path: Path, overrides: Sequence[str] = (), preset: str = "auto", on_one_gpu: bool = False
) -> tuple[Path, list[Run]]:
    """Return the folder of a sweep's results, and its runs, seed by seed.

    Args:
        path: the sweep file.
        overrides: `key=value`, for every run; `seeds=[...]` replaces the seeds of the file.
        preset: used where neither overrides nor the file name one; auto chooses by the CUDA devices.
        on_one_gpu: whether each run has one GPU to itself, whatever there is beside it. auto looks at the first.

    Raises:
        UserError: a key or value is wrong; names the file and the field.
    """
    sweep = read_sweep(path)
    extra = dict(_split(override) for override in overrides)
    seeds = _parse_seeds(extra.pop("seeds", str(sweep.seeds)))
    keep_weights = extra.pop("keep_weights", sweep.keep_weights)
    if keep_weights not in get_args(KEPT_WEIGHTS):
        raise UserError(f"keep_weights = {keep_weights}: use one of {', '.join(get_args(KEPT_WEIGHTS))}")
    preset = extra.get("preset") or str(sweep.settings.get("preset", preset))
    if preset == "auto":
        preset = choose_preset()[0]
        preset = "one-gpu" if on_one_gpu and preset != "small-gpu" else preset
    if sweep.presets and preset not in sweep.presets:
        raise UserError(f"{path}: its settings are for preset={' or '.join(sweep.presets)}, not for preset={preset}")
    if any("preset" in settings for settings in (sweep.laptop, *variants_of(sweep).values())):
        raise UserError(f"{path}: all variants share one preset: put it under settings, or on the command line")
    name = path.stem if preset == "laptop" else f"{path.stem}-{preset}"
    shared = sweep.settings | (sweep.laptop if preset == "laptop" else {})
    runs = []
    for variant, settings in variants_of(sweep).items():
        texts = {key: _text(value) for key, value in (shared | settings).items()} | extra | {"preset": preset}
        _check_keys(path, variant, settings, extra, texts)
        arguments = [f"{key}={text}" for key, text in texts.items()]
        resolved = _resolve(sweep.script, arguments, f"{path}, {variant}")
        chosen = {key: resolved[key] for key in texts if is_setting(key)}
        values = _other_than_defaults(sweep.script, resolved)
        minutes = sweep.minutes[variant] if isinstance(sweep.minutes, dict) else sweep.minutes
        for seed in seeds:
            folder = Path(resolved["runs_dir"]) / f"{name}-{variant}-seed{seed}"
            own_arguments = [f"seed={seed}", f"run_name={folder.name}"]
            own_arguments += ["resume=auto"] if sweep.script != EVALUATION_SCRIPT else []  # it cannot go on
            arguments_of_run = [*arguments, *own_arguments]
            runs.append(
                Run(sweep.script, variant, seed, folder, arguments_of_run, chosen, values, minutes, keep_weights)
            )
    runs.sort(key=lambda run: seeds.index(run.seed))  # a session that ends early leaves whole seeds
    return Path("results") / name, runs


def read_sweep(path: Path) -> Sweep:
    """Return a sweep file.

    Raises:
        UserError: it does not exist, or a field is wrong; names file and field.
    """
    try:
        sweep = Sweep.model_validate(read_yaml(path))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise UserError(f"{path}: {'; '.join(problems)}") from None
    names = variants_of(sweep)
    for name in names:
        if not re.fullmatch(r"[\w.,=+-]+", name):
            where, how = "variants", "use letters, digits and . , = + - _"
            if name not in sweep.variants:
                where, how = "grid", "write it under variants, with a name of your own"
            raise UserError(f"{path}: {where}: {name!r} must name a folder: {how}")
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


def defaults_of(schema: type[RunConfig]) -> dict[str, Any]:
    """Return the defaults that fingerprints leave out: the schema's, on a processor that is fast in 16 bits.

    On another one `auto` gives float32. Its runs have other fingerprints, so that no sweep mixes the two.
    """
    return with_defaults(dict.fromkeys(DTYPE_KEYS, "bfloat16"), schema)


def _check_keys(
    path: Path, variant: str, settings: Settings, extra: Mapping[str, str], texts: Mapping[str, str]
) -> None:
    """Raise a UserError if the command line overrides a variant's own key, or a key belongs to the sweep itself."""
    if overridden := set(settings) & set(extra):
        key = min(overridden)
        raise UserError(f"{key} on the command line: {path} sets it in its variants ({variant}); leave it out")
    if own := SET_BY_THE_SWEEP & set(texts):
        raise UserError(f"{path}: {min(own)} must not be a setting of a sweep: the sweep sets it for each run")


def _parse_seeds(text: str) -> list[int]:
    seeds = [int(digits) for digits in re.findall(r"\d+", text)]
    if not re.fullmatch(r"\[\d+(, ?\d+)*\]", text) or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds = {text}: write a list of different whole numbers, like seeds=[0,1]")
    return seeds


def _resolve(script: str, arguments: list[str], where: str) -> dict[str, Any]:
    """Return the whole configuration that a run will have."""
    try:
        schema, yaml_path = PROGRAMS[SCRIPTS[script]]
        config = resolve(schema, REPOSITORY / yaml_path, arguments).config
        return config.model_dump(mode="json")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _other_than_defaults(script: str, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run computes with beside the defaults, so that a new key with its default changes nothing."""

    def differing(schema: type[RunConfig], values: Mapping[str, Any]) -> dict[str, Any]:
        defaults = defaults_of(schema)
        return {key: value for key, value in values.items() if key != "seed" and defaults[key] != value}

    found = differing(PROGRAMS[SCRIPTS[script]][0], {key: value for key, value in resolved.items() if is_setting(key)})
    warm_start = resolved.get("warm_start")
    if warm_start in blocks_of(read_yaml(WARM_START_YAML), "presets", WARM_START_YAML):
        config = resolve(SFTConfig, WARM_START_YAML, [f"preset={warm_start}"]).config.model_dump(mode="json")
        own = {key: value for key, value in config.items() if is_setting(key) and key not in DTYPE_KEYS}
        found["warm_start"] = differing(SFTConfig, own)  # its dtypes are the run's
    return found


def _split(override: str) -> tuple[str, str]:
    key, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"argument {override!r}: write key=value")
    return key, text


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
