"""Typed run configuration: schema defaults -> YAML file -> preset -> `key=value` on the command line.

Each later source overrides the earlier ones, and the whole is validated once, at the end. A resumed run's own
configuration stands in for the YAML file. Validation never changes a value; sizes that follow from others are
properties. Every field carries its meaning and unit, which `--help` prints.
"""

import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_DATA = "arithmetic"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, the scheduler, a closed terminal
Beta = Annotated[float, Field(ge=0, lt=1)]


class UserError(ValueError):
    """A mistake a user can mend: shown as one line, without a traceback, with exit status 2."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run; a KeyboardInterrupt, so that no library takes it for an error of its own."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.status = 128 + signal_number


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, for a message of one line; its kind if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class RunConfig(BaseModel):
    """What training and evaluation share: model, devices, data, sampling, engine, records."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    preset: str = Field(
        "auto", description="block of the YAML file to apply; auto: laptop, one-gpu or two-gpu by the CUDA devices"
    )
    run_name: str = Field("", description="folder of the run under runs_dir; empty: script and time")
    runs_dir: str = Field("runs", description="folder that holds all runs")
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="seed of data order and of training samples; validation samples have one of their own",
    )

    model: str = Field(EMBEDDED_MODEL, description=f"{EMBEDDED_MODEL} (embedded), a folder, or a hub name")
    policy_device: str = Field(
        "cpu", pattern=r"^(cpu|cuda:\d+)$", description="torch device of the policy: cpu or cuda:N"
    )
    evaluator_device: str = Field(
        "cpu",
        pattern=r"^(cpu|cuda:0)$",
        description="device of vLLM: cpu or cuda:0 (vLLM takes the first visible GPU; order CUDA_VISIBLE_DEVICES)",
    )
    compute_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="autocast dtype of the policy; its weights stay float32"
    )
    engine_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="dtype of the vLLM engine's weights and cache"
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="auto: flash_attention_2 where installed, on CUDA and not in float32, else sdpa; with either, a "
        "prefix that rows share is computed once and without padding, eager is the plain computation",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward, to save memory")
    compile_policy: bool = Field(
        False, description="compile the policy's blocks for training (a slower first step; not measured on a GPU)"
    )

    prompt: str = Field("r1_zero", description="r1_zero, question_only, or the path of a template with {question}")
    reward: Literal["r1_zero", "question_only"] = Field("r1_zero", description="reward function")
    train_data: str = Field(
        EMBEDDED_DATA,
        description=f"{EMBEDDED_DATA} (embedded), a JSON/JSONL/Parquet file, or hub owner/name[/configuration]:split",
    )
    validation_data: str = Field(EMBEDDED_DATA, description="held-out data, named like train_data")
    arithmetic_terms: tuple[int, int] = Field(
        (2, 4), description="fewest and most terms of an embedded arithmetic question"
    )
    arithmetic_max_term: int = Field(20, ge=2, description="largest term of an embedded arithmetic question")
    num_eval_examples: int | Literal["all"] = Field(
        256, description="validation questions per evaluation, a fixed subset (count or all)"
    )

    sampling_temperature: float = Field(1.0, ge=0, description="softmax temperature (0: greedy)")
    sampling_top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling mass")
    sampling_min_tokens: int = Field(4, ge=0, description="tokens before which a response may not end")
    sampling_max_tokens: int = Field(1024, ge=1, description="tokens at which a response is cut")
    stop_string: str = Field("</answer>", description="text that ends a response and stays in it; empty: none")

    max_context_tokens: int = Field(2048, ge=8, description="longest prompt plus response, in tokens")
    gpu_memory_utilization: float = Field(0.85, gt=0, lt=1, description="share of its GPU that vLLM may take")
    engine_cache_gib: int = Field(1, ge=1, description="key-value cache of the CPU engine, in GiB")
    engine_eager: bool = Field(True, description="false: compile the engine (slower start, faster sampling)")
    max_sync_error: float = Field(
        1.1,
        gt=1,
        description="limit on exp(mean |engine - policy log-prob|) after a weight sync; 1.0001 suits float32",
    )
    num_sync_tokens: int = Field(16, ge=1, description="sampled tokens per probe prompt for that check")
    scoring_batch_size: int = Field(16, ge=1, description="responses per forward pass when scoring without gradients")

    max_rollout_seconds: float = Field(1800, gt=0, description="watchdog: weight sync, or sampling of a rollout batch")
    max_grade_seconds: float = Field(900, gt=0, description="watchdog: grading of a rollout batch")
    max_train_seconds: float = Field(
        1800, gt=0, description="watchdog: scoring of, or all optimizer steps on, one (rollout) batch"
    )
    max_evaluate_seconds: float = Field(3600, gt=0, description="watchdog: one evaluation")
    max_save_seconds: float = Field(900, gt=0, description="watchdog: writing of one checkpoint")

    wandb_mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online where an API key is set, else disabled"
    )
    wandb_project: str = Field("reasoning-from-scratch", description="wandb project")

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("yes, no, on, off, true and false are no numbers, and text only in quotes")
        return value

    @model_validator(mode="after")
    def _check_shared_fields(self) -> Self:
        fewest, most = self.arithmetic_terms
        if not 2 <= fewest <= most:
            raise ValueError(f"arithmetic_terms = {[fewest, most]}: give [fewest, most] with 2 <= fewest <= most")
        if self.sampling_min_tokens > self.sampling_max_tokens:
            raise ValueError(
                f"sampling_min_tokens = {self.sampling_min_tokens} exceeds "
                f"sampling_max_tokens = {self.sampling_max_tokens}: lower the first or raise the second"
            )
        if self.sampling_max_tokens >= self.max_context_tokens:
            raise ValueError(
                f"sampling_max_tokens = {self.sampling_max_tokens} leaves no room for a prompt in "
                f"max_context_tokens = {self.max_context_tokens}: lower the first or raise the second"
            )
        if self.num_sync_tokens >= self.max_context_tokens:
            raise ValueError(
                f"num_sync_tokens = {self.num_sync_tokens} leaves no room for a prompt in "
                f"max_context_tokens = {self.max_context_tokens}: lower the first or raise the second"
            )
        if isinstance(self.num_eval_examples, int) and self.num_eval_examples < 1:
            raise ValueError(f"num_eval_examples = {self.num_eval_examples}: must be at least 1, or all")
        return self

    def warnings(self) -> list[str]:
        """Return a sentence for each combination of settings that is allowed but seldom meant."""
        found = []
        if self.prompt in ("r1_zero", "question_only") and self.prompt != self.reward:
            found.append(f"prompt = {self.prompt} does not ask for the format that reward = {self.reward} wants")
        if self.train_data != EMBEDDED_DATA == self.validation_data:
            found.append(
                f"trained on {self.train_data}, but evaluated on embedded {EMBEDDED_DATA}: give validation_data"
            )
        return found

    @property
    def shares_gpu(self) -> bool:
        """Whether policy and vLLM live on the same GPU, so that the engine must sleep while training."""
        return self.policy_device == self.evaluator_device != "cpu"


