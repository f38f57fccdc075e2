"""Rollout batches in turn; with `rollouts_ahead` each is sampled while the policy trains on the one before."""

import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from kill_and_resume import start, wait_for
from ranks import left_alive
from safetensors.torch import load_file
from tiny import REPOSITORY, grpo_arguments, read_lines, replace_engine, train_rows

import GRPO_train
import policy_evaluation
from plainrl import engine_process, sampler
from plainrl.config import GRPOConfig
from plainrl.records import Example, Response, UserError
from plainrl.sampler import Sampler
from policy_evaluation import Evaluator

QUESTIONS = [Example(f"q{n}", "p", "1", None, "s") for n in range(7)]
PROMPTS = [[n] for n in range(7)]


def tiny_config(**overrides):
    values = {"rollout_batch_size": 4, "train_batch_size": 4, "group_size": 2, "gradient_accumulation_steps": 1}
    return GRPOConfig(**(values | {"sampling_max_tokens": 16, "n_grpo_steps": 5} | overrides))


def new_sampler(config):
    return Sampler(SimpleNamespace(llm=None, before_sync=None), QUESTIONS, PROMPTS, config)


@pytest.fixture
def events(monkeypatch):
    """What the engine is asked for and gives, in the order of time: 'ask' and 'give' with the questions."""
    seen = []

    def stream_responses(llm, prompt_ids, sampling_params, seeds, with_log_probs):
        assert with_log_probs
        seen.append(("give", [ids[0] for ids in prompt_ids[::2]]))
        return ((index, Response(ids, "1", [1], [-0.5], "stop")) for index, ids in enumerate(prompt_ids))

    replace_engine(monkeypatch, stream_responses)
    submit_groups = sampler.submit_groups

    def ask(llm, prompt_ids, chosen, *others):
        seen.append(("ask", list(chosen)))
        return submit_groups(llm, prompt_ids, chosen, *others)

    monkeypatch.setattr(sampler, "submit_groups", ask)
    return seen


def run_steps(own_sampler, steps, events, is_evaluated=lambda step: False):
    """The calls of the training loop; returns the questions and the policy of each step."""
    found = []
    with own_sampler:
        for step in steps:
            own_sampler.finish()
            events.append(("sync", step - 1))
            sampled = own_sampler.sample(step)
            grades = sampled.wait_for_grades()
            assert len(grades) == 4
            own_sampler.order.record(sampled.chosen, grades)
            found.append((sampled.chosen, {response.policy_step for response in sampled.responses}))
            events.append(("train", step))
            if is_evaluated(step):
                own_sampler.finish()
                events.append(("sync", step))
    return found


def test_the_next_batch_is_asked_for_before_training_and_awaited_before_the_weights_change(events):
    config = tiny_config(rollouts_ahead=1)
    found = run_steps(new_sampler(config), range(1, 6), events, lambda step: step == 2)
    order = new_sampler(config).order
    batches = [order.draw(2) for _ in range(5)]
    assert [chosen for chosen, _ in found] == batches
    assert [policies for _, policies in found] == [{0}, {0}, {1}, {2}, {3}]
    first, second, third, fourth, fifth = batches
    assert [event for event in events if event[0] != "give"] == [
        *(("sync", 0), ("ask", first), ("ask", second), ("train", 1)),
        *(("sync", 1), ("ask", third), ("train", 2)),
        ("sync", 2),  # an evaluation
        *(("sync", 2), ("ask", fourth), ("train", 3)),
        *(("sync", 3), ("ask", fifth), ("train", 4)),
        *(("sync", 4), ("train", 5)),  # no further batch after the last step
    ]
    for batch in batches:
        asked, given = events.index(("ask", batch)), events.index(("give", batch))
        changes = [place for place, event in enumerate(events) if event[0] == "sync" and place > asked]
        assert asked < given < min(changes, default=len(events))


@pytest.mark.usefixtures("events")
def test_responses_are_taken_and_graded_while_the_policy_trains():
    """The engine itself does not look for stop strings."""
    own_sampler = new_sampler(tiny_config(rollouts_ahead=1))
    with own_sampler:
        own_sampler.sample(1)
        [chosen, collected] = own_sampler._asked
        gradings = collected.result(timeout=60).gradings  # nobody has asked for the batch yet
        assert [grading.result(timeout=60).rewards["format_reward"] for grading in gradings] == [0.0] * 4
        own_sampler.finish()
        assert own_sampler._ready.chosen == chosen


@pytest.mark.usefixtures("events")
def test_an_error_of_the_thread_that_takes_responses_ends_the_run(monkeypatch):
    def fail(*_):
        raise UserError("the reward function failed")

    own_sampler = new_sampler(tiny_config(rollouts_ahead=1))
    monkeypatch.setattr(sampler, "collect_groups", fail)
    with pytest.raises(UserError, match="the reward function failed"), own_sampler:
        own_sampler.sample(1)


