"""Every key of the configuration, with its meaning, unit and default. Validation never changes a value.

Here are the keys of each kind of training; those that all share are in plainrl/shared_config.py. Sizes that follow from
other keys are properties. `--help` and docs/configuration.md are generated from this schema.
"""

from typing import Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from GRPO_helper import LENGTH_NORMALIZATIONS, LOSSES, Loss
from plainrl.lookup import look_up
from plainrl.shared_config import EMBEDDED_DATA, RunConfig, TrainConfig


class SFTConfig(TrainConfig):
    """Supervised fine-tuning (SFT_train.py)."""

    num_sft_examples: int | Literal["all"] = Field(
        "all", description="unique training examples (the assignment: 128, 256, 512, 1024, all)"
    )
    examples_seed: int | None = Field(None, ge=0, description="seed that draws num_sft_examples (null: seed)")
    arithmetic_corrupt_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of embedded training traces with a wrong last sum and answer. Ground truths stay right",
    )
    filter_correct: bool = Field(False, description="keep only traces that the reward function accepts")
    dropout: bool = Field(False, description="train with the dropout that the model's config.json asks for")
    num_epochs: float = Field(1.0, gt=0, description="passes over the training examples, if max_steps is 0")
    max_steps: int = Field(0, ge=0, description="optimizer steps (0: as many as num_epochs needs)")
    normalize_constant: float = Field(1.0, gt=0, description="divisor of the summed token loss")
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="constant, or a linear warm-up then a cosine down to a tenth"
    )
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="share of the steps that warm up (cosine only)")

    @model_validator(mode="after")
    def _check_sft_fields(self) -> Self:
        if isinstance(self.num_sft_examples, int) and self.num_sft_examples < 1:
            raise ValueError(f"num_sft_examples = {self.num_sft_examples}: must be at least 1, or all")
        return self

    def warnings(self) -> list[str]:
        """Return the shared warnings, and one if arithmetic_corrupt_fraction has no effect."""
        found = super().warnings()
        if self.arithmetic_corrupt_fraction and self.train_data != EMBEDDED_DATA:
            found.append(f"arithmetic_corrupt_fraction has no effect with train_data = {self.train_data}")
        return found


class RolloutConfig(TrainConfig):
    """The keys that training on the policy's own graded responses shares: first policy, groups of responses."""

    warm_start: str = Field(
        "",
        description="first policy: a preset of config.yaml, whose SFT run is made if needed, or the folder of a run or "
        "of a model (empty: the model itself)",
    )
    group_size: int = Field(8, ge=1, description="responses sampled per question")
    num_logged_groups: int = Field(2, ge=0, description="groups of rollouts written to samples/ per step")

    @model_validator(mode="after")
    def _check_rollout_fields(self) -> Self:
        if self.sampling_temperature == 0:
            raise ValueError(
                "sampling_temperature = 0 samples the same response to a question each time, so nothing can be "
                "learnt: use a temperature above 0, usually 1"
            )
        return self

    @property
    def num_questions_per_step(self) -> int:
        """Questions per rollout batch."""
        raise NotImplementedError

    @property
    def rollouts_check_sync(self) -> bool:
        """Return whether the rollouts check the weight sync. Only then are their log-probs asked for."""
        return False


class ExpertIterationConfig(RolloutConfig):
    """Expert iteration: SFT on the policy's own correct responses (experiments/expert_iteration.py)."""

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
        description="a microbatch (one forward and backward pass) holds at most train_batch_size / this many rows",
    )

    loss_type: str = Field(
        "reinforce_with_baseline",
        description="policy-gradient loss: a name in LOSSES (GRPO_helper.py), or your own as file.py:function",
    )
    use_std_normalization: bool = Field(True, description="divide advantages by the std of their group")
    advantage_eps: float = Field(1e-6, gt=0, description="added to the std of a group")
    cliprange: float = Field(0.2, gt=0, lt=1, description="clip range of the importance ratio, for losses that clip")
    length_normalization: Literal[tuple(LENGTH_NORMALIZATIONS)] = Field(  # pyright: ignore[reportInvalidTypeForm]
        "masked_mean",
        description="how token losses become one number. masked_mean: mean per response. masked_normalize: sum divided "
        "by sampling_max_tokens (Dr. GRPO). token_mean: mean over all tokens of the optimizer step (DAPO)",
    )
    mask_truncated_responses: bool = Field(False, description="leave responses cut at the length limit out of the loss")

    @field_validator("loss_type")
    @classmethod
    def _check_loss_type(cls, value: str) -> str:
        look_up(value, LOSSES, "loss_type")
        return value

    @model_validator(mode="after")
    def _check_grpo_fields(self) -> Self:
        self._require_multiple("rollout_batch_size", "group_size")
        self._require_multiple("rollout_batch_size", "train_batch_size")
        if self.train_batch_size < self.group_size:
            raise ValueError(
                f"train_batch_size = {self.train_batch_size} is smaller than group_size = {self.group_size}: "
                f"use train_batch_size = {self.group_size} or more"
            )
        if self.group_size == 1 and "advantages" in self.loss.needs:
            raise ValueError(
                f"group_size = 1 has no group mean to subtract: use group_size >= 2, or loss_type = no_baseline "
                f"instead of {self.loss_type}"
            )
        return self

    def warnings(self) -> list[str]:
        """Return the shared warnings, and those about settings that do not fit the loss."""
        found = super().warnings()
        needs = self.loss.needs  # a plain function does not say what it needs
        if self.is_off_policy and needs and "old_log_probs" not in needs:
            found.append(
                f"several optimizer steps per rollout batch with loss_type = {self.loss_type}, which ignores that the "
                "policy has changed; grpo_clip corrects for it"
            )
        if not self.is_off_policy and "cliprange" in needs:
            found.append("cliprange has no effect with one optimizer step per rollout batch: the ratio is always 1")
        if self.cliprange != type(self).model_fields["cliprange"].default and needs and "cliprange" not in needs:
            found.append(f"cliprange = {self.cliprange:g} has no effect with loss_type = {self.loss_type}")
        if not self.samples_from_policy:
            found.append(
                f"sampling_temperature = {self.sampling_temperature:g}, sampling_top_p = {self.sampling_top_p:g}: "
                "responses come from another distribution than the policy's, which the gradient ignores; "
                "rollout/log_prob_gap is left out"
            )
        return found

    @property
    def loss(self) -> Loss:
        """Return the loss of that name, or the user's own. A plain function gets every input and skips no rows."""
        found = look_up(self.loss_type, LOSSES, "loss_type")
        return found if isinstance(found, Loss) else Loss(found)

    @property
    def samples_from_policy(self) -> bool:
        """Return whether responses are sampled from the policy's own distribution, sampling_min_tokens aside."""
        return self.sampling_temperature == self.sampling_top_p == 1

    @property
    def num_questions_per_step(self) -> int:
        """Questions per rollout batch."""
        return self.rollout_batch_size // self.group_size

    @property
    def rollouts_check_sync(self) -> bool:
        """Return whether the rollouts can check the weight sync. Then their log-probs should be the policy's."""
        return self.samples_from_policy and self.sampling_min_tokens < self.sampling_max_tokens

    @property
    def is_off_policy(self) -> bool:
        """Return whether the policy changes while it is trained on a rollout batch."""
        return self.epochs_per_rollout_batch > 1 or self.train_batch_size < self.rollout_batch_size


ConfigType = TypeVar("ConfigType", bound=RunConfig)