class TrainConfig(RunConfig):
    """What both kinds of training share: batch, optimizer, evaluation interval."""

    train_batch_size: int = Field(32, ge=1, description="rows (examples or responses) per optimizer step")
    gradient_accumulation_steps: int = Field(
        8,
        ge=1,
        description="a microbatch (one forward and backward pass) holds at most train_batch_size / this many rows",
    )
    microbatch_tokens: int = Field(
        0,
        ge=0,
        description="and at most so many tokens, a prefix that rows share counted once, unless a single row has more "
        "(0: no limit); the gradient is that of the whole batch, however it is divided",
    )
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of AdamW")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW betas")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm above which gradients are scaled down")
    loss_scale: float = Field(
        65536.0,
        ge=1,
        description="with compute_dtype=float16 gradients are computed times this, so that small ones do not vanish; "
        "where they overflow the step's gradient is computed again with half of it",
    )
    eval_interval: int = Field(
        50, ge=1, description="steps between evaluations (also before the first and after the last)"
    )
    num_final_eval_examples: int | Literal["all"] = Field(
        "all", description="validation questions of the evaluation at the end, eval_all/* (count, at most all; or all)"
    )

    checkpoint_interval: int = Field(
        50, ge=1, description="steps between checkpoints, from which a run can be resumed (also after the last step)"
    )
    keep_last: int = Field(1, ge=1, description="checkpoints kept, the newest ones")
    keep_best: bool = Field(True, description="also keep the checkpoint with the best validation answer reward")
    resume: str = Field("", description="folder of a run to go on with; auto: run_name's, or the newest unfinished one")
    resume_with_changes: bool = Field(False, description="go on although settings differ from the run's own")

    @model_validator(mode="after")
    def _check_train_fields(self) -> Self:
        self._require_multiple("train_batch_size", "gradient_accumulation_steps")
        if isinstance(self.num_final_eval_examples, int) and self.num_final_eval_examples < 1:
            raise ValueError(f"num_final_eval_examples = {self.num_final_eval_examples}: must be at least 1, or all")
        return self

    def _require_multiple(self, name: str, divisor_name: str) -> None:
        value, divisor = getattr(self, name), getattr(self, divisor_name)
        if value % divisor:
            below = value // divisor * divisor
            near = " or ".join(f"{name} = {size}" for size in (below, below + divisor) if size > 0)
            keys = ("rollout_batch_size", "group_size", "train_batch_size", "gradient_accumulation_steps")
            others = [f"{key} = {getattr(self, key)}" for key in keys if key in type(self).model_fields]
            raise ValueError(
                f"{name} = {value} is not a multiple of {divisor_name} = {divisor}: {near} is ({', '.join(others)})"
            )

    def warnings(self) -> list[str]:
        """Return the shared warnings, and those of a best checkpoint hardly ever kept and a GPU hardly shared."""
        found = super().warnings()
        if self.shares_gpu and self.gpu_memory_utilization > 0.5:
            found.append(
                f"gpu_memory_utilization = {self.gpu_memory_utilization:g}: the policy, its gradients and AdamW's "
                "moments need room on the same GPU; 0.35 of 80 GB is enough for the engine"
            )
        shorter, longer = sorted((self.checkpoint_interval, self.eval_interval))
        if self.keep_best and longer % shorter:
            found.append(
                f"keep_best keeps only what is both saved and evaluated: of checkpoint_interval = "
                f"{self.checkpoint_interval} and eval_interval = {self.eval_interval} neither divides the other"
            )
        return found

    @property
    def microbatch_size(self) -> int:
        """Most rows per forward and backward pass."""
        return self.train_batch_size // self.gradient_accumulation_steps


