"""The keys of experiments/chat.py. They are here so that typos are found before anything large is imported."""

from typing import Self

from pydantic import Field, model_validator

from plainrl.config import SFTConfig


class ChatConfig(SFTConfig):
    """The keys of a chat: those of config.yaml, and its own."""

    question: str = Field("", description="the only question (empty: questions are read from the terminal)")
    answer: str = Field("", description="its right answer, by which responses are graded (empty: they are not)")
    num_samples: int = Field(1, ge=1, description="responses to each question, of each model")

    @model_validator(mode="after")
    def _check_answer(self) -> Self:
        if self.answer and not self.question:
            raise ValueError(
                f"answer = {self.answer}: there is no question that it answers; give question, or leave answer out and "
                "type `question => answer` in the terminal"
            )
        return self
