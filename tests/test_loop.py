"""The loop around the steps of every run, with small fakes: no engine, no files but those of the watchdog."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from tiny import REPOSITORY, read_lines, tiny_arguments
from transformers import AutoModelForCausalLM

from plainrl.cli import load_config
from plainrl.clock import Used
from plainrl.config import SFTConfig
from plainrl.guard import watched
from plainrl.loop import TrainingLoop
from plainrl.records import Stopped, UserError
from plainrl.run_folder import RunFolder


class FakeRun:
    """A run's folder that writes down what is asked of it, in order."""

    def __init__(self, path, events, step=0, train_step=0):
        self.path, self.events, self.rows, self.saved, self.shown = path, events, [], [], []
        self._step, self._train_step = step, train_step

    def restore(self, state, num_steps):
        if self._step:
            state.complete_step(self._step, metrics_bytes=0)

    def last_train_step(self):
        return self._train_step

    def log(self, row):
        self.rows.append(row)

    def used(self):
        return Used.of(self.rows)

    def watched(self, phase, seconds=None):
        self.events.append(phase)
        return watched(phase, 60, self.path, seconds)

    def complete_step(self, state, step):
        self.events.append(f"step {step} complete")
        state.complete_step(step, metrics_bytes=0)

    def save_checkpoint(self, state):
        assert state.can_be_saved()
        self.saved.append((state.step, state.policy.weight.item()))
        self.events.append(f"save {state.step}")
        return self.path / f"step_{state.step}"

    def show_evaluation(self, step, num_printed):
        self.shown.append(step)

    def prune_checkpoints(self, keep_last, keep_best):
        self.events.append(f"prune {keep_last} {keep_best}")


EVALUATION = dict.fromkeys(("answer_reward", "format_reward", "response_length", "truncated_fraction"), 0.0)


class FakeEvaluator:
    def __init__(self, events):
        self.events = events

    def evaluate(self, policy, eval_step):
        self.events.append(f"evaluate {eval_step}")
        return EVALUATION

    def sleep(self):
        self.events.append("sleep")


@pytest.fixture
def make_loop(tmp_path):
    """Make a loop over a policy of one weight, its list of events as `loop.events`, its run as `loop.run`."""

    def make(num_steps, step=0, train_step=0, **settings):
        policy, events = torch.nn.Linear(1, 1, bias=False), []
        torch.nn.init.zeros_(policy.weight)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        run = FakeRun(tmp_path, events, step, train_step)
        values = {
            "checkpoint_interval": 100,
            "eval_interval": 100,
            "keep_last": 2,
            "keep_best": False,
            "num_printed_examples": 1,
        }
        values |= {"max_training_hours": 0.0, "token_limit": 0}
        loop = TrainingLoop(
            policy, None, optimizer, ["data"], num_steps, FakeEvaluator(events), run,
            SimpleNamespace(**(values | settings)), "test",
        )  # fmt: skip
        loop.events, loop.run, loop.policy, loop.optimizer = events, run, policy, optimizer
        return loop

    return make


def move_weight(loop):
    """One optimizer step, which adds 1 to the weight."""
    (-loop.policy.weight.sum()).backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad()


def test_phases_are_timed_step_by_step(make_loop):
    found = []
    with make_loop(2) as loop:
        for step in loop:
            assert loop.seconds == {}
            with loop.phase("rollout"):
                time.sleep(0.02 * step)
            for _ in range(2):  # a phase that comes twice is one
                with loop.phase("train"):
                    time.sleep(0.01)
            found.append(loop.seconds)
    assert [set(seconds) for seconds in found] == [{"time/rollout", "time/train"}] * 2
    for step, seconds in enumerate(found, start=1):
        assert 0.02 * step <= seconds["time/rollout"] < 10
        assert 0.02 <= seconds["time/train"] < 10
    assert list(loop.run.path.iterdir()) == []  # nothing hung


def test_an_error_in_a_phase_ends_the_steps_and_saves_the_state_before(make_loop):
    with pytest.raises(RuntimeError, match="mine"), make_loop(2) as loop:
        for _ in loop:
            with loop.phase("train"):
                raise RuntimeError("mine")
    assert loop.events == ["evaluate 0", "evaluate", "sleep", "prune 2 False", "train", "save 0"]