class SFTConfig(TrainConfig):
    """Supervised fine-tuning (SFT_train.py)."""

    num_sft_examples: int | Literal["all"] = Field(
        "all", description="unique training examples (the assignment: 128, 256, 512, 1024, all)"
    )
    examples_seed: int | None = Field(None, ge=0, description="which examples num_sft_examples draws; null: by seed")
    arithmetic_corrupt_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the embedded training traces with a wrong last sum and answer (ground truths stay right)",
    )
    filter_correct: bool = Field(False, description="keep only traces that the reward function accepts")
    drop_long_examples: bool = Field(
        False, description="leave out (and count) examples over max_context_tokens instead of stopping"
    )
    num_epochs: float = Field(1.0, gt=0, description="passes over the training examples, if max_steps is 0")
    max_steps: int = Field(0, ge=0, description="optimizer steps; 0: as many as num_epochs asks for")
    normalize_constant: float = Field(1.0, gt=0, description="divisor of the summed token loss")
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="constant, or linear warm-up then cosine to a tenth"
    )
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="share of the steps spent warming up (cosine)")

    @model_validator(mode="after")
    def _check_sft_fields(self) -> Self:
        if isinstance(self.num_sft_examples, int) and self.num_sft_examples < 1:
            raise ValueError(f"num_sft_examples = {self.num_sft_examples}: must be at least 1, or all")
        return self

    def warnings(self) -> list[str]:
        """Return the shared warnings, and one for a share of traces that are not the embedded ones."""
        found = super().warnings()
        if self.arithmetic_corrupt_fraction and self.train_data != EMBEDDED_DATA:
            found.append(f"arithmetic_corrupt_fraction has no effect with train_data = {self.train_data}")
        return found


