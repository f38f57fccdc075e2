"""The keys that all scripts or all training share. plainrl/config.py has the rest, and says how the schema is used."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from plainrl.lookup import TableOf
from plainrl.processor import computes_fast_in_16_bits, fast_dtype
from plainrl.reward_names import REWARD_FUNCTIONS, check_names, find_reward

if TYPE_CHECKING:
    from plainrl.grading.rewards import Reward

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_DATA = "arithmetic"  # plainrl/sources.py says what may follow it
EVAL_SCORE = "eval/answer_reward"
LEAST_TEMPERATURE = 0.01  # vLLM raises a lower one to this
MOST_EVAL_SAMPLES = 1000  # of more, the numbers of subsets exceed what a float holds
MOST_NAME_BYTES = 200  # a file system takes 255, and names of other files begin with a run's
DTYPE_KEYS = {"compute_dtype": "policy_device", "engine_dtype": "evaluator_device"}  # each with its device
Seconds = Annotated[float, Field(gt=0, le=1e8)]  # three years at most: timers cannot count much further
OPTIMIZERS = TableOf("plainrl.optimizers", "OPTIMIZERS")
Beta = Annotated[float, Field(ge=0, lt=1)]
SWITCHED_KEYS = {  # key -> keys that have no effect without it
    "lora_rank": ("lora_alpha",),
    "use_std_normalization": ("advantage_eps",),
    "dynamic_sampling": ("max_resampling_rounds",),
    "drop_solved_questions": ("solved_pass_rate", "solved_visits"),
    "kl_coefficient": ("kl_estimator",),
}


def is_embedded(source: str) -> bool:
    """Return whether a source of data is the embedded arithmetic, with a number of terms of its own or without."""
    return source.partition(":")[0] == EMBEDDED_DATA


def validation_source(settings: Mapping[str, Any]) -> str:
    """Return where the validation questions of a run are from; an empty text if it has none.

    >>> validation_source({"train_data": "a.jsonl", "validation_data": "b.jsonl"})
    'b.jsonl'
    >>> validation_source({"train_data": "a.jsonl", "validation_data": "b.jsonl", "validation_fraction": 0.1})
    '10 % of a.jsonl'
    """
    if share := settings.get("validation_fraction"):
        return f"{100 * share:g} % of {settings.get('train_data')}"  # then validation_data is not read
    return str(settings.get("validation_data", ""))


class RunConfig(BaseModel):
    """The keys that training and evaluation share: model, devices, data, sampling, engine, records."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    preset: str = Field("auto", description="preset of the YAML file to apply (auto: by CUDA devices and their memory)")
    run_name: str = Field("", description="folder of the run under runs_dir (empty: script and time)")
    runs_dir: str = Field("runs", description="folder that holds all runs")
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="seed of the data order and of training samples. Validation samples have a fixed seed",
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
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        validate_default=True,
        description="dtype in which the policy computes. Weights that are trained are kept in float32. auto: bfloat16, "
        "on a CPU without AVX-512 float32",
    )
    engine_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", validate_default=True, description="dtype of the vLLM engine's weights and cache. auto: likewise"
    )
    float32_output_layer: bool = Field(
        False,
        description="compute logits in float32, in policy and engine, so that their log-probs come closer together. It "
        "costs time and memory. docs/log.md has what one sample showed",
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="auto: flash_attention_2 if it is installed, on CUDA and not in float32, else sdpa. Both compute "
        "a prefix that rows share once, without padding. eager: the plain computation",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward, which saves memory")
    compile_policy: bool = Field(
        False, description="compile the policy's blocks and scores for training. The first step is slower"
    )

    prompt: str = Field(
        "r1_zero", description="r1_zero, question_only, alpaca, zero_shot, or the path of a template with {question}"
    )
    fill_prompts: bool = Field(
        False,
        description="put the prompts of {prompt, response} records into the template, too. They are instructions then, "
        "and not written out already",
    )
    reward: str | tuple[str, ...] = Field(
        "r1_zero",
        description="reward function: a name in REWARD_FUNCTIONS, or your own as file.py:function. A weighted sum of "
        "several is written as r1_zero*0.9+file.py:function*0.1, or as a list",
    )
    train_data: str = Field(
        EMBEDDED_DATA,
        description=f"{EMBEDDED_DATA} (embedded; {EMBEDDED_DATA}:4 or {EMBEDDED_DATA}:2-6 gives the number of terms), "
        "a JSON, JSONL, CSV or Parquet file, or hub owner/name[/configuration]:split",
    )
    validation_data: str = Field(EMBEDDED_DATA, description="held-out data, named like train_data")
    extra_validation_data: dict[str, str] = Field(
        {},
        description="further held-out data by name, such as {gsm8k: test.jsonl}. Each set has its own metrics, "
        "eval/NAME/*, on as many questions",
    )
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of train_data's questions to hold out instead of validation_data (0: none)"
    )
    validation_seed: int = Field(0, ge=0, description="seed that draws validation_fraction's questions")
    question_field: str = Field("", description="field of the data that holds the question (empty: by its layout)")
    answer_field: str = Field("", description="field that holds the right answer (empty: by its layout)")
    trace_field: str = Field("", description="field that holds a worked response for SFT (empty: by its layout)")
    arithmetic_terms: tuple[int, int] = Field(
        (2, 4), description="fewest and most terms of an embedded arithmetic question"
    )
    arithmetic_max_term: int = Field(20, ge=2, description="largest term of an embedded arithmetic question")
    num_eval_examples: int | Literal["all"] = Field(
        256, description="validation questions per evaluation, a fixed subset (a count, or all)"
    )
    num_entropy_responses: int | Literal["all"] = Field(
        256, description="responses of an evaluation whose token entropy is computed, a fixed subset (a count, or all)"
    )

    sampling_temperature: float = Field(
        1.0, ge=0, le=2, description="softmax temperature, by which logits are divided (0: greedy)"
    )
    sampling_top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling mass")
    sampling_min_tokens: int = Field(4, ge=0, description="tokens before which a response cannot end")
    sampling_max_tokens: int = Field(1024, ge=1, description="tokens at which a response is cut")
    stop_string: str = Field("</answer>", description="text that ends a response and stays in it (empty: none)")

    max_context_tokens: int = Field(2048, ge=8, description="longest prompt plus response, in tokens")
    drop_long_examples: bool = Field(
        False, description="leave out and count examples over max_context_tokens, instead of stopping"
    )
    gpu_memory_utilization: float = Field(0.85, gt=0, lt=1, description="share of its GPU that vLLM may take")
    engine_cache_gib: int = Field(1, ge=1, description="key-value cache of the CPU engine, in GiB")
    engine_eager: bool = Field(True, description="false: compile the engine, which starts slower and samples faster")
    engine_tensor_parallel: int = Field(
        1, ge=1, description="ranks of torchrun that share a vLLM engine, for a model that one GPU cannot hold"
    )
    num_replicas: int = Field(
        1,
        ge=1,
        description="copies of the policy among the ranks of torchrun, each divided over its part of them. With one "
        "copy per node, only gradients cross the network (1: divided over all)",
    )
    max_sync_error: float = Field(
        1.1,
        gt=1,
        description="limit on exp(mean |engine - policy log-prob|) after a weight sync. 1.0001 suits float32",
    )
    num_sync_tokens: int = Field(16, ge=1, description="sampled tokens per probe prompt, to check the weight sync")
    scoring_batch_size: int = Field(16, ge=1, description="responses per forward pass when scoring without gradients")

    max_rollout_seconds: Seconds = Field(1800, description="limit for a weight sync or a rollout phase, in seconds")
    max_grade_seconds: Seconds = Field(900, description="limit for the grading of a rollout batch, in seconds")
    max_reward_seconds: Seconds = Field(
        30, description="limit for one call of a reward function of your own, in seconds"
    )
    max_train_seconds: Seconds = Field(
        1800, description="limit for scoring one batch, or for all optimizer steps on it, in seconds"
    )
    max_evaluate_seconds: Seconds = Field(3600, description="limit for one evaluation, in seconds")
    max_save_seconds: Seconds = Field(900, description="limit for writing one checkpoint, in seconds")

    wandb_mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online if an API key is set, else disabled"
    )
    wandb_project: str = Field("plainrl", description="wandb project")

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_another_kind(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        takes_bool = bool in (annotation, *get_args(annotation)) or get_origin(annotation) is Literal
        if isinstance(value, bool) and not takes_bool:
            raise ValueError("true and false are not numbers, and they are text only in quotes")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("the character 0 can stand in no file and in no name: remove it")
        return value

    @field_validator("compute_dtype", "engine_dtype")
    @classmethod
    def _choose_dtype(cls, value: str, info: ValidationInfo) -> str:
        device = info.data.get(DTYPE_KEYS[str(info.field_name)], "cpu")
        return fast_dtype(device) if value == "auto" else value

    @field_validator("run_name")
    @classmethod
    def _check_run_name(cls, value: str) -> str:
        if "/" in value or value in (".", ".."):
            raise ValueError("the run's folder lies in runs_dir itself: leave / and . out, and set runs_dir if needed")
        if (num_bytes := len(os.fsencode(value))) > MOST_NAME_BYTES:
            raise ValueError(f"{num_bytes} bytes are too many for the name of a folder: use at most {MOST_NAME_BYTES}")
        return value

    @field_validator("extra_validation_data")
    @classmethod
    def _check_set_names(cls, value: dict[str, str]) -> dict[str, str]:
        if wrong := [name for name in value if not re.fullmatch(r"[\w.-]*[A-Za-z][\w.-]*", name)]:
            raise ValueError(f"extra_validation_data = {value}: call {wrong[0]!r} by letters, digits, ., _ and -")
        return value

    @field_validator("reward")
    @classmethod
    def _check_reward(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        check_names(value)
        return value

    @field_validator("sampling_temperature", "eval_sampling_temperature", check_fields=False)
    @classmethod
    def _check_temperature(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < LEAST_TEMPERATURE:
            raise ValueError(
                f"vLLM would take {LEAST_TEMPERATURE} instead; use that or more, or 0 for the likeliest token"
            )
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
        for name in ("sampling_max_tokens", "num_sync_tokens"):
            if (num_tokens := getattr(self, name)) >= self.max_context_tokens:
                raise ValueError(
                    f"{name} = {num_tokens} leaves no tokens for a prompt in max_context_tokens = "
                    f"{self.max_context_tokens}: lower the first or raise the second"
                )
        self._require_count("num_eval_examples")
        self._require_count("num_entropy_responses", least=0)
        return self

    def warnings(self) -> list[str]:
        """Return a sentence for each combination of settings that is allowed but rarely intended."""
        found = []
        asked_by = {reward.prompt for reward in REWARD_FUNCTIONS.values()}
        if self.prompt in asked_by and self.reward_function.prompt not in (None, self.prompt):
            found.append(f"prompt = {self.prompt} does not ask for the format that reward = {self.reward} wants")
        if self.float32_output_layer and self.compute_dtype == self.engine_dtype == "float32":
            found.append("float32_output_layer has no effect: compute_dtype and engine_dtype are float32 already")
        if not computes_fast_in_16_bits():
            found += [
                f"{key} = {getattr(self, key)}: this processor has no AVX-512, and takes many times as long as in "
                "float32; leave it out, or set it to auto"
                for key, device in DTYPE_KEYS.items()
                if getattr(self, device) == "cpu" and getattr(self, key) != "float32"
            ]
        if not is_embedded(self.train_data) and is_embedded(self.validation_data) and not self.validation_fraction:
            other = "" if getattr(self, "learns_from_pairs", False) else ", or validation_fraction"
            found.append(
                f"trained on {self.train_data}, but evaluated on embedded {EMBEDDED_DATA}: give validation_data{other}"
            )
        return found

    def _require_count(self, name: str, least: int = 1) -> None:
        if (value := getattr(self, name)) != "all" and value < least:
            raise ValueError(f"{name} = {value}: must be at least {least}, or all")

    def is_changed(self, key: str) -> bool:
        """Return whether a key differs from its default."""
        return getattr(self, key) != type(self).model_fields[key].default

    def without_effect(self, keys: Sequence[str], reason: str) -> list[str]:
        """Return a sentence for each of the keys that differs from its default, because it has no effect."""
        return [f"{key} = {getattr(self, key)} has no effect {reason}" for key in keys if self.is_changed(key)]

    @property
    def reward_function(self) -> "Reward":
        """Return the reward function of that name, the user's own, or the sum of several."""
        return find_reward(self.reward, self.max_reward_seconds)

    @property
    def eval_score(self) -> str:
        """Return the metric that decides which checkpoint is the best."""
        return EVAL_SCORE

    @property
    def samples_ahead(self) -> bool:
        """Return whether the engine samples while the policy trains, in a process of its own."""
        return bool(getattr(self, "rollouts_ahead", 0))

    @property
    def needs_engine(self) -> bool:
        """Return whether anything is sampled."""
        return True

    @property
    def shares_gpu(self) -> bool:
        """Return whether policy and vLLM use the same GPU. Then the engine must sleep during training."""
        return self.needs_engine and self.policy_device == self.evaluator_device != "cpu"


class TrainConfig(RunConfig):
    """The keys that all training shares: batch, optimizer, evaluation, checkpoints."""

    train_batch_size: int = Field(32, ge=1, description="rows (examples or responses) per optimizer step")
    gradient_accumulation_steps: int = Field(
        8,
        ge=1,
        description="a microbatch (one forward and backward pass) holds at most train_batch_size / this many rows",
    )
    microbatch_tokens: int = Field(
        0,
        ge=0,
        description="most tokens of a microbatch (0: no limit). Only a single row may have more. A prefix that rows "
        "share counts once. The gradient is that of the whole batch, however it is divided",
    )
    lora_rank: int = Field(0, ge=0, description="rank of LoRA adapters, which alone are trained (0: train all weights)")
    lora_alpha: float = Field(32.0, gt=0, description="the adapters count lora_alpha / lora_rank times")
    optimizer: Literal[tuple(OPTIMIZERS)] = Field(  # pyright: ignore[reportInvalidTypeForm]
        "adamw", description="adamw, or rmsprop, which keeps half as many moments"
    )
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW betas")
    weight_decay: float = Field(
        0.0, ge=0, description="weight decay. adamw: apart from the gradient. rmsprop: added to it"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="largest gradient norm. A larger gradient is scaled down to it")
    loss_scale: float = Field(
        65536.0,
        ge=1,
        description="with compute_dtype=float16 the loss is multiplied by this, so that small gradients do not vanish. "
        "If gradients overflow, the step's gradient is computed again with half the factor",
    )
    eval_interval: int = Field(
        50, ge=1, description="steps between evaluations. One also takes place before the first and after the last step"
    )
    num_final_eval_examples: int | Literal["all"] = Field(
        "all", description="validation questions of the evaluation at the end, eval_all/* (all, or at most so many)"
    )
    num_eval_samples: int = Field(
        1,
        ge=1,
        le=MOST_EVAL_SAMPLES,
        description="responses per question in evaluations. With several, pass@k and maj@k are measured too",
    )
    num_printed_examples: int = Field(
        1, ge=0, description="right responses, and wrong ones, that are printed at each evaluation (0: none)"
    )
    eval_sampling_temperature: float | None = Field(
        None, ge=0, le=2, description="softmax temperature in evaluations (0: greedy; null: sampling_temperature)"
    )

    max_training_hours: float = Field(
        0.0,
        ge=0,
        description="hours of steps and evaluations after which the run ends, its last step evaluated (0: no limit)",
    )
    checkpoint_interval: int = Field(
        50, ge=1, description="steps between checkpoints, from which a run can be resumed. The last step has one, too"
    )
    keep_last: int = Field(1, ge=1, description="how many of the newest checkpoints are kept")
    keep_best: bool = Field(True, description="also keep the checkpoint with the best validation answer reward")
    resume: str = Field("", description="folder of a run to go on with (auto: run_name's, or the newest unfinished)")
    resume_with_changes: bool = Field(False, description="go on although settings differ from the run's own")

    @model_validator(mode="after")
    def _check_train_fields(self) -> Self:
        self._require_multiple("train_batch_size", "gradient_accumulation_steps")
        self._require_count("num_final_eval_examples")
        if self.num_eval_samples > 1 and self.evaluation_temperature == 0:
            raise ValueError(
                f"num_eval_samples = {self.num_eval_samples} samples the same response each time at temperature 0: "
                "use num_eval_samples = 1, or an eval_sampling_temperature above 0"
            )
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
        """Return the shared warnings, and those about a shared GPU, idle keys and the best checkpoint."""
        found = super().warnings()
        if self.shares_gpu and self.gpu_memory_utilization > 0.5:
            found.append(
                f"gpu_memory_utilization = {self.gpu_memory_utilization:g}: the policy, its gradients and AdamW's "
                "moments need memory on the same GPU; 0.35 of 80 GB is enough for the engine"
            )
        for switch, keys in SWITCHED_KEYS.items():
            if not getattr(self, switch, True):
                found += self.without_effect(keys, f"without {switch}")
        shorter, longer = sorted((self.checkpoint_interval, self.eval_interval))
        if self.keep_best and longer % shorter:
            found.append(
                f"keep_best keeps only what is both saved and evaluated, but neither of checkpoint_interval = "
                f"{self.checkpoint_interval} and eval_interval = {self.eval_interval} divides the other"
            )
        return found

    @property
    def needs_first_policy(self) -> bool:
        """Return whether a resumed run needs the weights that it began with: those beside adapters are not saved."""
        return self.lora_rank > 0

    @property
    def token_limit(self) -> int:
        """Return how many sampled tokens end the run (0: none do)."""
        return int(getattr(self, "max_sampled_tokens", 0))

    @property
    def evaluation_temperature(self) -> float:
        """Return the softmax temperature of evaluations."""
        own = self.eval_sampling_temperature
        return self.sampling_temperature if own is None else own

    @property
    def microbatch_size(self) -> int:
        """Return the most rows that share a forward and backward pass."""
        return self.train_batch_size // self.gradient_accumulation_steps