def test_without_it_every_batch_is_of_the_present_policy(events):
    found = run_steps(new_sampler(tiny_config()), range(1, 4), events)
    assert [policies for _, policies in found] == [{0}, {1}, {2}]
    assert [event for event, _ in events] == ["sync", "give", "train"] * 3


@pytest.mark.parametrize("is_evaluated", [True, False])
def test_a_resumed_run_asks_the_batch_ahead_again_and_none_twice(is_evaluated, events):
    """Whether the batch ahead is finished or not when the state is saved."""
    config = tiny_config(rollouts_ahead=1, drop_solved_questions=True)
    straight = run_steps(new_sampler(config), range(1, 6), events)
    stopped, resumed = (new_sampler(config) for _ in range(2))
    begun = run_steps(stopped, range(1, 3), events, lambda step: is_evaluated)
    state = stopped.state_dict()
    assert state["position"] == 4
    assert state["visits"].keys() == {str(index) for chosen, _ in begun for index in chosen}
    resumed.load_state_dict(state, step=2)
    went_on = run_steps(resumed, range(3, 6), events)
    assert [chosen for chosen, _ in begun + went_on] == [chosen for chosen, _ in straight]
    assert [policies for _, policies in went_on] == [{2}, {2}, {3}]  # the first is of the policy that was resumed