class RolloutConfig(TrainConfig):
    """What training on the policy's own graded responses shares: first policy, groups of responses."""

    warm_start: str = Field(
        "", description="preset of config.yaml whose SFT run gives the first policy (run first if absent); empty: none"
    )
    group_size: int = Field(8, ge=1, description="responses sampled per question")
    num_logged_groups: int = Field(2, ge=0, description="groups of rollouts written to samples/ per step")

    @model_validator(mode="after")
    def _check_rollout_fields(self) -> Self:
        if self.sampling_temperature == 0:
            raise ValueError(
                "sampling_temperature = 0 samples the same response to a question each time, so that nothing can be "
                "learnt: use a temperature above 0, 1 as a rule"
            )
        return self

    @property
    def num_questions_per_step(self) -> int:
        """Questions per rollout batch."""
        raise NotImplementedError


class ExpertIterationConfig(RolloutConfig):
    """Expert iteration: SFT on the policy's own correct responses (expert_iteration.py)."""

    n_ei_steps: int = Field(5, ge=1, description="expert iteration steps")
    ei_batch_size: int = Field(1024, ge=1, description="questions per expert iteration step (|D_b|)")
    ei_epochs: int = Field(1, ge=1, description="passes over the responses that a step keeps")
    keep_correct: Literal["distinct", "one"] = Field(
        "distinct", description="correct responses kept per question: all that differ in their tokens, or the first"
    )
    normalize_constant: float = Field(1.0, gt=0, description="divisor of the summed token loss")

    @property
    def num_questions_per_step(self) -> int:
        """Questions per rollout batch."""
        return self.ei_batch_size


class GRPOConfig(RolloutConfig):
    """Reinforcement learning with verified rewards (GRPO_train.py)."""

    n_grpo_steps: int = Field(200, ge=1, description="rollout batches")
    rollout_batch_size: int = Field(256, ge=1, description="responses sampled per step")
    epochs_per_rollout_batch: int = Field(1, ge=1, description="passes over each rollout batch")
    train_batch_size: int = Field(256, ge=1, description="responses per optimizer step")
    gradient_accumulation_steps: int = Field(
        128,
        ge=1,
        description="a microbatch (one forward and backward pass) holds at most train_batch_size / this many responses",
    )

    loss_type: Literal["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip"] = Field(
        "reinforce_with_baseline", description="policy-gradient loss (GRPO_helper.py)"
    )
    use_std_normalization: bool = Field(True, description="divide advantages by the std of their group")
    advantage_eps: float = Field(1e-6, gt=0, description="added to that std")
    cliprange: float = Field(0.2, gt=0, lt=1, description="clip range of the importance ratio (grpo_clip)")
    length_normalization: Literal["masked_mean", "masked_normalize", "token_mean"] = Field(
        "masked_mean",
        description="per response; by sampling_max_tokens (Dr. GRPO); over all tokens of the optimizer step (DAPO)",
    )
    mask_truncated_responses: bool = Field(False, description="leave responses cut at the length limit out of the loss")

    @model_validator(mode="after")
    def _check_grpo_fields(self) -> Self:
        self._require_multiple("rollout_batch_size", "group_size")
        self._require_multiple("rollout_batch_size", "train_batch_size")
        if self.train_batch_size < self.group_size:
            raise ValueError(
                f"train_batch_size = {self.train_batch_size} is smaller than group_size = {self.group_size}: "
                f"use train_batch_size = {self.group_size} or more"
            )
        if self.group_size == 1 and self.loss_type != "no_baseline":
            raise ValueError(
                f"group_size = 1 has no group mean to subtract: use group_size >= 2, or loss_type = no_baseline "
                f"instead of {self.loss_type}"
            )
        return self

    def warnings(self) -> list[str]:
        """Return the shared warnings, and those of settings that do not go with the loss."""
        found = super().warnings()
        if self.is_off_policy and self.loss_type in ("no_baseline", "reinforce_with_baseline"):
            found.append(
                f"several optimizer steps per rollout batch with loss_type = {self.loss_type}, which ignores that the "
                "policy has moved; grpo_clip corrects for it"
            )
        if not self.is_off_policy and self.loss_type == "grpo_clip":
            found.append("cliprange has no effect with one optimizer step per rollout batch: the ratio is always 1")
        if self.cliprange != type(self).model_fields["cliprange"].default and self.loss_type != "grpo_clip":
            found.append(f"cliprange = {self.cliprange:g} has no effect with loss_type = {self.loss_type}")
        if not self.samples_from_policy:
            found.append(
                f"sampling_temperature = {self.sampling_temperature:g}, sampling_top_p = {self.sampling_top_p:g}: "
                "responses come from another distribution than the policy that the gradient is of; "
                "rollout/log_prob_gap is left out"
            )
        return found

    @property
    def samples_from_policy(self) -> bool:
        """Whether responses are sampled from the policy's own distribution (but for sampling_min_tokens)."""
        return self.sampling_temperature == self.sampling_top_p == 1

    @property
    def num_questions_per_step(self) -> int:
        """Questions per rollout batch."""
        return self.rollout_batch_size // self.group_size

    @property
    def rollouts_prove_sync(self) -> bool:
        """Whether the engine's log-probs of its responses, but for the first tokens, are to be the policy's own."""
        return self.samples_from_policy and self.sampling_min_tokens < self.sampling_max_tokens

    @property
    def is_off_policy(self) -> bool:
        """Whether the policy moves while a rollout batch is trained on."""
        return self.epochs_per_rollout_batch > 1 or self.train_batch_size < self.rollout_batch_size