def test_rows_are_numbered_by_optimizer_steps(make_loop):
    """Two in the first step, one in the second, none in the third; `of_step` stands in the last or alone."""
    returned = []
    with make_loop(3) as loop:
        for step in loop:
            rows = [{"train/loss": 10.0 * step + index} for index in range(3 - step)]
            returned += loop.log(rows, {"rollout/reward": float(step)})
            assert all("train_step" not in row for row in rows)  # what is given is not written to
    assert returned == loop.run.rows
    assert loop.run.rows == [
        {"train_step": 1, "train/loss": 10.0},
        {"train_step": 2, "train/loss": 11.0, "rollout/reward": 1.0},
        {"train_step": 3, "train/loss": 20.0, "rollout/reward": 2.0},
        {"train_step": 3, "rollout/reward": 3.0},
    ]


def test_without_of_step_there_are_the_rows_alone(make_loop):
    with make_loop(2) as loop:
        for _ in loop:
            loop.log([{"train/loss": 0.5}])
            assert loop.log([]) == []
    assert loop.run.rows == [{"train_step": 1, "train/loss": 0.5}, {"train_step": 2, "train/loss": 0.5}]


def test_saved_and_evaluated_at_the_intervals_and_after_the_last_step(make_loop):
    """Saved before evaluated, which may fail; the engine sleeps until the next sync, but after the last step."""
    with make_loop(7, checkpoint_interval=2, eval_interval=3, keep_last=1, keep_best=True) as loop:
        for step in loop:
            assert loop.events[-1] != f"step {step} complete"
            move_weight(loop)
    asleep, prune = ["evaluate", "sleep"], "prune 1 True"
    assert loop.events == [
        *("evaluate 0", *asleep, prune, "step 1 complete", "step 2 complete", "save 2", prune),
        *("step 3 complete", "evaluate 3", *asleep, prune, "step 4 complete", "save 4", prune, "step 5 complete"),
        *("step 6 complete", "save 6", "evaluate 6", *asleep, prune),
        *("step 7 complete", "save 7", "evaluate 7", prune),
    ]
    assert loop.run.saved == [(2, 2.0), (4, 4.0), (6, 6.0), (7, 7.0)]  # the weights after the step
    assert loop.run.shown == [0, 3, 6, 7]


def test_an_evaluation_that_fails_loses_nothing(make_loop):
    loop = make_loop(4, checkpoint_interval=2, eval_interval=2)

    def evaluate(policy, eval_step):
        if eval_step == 2:
            raise RuntimeError("no engine")
        return EVALUATION

    loop._evaluator.evaluate = evaluate
    with pytest.raises(RuntimeError, match="no engine"), loop:
        for _ in loop:
            move_weight(loop)
    assert loop.run.saved[0] == (2, 2.0)


def test_a_resumed_run_goes_on_after_its_checkpoint(make_loop):
    """With the numbers of its steps and its optimizer steps; what is due after the checkpoint's step is made up for."""
    with make_loop(5, step=3, train_step=6, checkpoint_interval=3, eval_interval=3) as loop:
        steps = [(step, loop.log([{}, {}])[-1]["train_step"]) for step in loop]
    assert steps == [(4, 8), (5, 10)]
    assert loop.events[:2] == ["save 3", "evaluate 3"]
    assert [event for event in loop.events if event.startswith(("save", "evaluate "))][2:] == ["save 5", "evaluate 5"]
    with make_loop(3, step=3) as loop:
        assert list(loop) == []
    assert loop.events == ["save 3", "evaluate 3", "prune 2 False"]  # the last step's, which may be missing


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_the_run_before_the_next_phase(make_loop, number, status, capsys):
    """The phase it came in is finished; the state after the last whole step is saved."""
    previous, finished = signal.getsignal(number), []
    with pytest.raises(Stopped) as caught, make_loop(5) as loop:
        for step in loop:
            with loop.phase("rollout"):
                if step == 3:
                    os.kill(os.getpid(), number)
                finished.append(step)
            with loop.phase("train"):
                move_weight(loop)
    assert caught.value.status == status
    assert finished == [1, 2, 3]
    assert loop.events[-2:] == ["rollout", "save 2"]
    assert loop.run.saved == [(2, 2.0)]
    assert f"resume={loop.run.path}" in capsys.readouterr().err
    assert signal.getsignal(number) is previous


