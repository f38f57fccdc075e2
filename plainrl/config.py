"""Every key of the configuration, with its meaning, unit and default. Validation never changes a value.

Here are the keys of each kind of training. Those that all share are in plainrl/shared_config.py, and those of the
supplement in plainrl/supplement_config.py. Sizes that follow from other keys are properties. `--help` and
docs/configuration.md are generated from this schema.
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from plainrl.lookup import TableOf, look_up
from plainrl.shared_config import RunConfig, TrainConfig, is_embedded

if TYPE_CHECKING:
    from GRPO_helper import Loss

# The choices of the keys. Their modules import torch, which reading the command line does not wait for.
LOSSES = TableOf("GRPO_helper", "LOSSES")
LENGTH_NORMALIZATIONS = TableOf("GRPO_helper", "LENGTH_NORMALIZATIONS")
ADVANTAGE_SCALES = TableOf("GRPO_helper", "ADVANTAGE_SCALES")
SFT_LENGTH_NORMALIZATIONS = TableOf("SFT_helper", "LENGTH_NORMALIZATIONS")
ENGINE_CORRECTIONS = TableOf("plainrl.corrections", "ENGINE_CORRECTIONS")
KL_ESTIMATORS = TableOf("plainrl.corrections", "KL_ESTIMATORS")
RATIO_LEVELS = TableOf("plainrl.corrections", "RATIO_LEVELS")
NAMED_SCALES = tuple(name for name in ADVANTAGE_SCALES if isinstance(name, str))  # beside true and false
NUM_STEPS_KEYS = ("n_grpo_steps", "n_ei_steps", "max_steps")  # how many steps a run is to have, by its kind


class ImitationConfig(TrainConfig):
    """The keys that training on given responses shares: SFT and expert iteration."""

    length_normalization: Literal[tuple(SFT_LENGTH_NORMALIZATIONS)] = Field(  # pyright: ignore[reportInvalidTypeForm]
        "sum",
        description="how token losses become one number. sum: sum divided by normalize_constant, mean per response. "
        "token_mean: mean over all response tokens of the optimizer step",
    )
    normalize_constant: float = Field(1.0, gt=0, description="divisor of the summed token loss")

    def warnings(self) -> list[str]:
        """Return the shared warnings, and one if normalize_constant has no effect."""
        found = super().warnings()
        if not SFT_LENGTH_NORMALIZATIONS[self.length_normalization].needs_constant:
            reason = f"with length_normalization = {self.length_normalization}"
            found += self.without_effect(["normalize_constant"], reason)
        return found


class EpochsConfig(TrainConfig):
    """The keys that training on a fixed data set shares: SFT and DPO."""

    num_epochs: float = Field(1.0, gt=0, description="passes over the training data, if max_steps is 0")
    max_steps: int = Field(0, ge=0, description="optimizer steps (0: as many as num_epochs needs)")
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="constant, or a linear warm-up then a cosine down to a tenth"
    )
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="share of the steps that warm up (cosine only)")

    def warnings(self) -> list[str]:
        """Return the shared warnings, and one if warmup_fraction has no effect."""
        idle = ["warmup_fraction"] if self.lr_schedule == "constant" else []
        return super().warnings() + self.without_effect(idle, f"with lr_schedule = {self.lr_schedule}")

    def num_steps(self, num_rows: int) -> int:
        """Return the number of optimizer steps on so many rows or pairs."""
        return self.max_steps or math.ceil(self.num_epochs * num_rows / self.train_batch_size)


class SFTConfig(ImitationConfig, EpochsConfig):
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
    loss_on: Literal["response", "all"] = Field(
        "response", description="tokens that are trained: those of the response, or all but the first"
    )
    packing: Literal["none", "fixed"] = Field(
        "none",
        description="fixed: all examples are joined, each with EOS at its end, and cut into rows of seq_length tokens. "
        "It needs loss_on=all",
    )
    seq_length: int = Field(512, ge=1, description="tokens of a packed row (packing=fixed)")

    @model_validator(mode="after")
    def _check_sft_fields(self) -> Self:
        self._require_count("num_sft_examples")
        if self.packing == "fixed" and self.loss_on != "all":
            raise ValueError(
                f"packing = fixed with loss_on = {self.loss_on}: a packed row has no prompt of its own; use "
                "loss_on = all, or packing = none, which computes no padding either"
            )
        if self.packing == "fixed" and self.seq_length >= self.max_context_tokens:
            raise ValueError(
                f"seq_length = {self.seq_length} is not below max_context_tokens = {self.max_context_tokens}: lower "
                "the first or raise the second"
            )
        return self

    def warnings(self) -> list[str]:
        """Return the shared warnings, and one if arithmetic_corrupt_fraction has no effect."""
        found = super().warnings()
        if not is_embedded(self.train_data):
            found += self.without_effect(["arithmetic_corrupt_fraction"], f"with train_data = {self.train_data}")
        if self.packing != "fixed":
            found += self.without_effect(["seq_length"], f"with packing = {self.packing}")
        return found


class WarmStartConfig(TrainConfig):
    """The key that names the first policy, for training that begins after SFT."""

    warm_start: str = Field(
        "",
        description="first policy: a preset of config.yaml, whose SFT run is made if needed, the name of a run in "
        "runs_dir, or the folder of a run or of a model (empty: the model itself)",
    )

    learns_from_pairs: ClassVar[bool] = False  # preference pairs, which SFT cannot imitate


class RolloutConfig(WarmStartConfig):
    """The keys that training on the policy's own graded responses shares: groups of responses."""

    group_size: int = Field(8, ge=1, description="responses sampled per question")
    max_sampled_tokens: int = Field(
        0,
        ge=0,
        description="sampled response tokens of all steps at which the run ends, its last step evaluated (0: no limit)",
    )
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
    def has_engine_log_probs(self) -> bool:
        """Return whether the engine gives the log-probs of its responses."""
        return False