ConfigType = TypeVar("ConfigType", bound=RunConfig)


def is_due(step: int, interval: int, last_step: int) -> bool:
    """Whether something that is done every `interval` steps, and after the last, is done after this step."""
    return step % interval == 0 or step == last_step


def is_setting(key: str) -> bool:
    """Whether a key bears on what a run computes, and not only on its name, its start, its watchdogs or its log.

    >>> is_setting("seed"), is_setting("run_name"), is_setting("max_rollout_seconds"), is_setting("wandb_mode")
    (True, False, False, False)
    """
    return not re.fullmatch(r"run_name|runs_dir|resume|resume_with_changes|max_\w+_seconds|wandb_\w+", key)


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return `key old -> new` for each setting that differs between two resolved configurations.

    >>> describe_changes({"seed": 0, "run_name": "a"}, {"seed": 1, "run_name": "b"})
    ['seed 0 -> 1']
    """
    keys = [key for key in {**old, **new} if is_setting(key) and old.get(key) != new.get(key)]
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys]


def load_config(schema: type[ConfigType], yaml_path: str | Path, arguments: list[str]) -> ConfigType:
    """Return the validated configuration of a script.

    Args:
        schema: the typed configuration to fill.
        yaml_path: the script's YAML file; `config=path` among the arguments names another one.
        arguments: the command line after the script's name, each `key=value` (value in YAML syntax).

    Raises:
        UserError: an argument, key or value is wrong; names it, where it stands and what to do.

    With `resume`, the resolved configuration of that run stands in for the YAML file; see `resumed_config`.
    """
    if {"--help", "-h"} & set(arguments):
        print(help_text(schema, yaml_path))
        raise SystemExit(0)
    overrides = _parse_arguments(arguments, schema)
    if overrides.get("resume", "auto") not in ("", "auto"):
        return resumed_config(schema, Path(overrides["resume"]), overrides)
    yaml_path = Path(overrides.get("config", yaml_path))
    yaml_values = read_yaml(yaml_path)
    presets = yaml_values.pop("presets", None) or {}
    if not isinstance(presets, dict) or not all(isinstance(block, dict) for block in presets.values()):
        raise UserError(f"{yaml_path}: presets must hold one block of `key: value` lines per name")
    preset = str(overrides.get("preset", yaml_values.get("preset", "auto")))
    if preset == "auto":
        preset, reason = choose_preset()
        print(f"preset: {preset} ({reason})")
    elif not presets:
        raise UserError(f"preset = {preset}: {yaml_path} has no presets; leave preset out, or add the block")
    if presets and preset not in presets:
        raise UserError(f"preset = {preset}: {yaml_path} has {', '.join(map(str, presets))}")
    preset_values = presets.get(preset, {})

    config = _validate(
        schema,
        {
            str(yaml_path): yaml_values,
            f"{yaml_path}, preset {preset}": preset_values,
            "command line": {key: value for key, value in overrides.items() if key != "config"},
        },
        {"preset": preset, "resume": ""},
    )
    if overrides.get("resume") == "auto":
        folder = newest_unfinished_run(schema, config)
        if folder is not None:
            return resumed_config(schema, folder, overrides)
        print("resume = auto: there is no unfinished run with a checkpoint, so that this is a new one")
    for warning in config.warnings():
        print(f"warning: {warning}")
    return config


def resumed_config(schema: type[ConfigType], folder: Path, overrides: Mapping[str, Any]) -> ConfigType:
    """Return the configuration that a run's folder holds, with the changes of the command line if they are allowed.

    Raises:
        UserError: there is no such run, another configuration file is named, or settings differ and
            `resume_with_changes` is not true; lists them.
    """
    if "config" in overrides:
        raise UserError(
            f"config = {overrides['config']}: {folder} goes on with its own config.yaml; leave config out, and name "
            "the keys that are to change"
        )
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"resume = {folder}: {path} does not exist; name the folder of a run, or use resume=auto")
    saved = read_yaml(path)
    if overrides.get("preset", "auto") not in ("auto", saved.get("preset")):
        raise UserError(
            f"preset = {overrides['preset']}: {folder} was started with preset {saved.get('preset')}, whose values it "
            "keeps; leave preset out, and name the keys that are to change"
        )
    overrides = {key: value for key, value in overrides.items() if key != "preset"}
    fixed = {"run_name": folder.name, "runs_dir": str(folder.parent), "resume": str(folder)}
    config = _validate(schema, {str(path): saved, "command line": overrides}, fixed)
    changes = describe_changes(saved, config.model_dump(mode="json"))
    if changes and not overrides.get("resume_with_changes"):
        raise UserError(
            f"resume = {folder}: settings differ from the run's own: {', '.join(changes)}; leave them out, or accept "
            "them with resume_with_changes=true"
        )
    print(f"settings of {path}{', changed: ' if changes else ''}{', '.join(changes)}")
    return config


def newest_unfinished_run(schema: type[RunConfig], config: RunConfig) -> Path | None:
    """Return the folder that `resume=auto` means: run_name's if there is one, else the newest unfinished run."""
    if config.run_name:
        folder = Path(config.runs_dir) / config.run_name
        return folder if (folder / "config.yaml").is_file() else None
    unfinished = [
        path.parent
        for path in Path(config.runs_dir).glob("*/config.yaml")
        if (path.parent / "checkpoints").is_dir()
        and (path.parent / "lock").is_file()
        and not (path.parent / "final").is_dir()
    ]
    own = [folder for folder in unfinished if _is_readable(schema, folder / "config.yaml")]
    # the lock is written whenever a process begins or goes on with a run
    return max(own, key=lambda folder: (folder / "lock").stat().st_mtime, default=None)


