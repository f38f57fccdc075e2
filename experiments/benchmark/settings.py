"""The keys of the benchmark, and the settings that make both sides do the same work."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from plainrl.cli import load_config
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.data import load_sft_examples, load_validation_set
from plainrl.records import Example, UserError
from plainrl.shared_config import EMBEDDED_DATA

OTHER_IN_SFT = {"train_batch_size", "length_normalization"}  # keys that have another meaning in SFT
OWN_DATA = {"train_data", "validation_data", "extra_validation_data", "validation_fraction"}
REPOSITORY = Path(__file__).parent.parent.parent
NUM_PROBES = 8  # validation questions that GRPO_train.py is given: it checks the weight sync on them


class BenchmarkConfig(GRPOConfig):
    """The keys of GRPO_train.py, which set the size of a step, and those of the benchmark."""

    num_pairs: int = Field(3, ge=1, description="turns of each side")
    num_measured_steps: int = Field(2, ge=1, description="timed SFT steps per turn; a figure is their median")
    num_grpo_steps: int = Field(1, ge=1, description="timed GRPO steps per turn; a figure is their median")
    sft_batch_size: int = Field(32, ge=1, description="examples per SFT step")
    num_logprob_questions: int = Field(8, ge=1, description="questions of the logprob benchmark, group_size each")
    trl_sft_microbatch: int = Field(8, ge=1, description="examples per forward pass of TRL's SFTTrainer")
    trl_grpo_microbatch: int = Field(8, ge=1, description="responses per forward pass of TRL's GRPOTrainer")
    results_dir: str = Field(
        "", description="folder of the results; empty: results/benchmark, with -PRESET for other presets than laptop"
    )
    given: list[str] = Field([], description="the keys on the command line; the benchmark fills it in")


def refuse_foreign_keys(arguments: Sequence[str]) -> None:
    """Raise a UserError for keys of GRPO_train.py that a benchmark has no use for."""
    for key in (argument.partition("=")[0] for argument in arguments):
        if key in OWN_DATA:
            raise UserError(f"{key}: the benchmark has data of its own, so that runs compare; leave it out")
        if key == "config":
            raise UserError(f"{key}: a benchmark takes single keys alone; leave it out, and write them as key=value")
        if key == "resume":
            raise UserError(f"{key}: a benchmark is not gone on with; start it again")


def sft_settings(config: BenchmarkConfig) -> SFTConfig:
    """Return the settings of SFT_train.py for the preset, with the keys that were given and our batch size."""
    arguments = [f"preset={config.preset}", f"train_data={EMBEDDED_DATA}", "keep_best=false"]
    settings = load_config(SFTConfig, REPOSITORY / "config.yaml", arguments)
    given = [name for name in config.given if name in SFTConfig.model_fields.keys() - OTHER_IN_SFT]
    update = {name: getattr(config, name) for name in ("model", *given)} | {
        "train_batch_size": config.sft_batch_size,
        "max_context_tokens": config.max_context_tokens,
    }
    return settings.model_copy(update=update)


def sft_examples(settings: SFTConfig) -> list[Example]:
    """Return the worked traces of one step."""
    return load_sft_examples(settings)[: settings.train_batch_size]


def exact_length(config: BenchmarkConfig) -> dict[str, Any]:
    """Return the settings that make every response as long as allowed, because TRL knows no stop string."""
    return {"stop_string": "", "sampling_min_tokens": config.sampling_max_tokens}


def grpo_settings(config: BenchmarkConfig, folder: Path) -> BenchmarkConfig:
    """Return the settings of GRPO_train.py for a run in a folder, with as little evaluation as possible."""
    probes = folder / "probes.jsonl"
    rows = [{"problem": e.question, "answer": e.ground_truth} for e in load_validation_set(config)[:NUM_PROBES]]
    probes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    update = exact_length(config) | {
        "n_grpo_steps": 1 + config.num_grpo_steps,
        "validation_data": str(probes),
        "num_eval_examples": "all",
        "eval_interval": 1000,
        "checkpoint_interval": 1000,
        "runs_dir": str(folder),
        "run_name": "grpo",
        "warm_start": "",
        "wandb_mode": "disabled",
    }
    return config.model_copy(update=update)