class ExpertIterationConfig(RolloutConfig, ImitationConfig):
    """Expert iteration: SFT on the policy's own correct responses (experiments/expert_iteration.py)."""

    n_ei_steps: int = Field(5, ge=1, description="expert iteration steps")
    ei_batch_size: int = Field(1024, ge=1, description="questions per expert iteration step (|D_b|)")
    ei_epochs: int = Field(1, ge=1, description="passes over the responses that a step keeps")
    keep_correct: Literal["distinct", "one"] = Field(
        "distinct", description="correct responses kept per question: all that differ in their tokens, or the first"
    )

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

    recipe: str = Field(
        "", description="recipe of the YAML file: the settings of a published method, over the preset's (empty: none)"
    )
    loss_type: str = Field(
        "reinforce_with_baseline",
        description="policy-gradient loss: a name in LOSSES (GRPO_helper.py), or your own as file.py:function. GSPO is "
        "grpo_clip with ratio_level=sequence",
    )
    use_std_normalization: bool | Literal[NAMED_SCALES] = Field(  # pyright: ignore[reportInvalidTypeForm]
        True,
        description="what advantages are divided by. true: the std of their group. false: nothing. batch: the std of "
        "all rewards of the rollout batch. mean: the mean of their group (MaxRL)",
    )
    advantage_eps: float = Field(1e-6, gt=0, description="added to the std of the rewards")
    cliprange: float = Field(0.2, gt=0, lt=1, description="clip range of the importance ratio, for losses that clip")
    cliprange_high: float | None = Field(
        None, gt=0, description="clip range above 1, often 0.28 (DAPO's clip-higher; null: cliprange)"
    )
    cliprange_dual: float = Field(
        0.0, ge=0, description="where the advantage is negative, ratios above this have no gradient, often 3 (0: off)"
    )
    ratio_cap: float = Field(5.0, ge=1, description="loss_type=cispo: largest ratio that a token is weighted with")
    ratio_level: Literal[tuple(RATIO_LEVELS)] = Field(  # pyright: ignore[reportInvalidTypeForm]
        "token",
        description="token: each token has its own importance ratio. sequence: it has that of its response, the "
        "geometric mean of its tokens' (GSPO), where a cliprange of 3e-4 is usual",
    )
    length_normalization: Literal[tuple(LENGTH_NORMALIZATIONS)] = Field(  # pyright: ignore[reportInvalidTypeForm]
        "masked_mean",
        description="how token losses become one number. masked_mean: mean per response. masked_normalize: sum divided "
        "by sampling_max_tokens (Dr. GRPO). token_mean: mean over all tokens of the optimizer step (DAPO)",
    )
    mask_truncated_responses: bool = Field(False, description="leave responses cut at the length limit out of the loss")
    kl_coefficient: float = Field(
        0.0,
        ge=0,
        description="factor of the KL divergence from the first policy, which is added to the loss (0: off). For it, "
        "that policy scores each rollout batch, from a copy of its weights in the CPU's memory",
    )
    kl_estimator: Literal[tuple(KL_ESTIMATORS)] = Field(  # pyright: ignore[reportInvalidTypeForm]
        "k3",
        description="estimator of that divergence, from d = log pi - log pi_ref. k1: d. k2: d^2 / 2, which has the "
        "gradient of the reverse KL divergence of a token. k3: exp(-d) + d - 1, GRPO's own",
    )
    entropy_coefficient: float = Field(
        0.0, ge=0, description="factor of the token entropy, which is subtracted from the loss (0: off)"
    )
    engine_correction: Literal[tuple(ENGINE_CORRECTIONS)] = Field(  # pyright: ignore[reportInvalidTypeForm]
        "none",
        description="weights w = policy / engine for the engine's error in the probabilities of the sampled tokens. "
        "token_truncate: at most the cap (TIS). token_mask: 0 outside [1/cap, cap] (IcePop). "
        "sequence_truncate: the product over a response, at most the cap. sequence_mask: the same, 0 above the cap "
        "(MIS). sequence_mean_mask: 0 or 1 by its geometric mean",
    )
    engine_correction_cap: float = Field(2.0, gt=1, description="cap of engine_correction, a factor")
    overlong_cache_tokens: int = Field(
        0,
        ge=0,
        description="tokens before sampling_max_tokens over which a penalty on the reward grows from 0 to -1 (DAPO; 0: "
        "no penalty)",
    )

    dynamic_sampling: bool = Field(
        False, description="ask further questions until as many groups as a batch holds have right and wrong answers"
    )
    max_resampling_rounds: int = Field(
        8,
        ge=0,
        description="rounds of further questions per step at most, each of one batch or less. A batch that is then "
        "short of mixed groups is filled up with other sampled groups",
    )
    rollouts_ahead: Literal[0, 1] = Field(
        0,
        description="1: the engine samples the next rollouts while the policy trains, on another GPU. They are one "
        "step older than the policy, which engine_correction accounts for. A resumed run is not bit-exact",
    )
    drop_solved_questions: bool = Field(False, description="do not ask a question again once it is solved")
    solved_pass_rate: float = Field(
        0.9, gt=0, le=1, description="mean answer reward from which on a question is solved (drop_solved_questions)"
    )
    solved_visits: int = Field(
        1, ge=1, description="how often a question was asked last, for that mean (drop_solved_questions)"
    )

    @field_validator("loss_type")
    @classmethod
    def _check_loss_type(cls, value: str) -> str:
        if value not in LOSSES:  # a name of the table needs no import yet
            look_up(value, LOSSES, "loss_type")
        return value

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        if self.has_sequence_ratios and self.loss.needs and "old_log_probs" not in self.loss.needs:
            with_ratio = ", ".join(name for name, loss in LOSSES.items() if "old_log_probs" in loss.needs)
            raise ValueError(
                f"ratio_level = {self.ratio_level} with loss_type = {self.loss_type}, which has no ratio: use one of "
                f"{with_ratio}"
            )
        if 0 < self.cliprange_dual <= 1:
            raise ValueError(
                f"cliprange_dual = {self.cliprange_dual:g} would clip where the policy has not moved: use more than 1, "
                "often 3, or 0 for none"
            )
        if self.is_changed("engine_correction") and not self.has_engine_log_probs:
            raise ValueError(
                f"engine_correction = {self.engine_correction} compares log-probs of the same distribution: use "
                f"sampling_top_p = 1 (now {self.sampling_top_p:g}) and sampling_min_tokens (now "
                f"{self.sampling_min_tokens}) below sampling_max_tokens, or engine_correction = none"
            )
        if self.overlong_cache_tokens:
            from GRPO_helper import group_mean

            if ADVANTAGE_SCALES[self.use_std_normalization] is group_mean:
                raise ValueError(
                    f"use_std_normalization = {self.use_std_normalization} needs rewards of 0 or more, and "
                    f"overlong_cache_tokens = {self.overlong_cache_tokens} lowers them: leave one of the two out"
                )
        return self

    @model_validator(mode="after")
    def _check_selection(self) -> Self:
        if self.overlong_cache_tokens > self.sampling_max_tokens:
            raise ValueError(
                f"overlong_cache_tokens = {self.overlong_cache_tokens} exceeds sampling_max_tokens = "
                f"{self.sampling_max_tokens}: use that or less, often a fifth of it"
            )
        if self.dynamic_sampling and self.group_size == 1:
            raise ValueError(
                "dynamic_sampling = true with group_size = 1: a group of one is never mixed; use group_size >= 2"
            )
        if self.rollouts_ahead and self.dynamic_sampling:
            raise ValueError("rollouts_ahead = 1 with dynamic_sampling, which waits for grades: leave one of them out")
        if self.rollouts_ahead and self.shares_gpu:
            raise ValueError(
                f"rollouts_ahead = 1, but policy and engine take turns on {self.policy_device}: give the policy "
                "another GPU (preset=two-gpu), or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_grpo_fields(self) -> Self:
        self._require_multiple("rollout_batch_size", "group_size")
        self._require_multiple("rollout_batch_size", "train_batch_size")
        if self.train_batch_size < self.group_size:
            raise ValueError(
                f"train_batch_size = {self.train_batch_size} is less than a group: use {self.group_size} or more"
            )
        if self.group_size == 1 and "advantages" in self.loss.needs:
            raise ValueError(
                "group_size = 1 has no group mean to subtract: use group_size >= 2, or loss_type = no_baseline"
            )
        return self

    def warnings(self) -> list[str]:
        """Return the shared warnings, and those about settings that do not fit the loss."""
        from plainrl.objective_warnings import find_warnings

        return super().warnings() + find_warnings(self)

    @property
    def loss(self) -> "Loss":
        """Return the loss of that name, or the user's own. A plain function gets every input and skips no rows.

        Nor does any loss with a term that every row has: KL or entropy.
        """
        from GRPO_helper import Loss

        found = look_up(self.loss_type, LOSSES, "loss_type")
        loss = found if isinstance(found, Loss) else Loss(found)
        return replace(loss, zero_with=None) if self.kl_coefficient or self.entropy_coefficient else loss

    @property
    def samples_from_policy(self) -> bool:
        """Return whether responses are sampled from the distribution that is trained: the policy's at the temperature.

        The first sampling_min_tokens tokens are left aside.
        """
        return self.sampling_top_p == 1

    @property
    def num_questions_per_step(self) -> int:
        """Questions per rollout batch."""
        return self.rollout_batch_size // self.group_size

    @property
    def has_engine_log_probs(self) -> bool:
        """Return whether the engine gives the log-probs of its responses, which are compared with the policy's."""
        return self.samples_from_policy and self.sampling_min_tokens < self.sampling_max_tokens

    @property
    def rollouts_check_sync(self) -> bool:
        """Return whether the rollouts can check the weight sync. Then their log-probs should be the policy's.

        Those that were sampled ahead cannot, because the policy has moved on.
        """
        return self.has_engine_log_probs and not self.samples_ahead

    @property
    def needs_first_policy(self) -> bool:
        """Return whether a resumed run needs the weights that it began with: beside adapters, or for a KL term."""
        return super().needs_first_policy or self.kl_coefficient > 0

    @property
    def has_sequence_ratios(self) -> bool:
        """Return whether a response has one importance ratio, and not each of its tokens."""
        return self.is_changed("ratio_level")

    @property
    def is_off_policy(self) -> bool:
        """Return whether the policy changes while it is trained on a rollout batch."""
        return self.epochs_per_rollout_batch > 1 or self.train_batch_size < self.rollout_batch_size


ConfigType = TypeVar("ConfigType", bound=RunConfig)
