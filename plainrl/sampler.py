"""The rollout batches of a run, one after the other; with `rollouts_ahead`, each while the policy trains on the last.

    rollouts_ahead = 0     sync(pi_k)  sample batch k+1  train on batch k+1                          pi_k+1
    rollouts_ahead = 1     sync(pi_k)  ask for batch k+2, and train on batch k+1 of pi_k-1 meanwhile  pi_k+1

A thread takes the responses from the engine meanwhile. vLLM looks for stop strings not in the engine's process, but in
its client here, which then has the engine end the response. The thread also hands responses over to the graders.

A batch that was asked for before an evaluation is finished before that, because the evaluation copies the weights. A
checkpoint does not hold the batch that is ahead. A resumed run asks its questions again, with the policy it has then.

Source: Noukhovitch et al. 2024 (arXiv 2410.18252), one-step off-policy training.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self

from plainrl.config import GRPOConfig
from plainrl.engine_process import told_if_it_ended
from plainrl.grading.rewards import NUM_WORKERS
from plainrl.records import Example
from plainrl.rollouts import (
    Collected,
    Sampled,
    collect_groups,
    gather_groups,
    sample_rounds,
    submit_groups,
    thread_pool,
)
from plainrl.selection import QuestionOrder

if TYPE_CHECKING:
    from vllm import LLM


class HasEngine(Protocol):
    """What the sampler needs of policy_evaluation.Evaluator."""

    llm: "LLM"
    before_sync: Callable[[], None]


class Sampler:
    """Samples the rollout batches of a run. Its state is that of the questions' order."""

    def __init__(
        self,
        evaluator: HasEngine,
        questions: Sequence[Example],
        prompt_ids: Sequence[list[int]],
        config: GRPOConfig,
    ) -> None:
        """Note what to sample from. Responses are graded by threads that live as long as its `with` statement.

        Args:
            evaluator: has the engine. Before it changes the engine's weights, it waits for the batch ahead.
            questions: all training questions.
            prompt_ids: token ids of each question's prompt.
            config: of the run.
        """
        self.order = QuestionOrder(len(questions), config)
        self._llm, self._questions, self._prompt_ids = evaluator.llm, questions, prompt_ids
        evaluator.before_sync = self.finish
        self._config, self._threads = config, thread_pool(NUM_WORKERS)
        # The questions of the batch ahead, which is sampled now, and its responses to come.
        self._asked: tuple[list[int], Future[Collected]] | None = None
        self._ready: Sampled | None = None  # the batch ahead, once it is finished
        self._position: dict[str, Any] = {}  # of the order, before it drew the batch ahead

    def __enter__(self) -> Self:
        """Start the threads that grade."""
        self._grading_threads = self._threads.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End them; after an error, what is queued is given up."""
        if error[0] is None:
            self.finish()
        self._threads.__exit__(*error)

    def finish(self) -> None:
        """Wait for the batch ahead, if one was asked for. The engine's weights must not change before."""
        if self._asked is not None:
            (chosen, collected), self._asked = self._asked, None
            with told_if_it_ended():
                own = collected.result()
            responses, wait_for_grades = gather_groups(own, self._config)
            self._ready = Sampled(chosen, responses, [wait_for_grades])

    def sample(self, step: int) -> Sampled:
        """Return the rollouts of a step, and with `rollouts_ahead` ask for those of the next.

        Args:
            step: its number. The engine has the policy after the step before.
        """
        config = self._config
        if not config.rollouts_ahead:
            return sample_rounds(
                self._llm, self._questions, self._prompt_ids, self.order, step, config, self._grading_threads
            )
        if self._ready is None:  # the first step, or the first after a resume
            self._ask(step, step - 1)
            self.finish()
        sampled, self._ready = self._ready, None
        assert sampled is not None
        if step < config.n_grpo_steps:
            self._ask(step + 1, step - 1)
        return sampled

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the order as if the batch ahead had not been drawn: a resumed run draws it again."""
        state = self.order.state_dict()
        return state | self._position if self._asked or self._ready else state

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from a state after `step`."""
        self.order.load_state_dict(state, step)

    def _ask(self, step: int, policy_step: int) -> None:
        """Ask for the batch of a step; the engine's policy was trained on `policy_step` batches."""
        self._position = {"position": self.order.state_dict()["position"]}
        chosen = self.order.draw(self._config.num_questions_per_step)
        groups = submit_groups(self._llm, self._prompt_ids, chosen, step, self._config, policy_step)
        of_batch = (self._llm, self._questions, groups, self._config, self._grading_threads)
        self._asked = chosen, _in_a_thread(partial(collect_groups, *of_batch))


def _in_a_thread(call: Callable[[], Collected]) -> Future[Collected]:
    """Call it in a thread that does not keep the program from ending. It may wait for an engine that has ended."""
    future: Future[Collected] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised again by whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