def choose_preset() -> tuple[str, str]:
    """Return the preset for this machine and the reason, without starting a CUDA context."""
    import torch

    num_devices = torch.cuda.device_count()
    preset = ("laptop", "one-gpu", "two-gpu")[min(num_devices, 2)]
    return preset, f"{num_devices} CUDA device{'s' * (num_devices != 1)} present"


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UserError: the file is missing, is not YAML (names the line) or is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config = {path}: {error.strerror or error}; name a YAML file that exists") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines at the top level, found {type(values).__name__}")
    return values


def help_text(schema: type[RunConfig], yaml_path: str | Path) -> str:
    """Return every key of a schema with its default, meaning and unit."""
    script = Path(sys.argv[0]).name
    lines = [
        f"usage: uv run python {script} [key=value ...]",
        f"Values come from the schema's defaults, then {Path(yaml_path).name}, then its preset, then the command line.",
        "",
        f"  config={Path(yaml_path).name}",
        "      the YAML file to read",
    ]
    for name, field in schema.model_fields.items():
        default = yaml.safe_dump(field.default, default_flow_style=True).strip().removesuffix("\n...")
        if isinstance(field.default, tuple):
            default = str(list(field.default))
        lines += [f"  {name}={default}", f"      {field.description}"]
    return "\n".join(lines)