def test_what_it_does_not_go_with_is_refused_and_what_it_does_to_the_gradient_is_said():
    for settings, message in (
        ({"dynamic_sampling": True}, "rollouts_ahead = 1 with dynamic_sampling"),
        ({"policy_device": "cuda:0", "evaluator_device": "cuda:0"}, "policy and engine take turns on cuda:0"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_config(rollouts_ahead=1, **settings)
    config = tiny_config(rollouts_ahead=1)
    assert any("engine_correction=token_truncate weighs them" in warning for warning in config.warnings())
    assert config.has_engine_log_probs and not config.rollouts_check_sync  # probes check it instead
    corrected = tiny_config(rollouts_ahead=1, engine_correction="token_truncate")
    assert not any("rollouts_ahead" in warning for warning in corrected.warnings())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_the_process_of_an_engine_ends_with_the_run_and_gets_no_signals_of_its_terminal(tmp_path):
    child = "import plainrl, time, os; print(os.getpid(), os.getsid(0), flush=True); time.sleep(60)"
    run = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); sys.stdin.read()"
    environment = os.environ | {"PLAINRL_ENGINE_PROCESS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, "-c", run], cwd=REPOSITORY, env=environment, **pipes)
    process_id, session = map(int, parent.stdout.readline().split())
    assert session == process_id
    engine = psutil.Process(process_id)
    parent.kill()
    parent.wait()
    assert left_alive([engine]) == []


def test_a_process_that_ends_while_it_is_awaited_is_told_at_once(monkeypatch):
    """vLLM's own client would wait for ever. The wait here stands for its queue."""
    before = signal.getsignal(signal.SIGCHLD)
    present = multiprocessing.active_children()
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    process.start()
    monkeypatch.setattr(engine_process, "_watched", engine_process._Watched())
    try:
        engine_process.watch(engine_process.new_processes(present))
        with engine_process.told_if_it_ended():
            pass
        threading.Timer(0.5, process.kill).start()
        with pytest.raises(UserError, match="the engine's process has ended"), engine_process.told_if_it_ended():
            queue.Queue().get(timeout=30)
        with pytest.raises(UserError, match="the engine's process has ended"), engine_process.told_if_it_ended():
            pytest.fail("it is known before anything is asked")
    finally:
        signal.signal(signal.SIGCHLD, before)


def copies_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_weights_go_through_a_file_that_holds_tied_ones_twice(tiny_model):
    with engine_process.in_shared_memory(copies_of(tiny_model)) as folder:
        stored = load_file(f"{folder}/model.safetensors")
    assert not Path(folder).exists()
    assert stored.keys() == tiny_model.state_dict().keys() and "lm_head.weight" in stored
    assert all(torch.equal(stored[name], tensor) for name, tensor in tiny_model.state_dict().items())


def test_weights_that_a_killed_run_left_in_memory_are_removed_by_the_next(tiny_model, monkeypatch, tmp_path):
    monkeypatch.setattr(engine_process, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))  # where weights go if there is no room in memory
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/plainrl-weights-old").mkdir()
    (tmp_path / "disk/plainrl-weights-old/model.safetensors").write_text("of a killed run")
    (tmp_path / "disk/plainrl-mine").mkdir()
    code = (
        "import os, pathlib, sys, torch; from plainrl import engine_process; "
        "engine_process.SHARED_MEMORY = pathlib.Path(sys.argv[1]); "
        "context = engine_process.in_shared_memory({'a': torch.zeros(1)}); context.__enter__(); "
        "print('there', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.Popen(command, cwd=REPOSITORY, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout.readline() == "there\n"
    [theirs] = tmp_path.glob("plainrl-*")
    with engine_process.in_shared_memory(copies_of(tiny_model)) as folder:
        assert {*tmp_path.glob("plainrl-*")} == {theirs, Path(folder)}, "that of a run that goes on stays"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["plainrl-mine"]
    run.kill()
    run.wait()
    with engine_process.in_shared_memory(copies_of(tiny_model)) as folder:
        assert [*tmp_path.glob("plainrl-*")] == [Path(folder)]
    assert not [*tmp_path.glob("plainrl-*")]


def test_an_engine_on_a_cpu_gets_half_of_the_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("RANK", "1")
    given = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    with engine_process.share_threads("cpu"):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["PLAINRL_ENGINE_PROCESS"]) == ("3", "1")
        assert "RANK" not in os.environ, "the engine's process is no rank of torchrun"
    assert given == [3] and os.environ["RANK"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "7" and "PLAINRL_ENGINE_PROCESS" not in os.environ
    with engine_process.share_threads("cuda:0"):
        assert os.environ["OMP_NUM_THREADS"] == "7"
    assert given == [3]


def run_ahead(background):
    """Stop a run by Ctrl-C, and go on to the end; return its folder, and what was seen of the first part."""
    folder = background.new_folder("ahead")
    settings = {"n_grpo_steps": 6, "checkpoint_interval": 1, "eval_interval": 3, "num_logged_groups": 2}
    settings |= {"rollouts_ahead": 1, "engine_correction": "token_truncate", "run_name": "run", "resume": "auto"}
    arguments = grpo_arguments(background.answering_model, folder, **settings)

    run = start("GRPO_train.py", arguments, folder / "stopped.log", background.start)
    wait_for(lambda: (folder / "run/checkpoints/step_000002").is_dir(), run)
    engines = [child for child in psutil.Process(run.pid).children(recursive=True) if "EngineCore" in child.name()]
    run.send_signal(signal.SIGINT)
    statuses, left = [run.wait(600)], left_alive(engines)
    statuses.append(start("GRPO_train.py", arguments, folder / "last.log", background.start).wait(1800))
    return folder, statuses, len(engines), left


@pytest.mark.background(job=run_ahead)
def test_a_run_ahead_samples_from_the_policy_before_and_is_stopped_and_resumed(
    background, answering_model_folder, engine, tmp_path, monkeypatch
):
    monkeypatch.setattr("policy_evaluation.init_vllm", lambda *_, **__: engine)
    still = {"n_grpo_steps": 6, "num_logged_groups": 2, "learning_rate": "1e-30", "run_name": "still"}
    GRPO_train.main(grpo_arguments(answering_model_folder, tmp_path, **still))

    folder, statuses, num_engines, left = background.result(run_ahead)
    logs = [(folder / name).read_text() for name in ("stopped.log", "last.log")]
    assert statuses == [130, 0], logs
    assert (num_engines, left) == (1, [])
    assert "stopped by SIGINT" in logs[0]

    def sampled(field, step):
        paths = (run / f"samples/rollouts_{step:06d}.jsonl" for run in (folder / "run", tmp_path / "still"))
        return [[row[field] for row in read_lines(path)] for path in paths]

    for step in (1, 2):  # both of the policy before the first step, which `still` has throughout
        ahead, before = sampled("response", step)
        assert ahead == before
    for step in range(1, 7):  # the stop loses no question and doubles none
        ahead, before = sampled("prompt", step)
        assert ahead == before
    rows = train_rows(folder / "run")
    assert [row["train_step"] for row in rows] == list(range(1, 7))
    lags = [row["rollout/policy_lag"] for row in rows]
    assert lags[:2] == [0, 1] and sorted(lags) == [0, 0, 1, 1, 1, 1]  # 0 after each start
    assert all(row["rollout/sync_multiplicative_error"] < 1.001 for row in rows)
    assert all(row["train/engine_weight_mean"] > 0 for row in rows if row["train/num_trained_rows"])


def test_a_weight_sync_waits_for_the_batch_ahead(monkeypatch):
    evaluator, seen = Evaluator.__new__(Evaluator), []
    evaluator.llm = None
    monkeypatch.setattr(policy_evaluation, "load_policy_into_vllm_instance", lambda *_: seen.append("copy"))
    own_sampler = Sampler(evaluator, QUESTIONS, PROMPTS, tiny_config(rollouts_ahead=1))
    assert evaluator.before_sync == own_sampler.finish
    evaluator.before_sync = lambda: seen.append("wait")
    evaluator.sync(None, with_probes=False)
    assert seen == ["wait", "copy"]
