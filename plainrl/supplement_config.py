"""The keys of the assignment's supplement: DPO, and the four evaluations. plainrl/config.py says how they are used."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from plainrl.config import EpochsConfig, WarmStartConfig
from plainrl.shared_config import EMBEDDED_DATA, RunConfig, is_embedded

# Keys of other scripts that say which questions are asked, or how responses are graded.
OF_OTHER_DATA = (
    *("train_data", "validation_data", "extra_validation_data", "validation_fraction", "num_eval_examples"),
    *("question_field", "answer_field", "trace_field", "arithmetic_terms", "arithmetic_max_term", "reward"),
    *("drop_long_examples", "validation_seed", "fill_prompts"),
)


class DPOConfig(WarmStartConfig, EpochsConfig):
    """Direct preference optimization (supplement/DPO_train.py)."""

    learns_from_pairs: ClassVar[bool] = True

    train_data: str = Field(
        EMBEDDED_DATA,
        description=f"preference pairs: {EMBEDDED_DATA} (embedded; {EMBEDDED_DATA}:2-6 gives the number of terms), a "
        "file of {chosen, rejected} conversations or of {prompt, chosen, rejected}, or a folder of such files",
    )
    validation_data: str = Field(
        EMBEDDED_DATA, description="held-out questions that are sampled in evaluations (empty: none, and no engine)"
    )
    beta: float = Field(0.1, gt=0, description="factor of the implicit rewards: how strongly the policy is held back")
    num_pairs: int | Literal["all"] = Field("all", description="training pairs, drawn at random (a count, or all)")
    num_validation_pairs: int = Field(200, ge=1, description="pairs that are held out and measured in evaluations")
    train_batch_size: int = Field(64, ge=1, description="pairs per optimizer step")
    gradient_accumulation_steps: int = Field(
        64,
        ge=1,
        description="a microbatch (one forward and backward pass) holds at most train_batch_size / this many pairs",
    )
    keep_best: bool = Field(True, description="also keep the checkpoint with the best validation accuracy")

    @model_validator(mode="after")
    def _check_dpo_fields(self) -> Self:
        self._require_count("num_pairs")
        if self.validation_fraction and not is_embedded(self.train_data):
            raise ValueError(
                f"validation_fraction = {self.validation_fraction:g}: pairs hold no questions with answers; leave it "
                "out, and name questions with validation_data"
            )
        for name in ("validation_fraction", "extra_validation_data"):
            if not self.validation_data and getattr(self, name):
                raise ValueError(f"{name} = {getattr(self, name)}: it has no effect without validation_data; name that")
        return self

    @property
    def needs_engine(self) -> bool:
        """Return whether anything is sampled."""
        return bool(self.validation_data)

    @property
    def eval_score(self) -> str:
        """Return the metric that decides which checkpoint is the best: the accuracy on held-out pairs."""
        return "eval/accuracy"


class BenchmarkConfig(RunConfig):
    """The evaluations of the supplement (supplement/evaluate_benchmark.py)."""

    prompt: str = Field(
        "zero_shot",
        description="zero_shot for a base model, alpaca after instruction tuning, or the path of a template",
    )
    tasks: tuple[str, ...] = Field(
        ("mmlu", "gsm8k", "alpaca_eval", "simple_safety_tests"), description="evaluations to run, in this order"
    )
    benchmark_data: str = Field("data", description="folder of the assignment's data: mmlu/, gsm8k/, alpaca_eval/, ...")
    num_questions: int | Literal["all"] = Field(
        "all", description="questions of each evaluation, a fixed random subset (a count, or all)"
    )
    generator: str = Field("", description="name of the model in AlpacaEval's file (empty: model)")
    sampling_temperature: float = Field(0.0, ge=0, le=2, description="softmax temperature (0: greedy)")
    sampling_min_tokens: int = Field(0, ge=0, description="tokens before which a response cannot end")
    stop_string: str = Field("# Query:", description="text that ends a response. It is cut off")

    @model_validator(mode="after")
    def _check_benchmark_fields(self) -> Self:
        self._require_count("num_questions")
        for name in OF_OTHER_DATA:
            if self.is_changed(name):
                raise ValueError(
                    f"{name} = {getattr(self, name)}: it has no effect here; num_questions of the data in "
                    "benchmark_data are asked, and each task has a score of its own"
                )
        return self