def test_an_output_that_nobody_reads_does_not_keep_the_run_from_saving(make_loop):
    """`2>&1 | head -1`: the progress bar cannot be closed either, and the state after step 1 is saved all the same."""

    def broken(*arguments, **options):
        raise BrokenPipeError

    loop = make_loop(3)
    with pytest.raises(BrokenPipeError), loop:
        steps = iter(loop)  # held, so that the bar is closed by the loop and not by its iterator
        for step in steps:
            if step == 2:
                loop._progress.fp = SimpleNamespace(write=broken, flush=broken)
                loop._progress.sp = broken
                raise BrokenPipeError
    assert [step for step, _ in loop.run.saved] == [1]


def test_a_signal_in_the_last_phase_of_a_step_lets_it_finish(make_loop):
    """The step is logged, complete and saved; it is not evaluated, which takes long."""
    with pytest.raises(Stopped), make_loop(5, eval_interval=1) as loop:
        for step in loop:
            with loop.phase("train"):
                move_weight(loop)
                if step == 2:
                    os.kill(os.getpid(), signal.SIGINT)
            loop.log([{}])
    assert loop.events[-3:] == ["train", "step 2 complete", "save 2"]
    assert [row["train_step"] for row in loop.run.rows] == [1, 2]
    assert loop.run.saved == [(2, 2.0)]


def test_a_signal_after_the_last_step_is_not_lost(make_loop):
    with pytest.raises(Stopped), make_loop(1) as loop:
        for _ in loop:
            loop._evaluator.sleep = None  # not called any more
            loop._evaluator.evaluate = lambda policy, step: os.kill(os.getpid(), signal.SIGTERM) or EVALUATION
    assert loop.events[-3:] == ["save 1", "prune 2 False", "save 1"]


def test_weights_that_have_moved_in_an_unfinished_step_are_not_saved(make_loop, capsys):
    with pytest.raises(RuntimeError, match="mine"), make_loop(5) as loop:
        for step in loop:
            move_weight(loop)
            if step == 2:
                raise RuntimeError("mine")
    assert loop.run.saved == []
    assert "nothing newer than the last checkpoint" in capsys.readouterr().err


def test_a_stopped_and_resumed_run_in_a_real_folder_is_the_run_that_would_have_been(
    tiny_model_folder, tokenizer, tmp_path
):
    """Weights, moments of AdamW and metrics: as of a run that was never stopped."""

    def run_to(name, stop_at=None, **more):
        arguments = tiny_arguments(tiny_model_folder, tmp_path, run_name=name, checkpoint_interval=2, eval_interval=9)
        arguments += [f"{key}={value}" for key, value in more.items()]
        config = load_config(SFTConfig, REPOSITORY / "config.yaml", arguments)
        with RunFolder.open(config, "sft") as run:
            folder = run.checkpoint / "model" if run.checkpoint else tiny_model_folder
            policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
            loop = TrainingLoop(policy, tokenizer, optimizer, ["data"], 4, FakeEvaluator([]), run, config, "test")
            steps = []
            with loop:
                for step in loop:
                    steps.append(step)
                    with loop.phase("train"):
                        loss = policy(torch.tensor([[step, 5, 6, 7]])).logits.square().mean()
                        loss.backward()
                        if step == stop_at:
                            raise KeyboardInterrupt
                        optimizer.step()
                        optimizer.zero_grad()
                    loop.log([{"train/loss": loss.item()}])
        return steps

    assert run_to("straight") == [1, 2, 3, 4]
    with pytest.raises(KeyboardInterrupt):
        run_to("stopped", stop_at=4)
    assert run_to("stopped", resume=tmp_path / "stopped") == [4]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert read_lines(stopped / "metrics.jsonl") == read_lines(straight / "metrics.jsonl")
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        path = f"checkpoints/step_000004/{file}"
        assert (stopped / path).read_bytes() == (straight / path).read_bytes()