def run_main(main: Callable[[list[str]], None]) -> None:
    """Run a script's `main(arguments)`: a UserError becomes one line and status 2, a signal 128 and its number."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise Stopped(signal_number)

    previous_handlers = handle_signals(stop)
    try:
        main(sys.argv[1:])
    except UserError as error:
        _say(f"error: {' '.join(str(error).split())}")
        sys.exit(2)
    except Stopped as stopped:
        _say(f"stopped by {stopped}")
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        _say("stopped by Ctrl-C")
        sys.exit(130)
    finally:
        restore_handlers(previous_handlers)


def _say(text: str) -> None:
    """Print a last line to stderr, if anybody is left to read it: a closed terminal is no error of its own."""
    try:
        print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()
    except OSError:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # else the interpreter's exit status is 120


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Handle the signals that ask a run to stop, those excepted that are ignored (as nohup does); return what did."""
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in handled}


def restore_handlers(previous: Mapping[int, Any]) -> None:
    """Undo what `handle_signals` did."""
    for number, handler in previous.items():
        signal.signal(number, handler)


def _validate(
    schema: type[ConfigType], layers: Mapping[str, Mapping[str, Any]], fixed: Mapping[str, Any]
) -> ConfigType:
    """Return the configuration that layers give, each named by where it stands, the later ones overriding."""
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, values in layers.items():
        merged |= values
        sources |= dict.fromkeys(values, source)
    try:
        return schema.model_validate(merged | dict(fixed))
    except ValidationError as error:
        raise UserError(_describe(error, schema, sources)) from None


def _is_readable(schema: type[RunConfig], path: Path) -> bool:
    try:
        schema.model_validate(read_yaml(path))
    except (UserError, ValidationError):
        return False
    return True


def _parse_arguments(arguments: list[str], schema: type[RunConfig]) -> dict[str, Any]:
    text_keys = {"config"} | {name for name, field in schema.model_fields.items() if field.annotation is str}
    overrides: dict[str, Any] = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator or not key.isidentifier():
            raise UserError(f"argument {argument!r}: write key=value; --help lists the keys")
        if key in overrides:
            raise UserError(f"{key} is given twice on the command line: keep one")
        try:
            is_text = key in text_keys or not text or re.fullmatch(r"0\d+", text)  # to YAML 010 is 8
            overrides[key] = text if is_text else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):  # ValueError: what looks like a date and is none
            overrides[key] = text
    return overrides


def _describe(error: ValidationError, schema: type[RunConfig], sources: dict[str, str]) -> str:
    problems: dict[str, str] = {}
    for item in error.errors():
        if not item["loc"]:
            problems[item["msg"]] = item["msg"].removeprefix("Value error, ")
            continue
        key = str(item["loc"][0])
        where = f" ({sources[key]})" if key in sources else ""
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, schema.model_fields, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]}?" if near else "--help lists the keys"
            problems[key] = f"unknown key {key}{where}: {mend}"
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            previous = f"{problems[key]}, or " if key in problems else f"{key} = {item['input']!r}{where}: "
            problems[key] = previous + message
    return "; ".join(problems.values())
