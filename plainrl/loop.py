"""What surrounds the steps of every training run: resume, stop, time, log, save, evaluate.

    with TrainingLoop(...) as loop:
        for step in loop:                    # the steps that are left
            with loop.phase("rollout"):      # timed, and held to a time limit
                ...
            loop.log(rows)                   # one row per optimizer step

The state is saved every `checkpoint_interval` steps and after the last one, and whenever the run is stopped. The policy
is evaluated before the first step, every `eval_interval` steps and after the last one. A resumed run goes on after the
step of its checkpoint, and is then the run that would have been.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, Self

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plainrl.checkpoint import Resumable, TrainingState, fingerprint
from plainrl.clock import reached_limit
from plainrl.config import TrainConfig
from plainrl.distributed import on_first, rank, require_alike
from plainrl.guard import StopGuard
from plainrl.records import UserError
from plainrl.report.curves import draw_training_figure
from plainrl.run_folder import RunFolder
from plainrl.run_records import Metrics, describe_evaluation, describe_evaluations


class Evaluates(Protocol):
    """What the loop needs of an evaluator: see policy_evaluation.Evaluator."""

    def evaluate(self, policy: PreTrainedModel, eval_step: int) -> Mapping[str, Any]:
        """Sample, grade and log; return the metrics."""
        ...

    def sleep(self) -> None:
        """Free the engine's memory on a shared GPU until the next weight sync."""
        ...


class TrainingLoop:
    """The steps of a run that are left, in a `with` statement."""

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer,
        data: Iterable[object],
        num_steps: int,
        evaluator: Evaluates,
        run: RunFolder,
        config: TrainConfig,
        name: str,
        order: Resumable | None = None,
    ) -> None:
        """Note what the steps need.

        Args:
            policy: on its device; a resumed run has loaded it from its checkpoint.
            tokenizer: saved beside it.
            optimizer: of the policy.
            data: what the steps draw from. A run is resumed with the same data only.
            num_steps: of the whole run.
            evaluator: of the run.
            run: its folder.
            config: intervals, and what checkpoints are kept.
            name: shown before the progress bar.
            order: of the data, where it does not follow from the step; saved and resumed with the policy.
        """
        self.seconds: dict[str, float] = {}  # `time/<phase>` of the present step
        digest = fingerprint(data)
        require_alike(digest, "training data")
        self._state = TrainingState(policy, tokenizer, optimizer, digest, order=order)
        self._num_steps, self._evaluator, self._run, self._config = num_steps, evaluator, run, config
        self._name, self._train_step = name, 0
        self._progress: Any = None
        self._guard = StopGuard(self._state, run.save_checkpoint, run.path)

    def __enter__(self) -> Self:
        """Bring policy, optimizer and folder to where the run goes on from; a new run starts at step 0."""
        self._run.restore(self._state, self._num_steps)
        self._train_step = self._run.last_train_step()
        self._guard.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        with suppress(OSError):  # nobody may read the output any more
            if self._progress is not None:
                self._progress.close()
        self._guard.__exit__(*error)  # saves the state if an error or a signal ends the run

    def __iter__(self) -> Iterator[int]:
        self._end_at_a_limit(self._state.step)  # a resumed run may have to evaluate its last step again
        if self._is_evaluation_due():
            print(f"evaluating {f'after step {self._state.step}' if self._state.step else 'before step 1'}", flush=True)
        self._save_and_evaluate()
        if self._state.step == 0:
            self._end_at_a_limit(0, has_evaluated=True)
        steps = range(self._state.step + 1, self._num_steps + 1)
        self._progress = tqdm(
            steps, self._name, self._num_steps, unit="step", initial=self._state.step, disable=bool(rank())
        )
        for step in self._progress:
            self._guard.stop_if_requested()
            self.seconds = {}
            yield step
            self._run.complete_step(self._state, step)
            self._guard.stop_if_requested()
            self._end_at_a_limit(step)
            self._save_and_evaluate()
            if step == self._num_steps:
                break
        self._guard.stop_if_requested()

    def _is_evaluation_due(self) -> bool:
        """Return whether the policy is evaluated after the present step."""
        return is_due(self._state.step, self._config.eval_interval, self._num_steps)

    def _end_at_a_limit(self, step: int, has_evaluated: bool = False) -> None:
        """Make a step the last one if `max_training_hours` or `max_sampled_tokens` says so.

        Raises:
            UserError: not even a first step would end in time. The state of step 0 is saved.
        """
        num_evaluations = 1 + (self._is_evaluation_due() and not has_evaluated)  # of this step, and of the next
        limits = self._config.max_training_hours, self._config.token_limit
        if step == self._num_steps or not any(limits):
            return
        if limit := on_first(lambda: reached_limit(self._run.used(), *limits, num_evaluations)):
            if step == 0:
                raise UserError(f"{limit}: a step with an evaluation would not end in this time; raise it")
            tqdm.write(f"step {step} is the last: {limit}", file=sys.stdout)
            self._num_steps = step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step, and end the process if it takes longer than its limit.

        A signal that has come stops the run before the phase begins.
        """
        self._guard.stop_if_requested()
        with self._run.watched(name, self.seconds):
            yield

    def mark_weights(self, are_whole: bool) -> None:
        """Say whether the policy's weights are those after the last step.

        While they are not, a second signal waits, and nothing is saved.
        """
        self._state.is_whole = are_whole

    def log(self, rows: Sequence[Metrics], of_step: Metrics | None = None) -> list[dict[str, Any]]:
        """Log the metrics of the step's optimizer steps, numbered by `train_step`; return them so.

        Args:
            rows: one per optimizer step.
            of_step: what is measured once per step. It goes to the last row, or makes one of its own if there is none.
        """
        numbered = [{"train_step": self._train_step + index, **row} for index, row in enumerate(rows, start=1)]
        self._train_step += len(numbered)
        if of_step is not None:
            numbered = numbered or [{"train_step": self._train_step}]
            numbered[-1] |= of_step
        for row in numbered:
            self._run.log(row)
        return numbered

    def show(self, **values: object) -> None:
        """Show values behind the progress bar."""
        self._progress.set_postfix(values, refresh=False)

    def _save_and_evaluate(self) -> None:
        """Save and evaluate where the intervals say so. Saved first: an evaluation that fails loses nothing."""
        state, config = self._state, self._config
        is_saved = state.step > 0 and is_due(state.step, config.checkpoint_interval, self._num_steps)
        is_evaluated = self._is_evaluation_due()
        if is_saved:
            self._run.save_checkpoint(state)
        if is_evaluated:
            metrics = self._evaluator.evaluate(state.policy, state.step)
            tqdm.write(describe_evaluation(metrics, state.step), file=sys.stdout)
            self._run.show_evaluation(state.step, config.num_printed_examples)
            if state.step < self._num_steps:
                with self._run.watched("evaluate"):
                    self._evaluator.sleep()
        if is_saved or is_evaluated:
            self._run.prune_checkpoints(config.keep_last, config.keep_best)


def is_due(step: int, interval: int, last_step: int) -> bool:
    """Whether something that is done every `interval` steps, and after the last, is done after this step."""
    return step % interval == 0 or step == last_step


def report(run: RunFolder, config: TrainConfig) -> None:
    """Draw the run's figure and print the line that sums up its evaluations."""
    draw_training_figure(run.path)
    print(describe_evaluations(run.read_metrics(), config.evaluation_temperature))