def test_a_run_ends_in_its_time_as_if_the_step_were_the_last(make_loop):
    """Steps of 20 minutes, evaluations of 10, a limit of 1.6 hours = 96 minutes. After step 3 the clock stands at 70,
    and a fourth step with an evaluation would end at 100."""
    with make_loop(100, max_training_hours=1.6) as loop:
        loop.run.rows.append({"eval_step": 0, "eval/seconds": 600.0})
        steps = []
        for step in loop:
            steps.append(step)
            loop.log([{}], {"time/step": 1200.0})
    assert steps == [1, 2, 3]
    assert loop.events[-4:] == ["step 3 complete", "save 3", "evaluate 3", "prune 2 False"]
    with make_loop(100, step=3, max_training_hours=0.1) as loop:  # resumed when its time is over
        loop.run.rows.append({"eval_step": 3, "eval/seconds": 600.0})
        assert list(loop) == []
    assert "evaluate 3" in loop.events, "as the last step: what was logged of it after its checkpoint is gone"


def test_an_evaluation_that_is_due_counts_before_the_next_step_begins(make_loop):
    """Steps of 20 minutes, an evaluation of 10 after each, a limit of 96. After step 2 the clock stands at 60. With the
    evaluation that is due, a step and its own evaluation it would stand at 100."""
    with make_loop(100, max_training_hours=1.6, eval_interval=1) as loop:
        steps = []
        for step in loop:
            loop.run.rows.append({"eval_step": step - 1, "eval/seconds": 600.0})  # of before this step
            steps.append(step)
            loop.log([{}], {"time/step": 1200.0})
    assert steps == [1, 2] and loop.events[-3:] == ["save 2", "evaluate 2", "prune 2 False"]


def test_nothing_is_said_of_an_evaluation_that_is_not_due(make_loop, capsys):
    for step, said in ((0, "evaluating before step 1\n"), (3, ""), (100, "evaluating after step 100\n")):
        with make_loop(100, step=step) as loop:
            next(iter(loop), None)
        assert "".join(line for line in capsys.readouterr().out.splitlines(True) if "evaluating" in line) == said


def test_a_time_in_which_not_even_a_step_fits_is_one_line(make_loop):
    """There would be no policy to keep. The first evaluation takes 10 minutes, and the limit is 6."""
    message = "^max_training_hours = 0.1: a step .* would not end in this time; raise it$"
    with pytest.raises(UserError, match=message), make_loop(100, max_training_hours=0.1) as loop:
        loop.run.rows.append({"eval_step": 0, "eval/seconds": 600.0})
        list(loop)
    assert loop.run.saved == [(0, 0.0)]  # to go on with a longer time


def test_what_a_run_has_used_is_not_read_again_at_each_step(tmp_path, monkeypatch):
    """Of 100,000 steps the last would take a second."""
    with RunFolder.create(SFTConfig(runs_dir=str(tmp_path), wandb_mode="disabled", run_name="mine"), "sft") as run:
        run.log({"train_step": 1, "time/step": 60.0})
        assert run.used().seconds == 60
        monkeypatch.setattr("plainrl.run_folder.read_metrics", None)
        run.log({"train_step": 2, "time/step": 30.0})
        run.log({"eval_step": 2, "eval/seconds": 10.0})
        assert (run.used().seconds, run.used().longest["time/step"]) == (100, 60)


def test_a_run_ends_after_the_step_that_reaches_its_tokens(make_loop):
    """300 tokens a step, a limit of 900: step 3 reaches it, and what an evaluation samples does not count."""
    with make_loop(100, token_limit=900) as loop:
        loop.run.rows.append({"eval_step": 0, "eval/num_sampled_tokens": 5000})
        steps = []
        for step in loop:
            steps.append(step)
            loop.log([{}], {"rollout/num_sampled_tokens": 300})
    assert steps == [1, 2, 3]
    assert loop.events[-4:] == ["step 3 complete", "save 3", "evaluate 3", "prune 2 False"]
    rows = loop.run.rows
    for limit, further in ((900, []), (901, [4])):  # resumed after step 3, with the metrics of its steps
        with make_loop(100, step=3, train_step=3, token_limit=limit) as loop:
            loop.run.rows.extend(rows)
            found = []
            for step in loop:
                found.append(step)
                loop.log([{}], {"rollout/num_sampled_tokens": 300})
        assert found == further
