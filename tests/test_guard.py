"""Signals wait for the phase and save; phases that hang end the process and say where it stood."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import REPOSITORY

from plainrl.cli import STOP_SIGNALS
from plainrl.devices import run_command
from plainrl.grading.own_rewards import RewardError
from plainrl.guard import StopGuard, watched
from plainrl.records import Stopped, UserError


@pytest.fixture
def guarded(tmp_path):
    """A guard, what it saved, and the state that it saves."""
    saved, state = [], SimpleNamespace(step=5, is_whole=True, is_being_saved=False)
    state.can_be_saved = lambda: state.is_whole

    def save(state):
        saved.append(state.step)
        return tmp_path / "checkpoints" / f"step_{state.step:06d}"

    return StopGuard(state, save, tmp_path), saved, state


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_waits_for_the_phase_then_saves(guarded, number, status, capfd):
    guard, saved, state = guarded
    before = {n: signal.getsignal(n) for n in (*STOP_SIGNALS, signal.SIGALRM)}
    with pytest.raises(Stopped) as caught, guard:
        os.kill(os.getpid(), number)
        state.step = 6  # the phase goes on to its end
        guard.stop_if_requested()
        pytest.fail("the guard did not stop the loop")
    assert caught.value.status == status
    assert saved == [6]
    out, err = capfd.readouterr()
    assert "stopping after this phase" in out
    assert "state after step 6 saved" in err and f"\nto go on: {run_command('python')} " in err and " resume=" in err
    assert before == {n: signal.getsignal(n) for n in before}


def test_a_long_phase_is_given_up_after_the_grace_period(guarded, monkeypatch):
    monkeypatch.setattr("plainrl.guard.GRACE_SECONDS", 0.3)
    guard, saved, _ = guarded
    started = time.monotonic()
    with pytest.raises(Stopped), guard:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert time.monotonic() - started < 10
    assert saved == [5]


@pytest.mark.parametrize("change", [{"is_whole": False}, {"is_being_saved": True}])
def test_weights_that_move_or_are_being_saved_are_not_given_up(guarded, monkeypatch, change):
    monkeypatch.setattr("plainrl.guard.GRACE_SECONDS", 0.05)
    guard, saved, state = guarded
    vars(state).update(change)
    with pytest.raises(Stopped), guard:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        state.step, state.is_whole, state.is_being_saved = 6, True, False
        guard.stop_if_requested()
    assert saved == [6]


def test_a_signal_after_the_last_look_still_stops_the_run(guarded):
    guard, saved, _ = guarded
    with pytest.raises(Stopped), guard:
        os.kill(os.getpid(), signal.SIGTERM)
    assert saved == []  # the loop was over: its last checkpoint is there


@pytest.mark.parametrize(("error", "is_saved"), [(UserError, True), (RewardError, True), (RuntimeError, False)])
def test_several_ranks_save_after_what_all_of_them_meet(error, is_saved, guarded, monkeypatch):
    """A mistake in the settings, or a reward function that fails for every response. A bug may be one rank's."""
    monkeypatch.setattr("plainrl.guard.num_ranks", lambda: 2)
    monkeypatch.setattr("plainrl.guard.all_are_here", lambda: True)
    guard, saved, _ = guarded
    with pytest.raises(error), guard:
        raise error("mine")
    assert saved == ([5] if is_saved else [])


def test_a_signal_that_is_ignored_stays_ignored(guarded):
    """As nohup does it."""
    guard, _, _ = guarded
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with guard:
            os.kill(os.getpid(), signal.SIGHUP)
            guard.stop_if_requested()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_one_request_that_arrives_several_times_is_one(guarded, number, monkeypatch):
    """As it does by way of `uv run`, of a process group, of a terminal."""
    monkeypatch.setattr("plainrl.guard.SAME_REQUEST_SECONDS", 600)
    guard, saved, state = guarded
    with pytest.raises(Stopped), guard:
        for _ in range(3):
            os.kill(os.getpid(), number)
            time.sleep(0.03)
        state.step = 6
        guard.stop_if_requested()
    assert saved == [6]


CLOSED_TERMINAL = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from plainrl.cli import run_main
from plainrl.guard import StopGuard
state = SimpleNamespace(step=5, is_whole=True, is_being_saved=False, can_be_saved=lambda: True)
def main(arguments):
    with StopGuard(state, lambda state: Path(arguments[0]).touch(), Path("runs/x")) as guard:
        print("ready", flush=True)
        for _ in range(300):  # until the terminal has gone, and the signal has come
            time.sleep(0.1)
            guard.stop_if_requested()
run_main(main)
"""


def test_a_closed_terminal_does_not_keep_the_run_from_saving(tmp_path):
    """What is printed then raises an error, which must not end the phase, nor change the exit status."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED_TERMINAL, str(tmp_path / "saved")],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=REPOSITORY, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    printed = b""
    while b"\n" not in printed:  # which a terminal may write after the word, to nobody if it were closed by then
        printed += os.read(ours, 100)
    assert b"ready" in printed
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129
    assert (tmp_path / "saved").exists()


SECOND_SIGNAL = """
import concurrent.futures, os, signal, time
from pathlib import Path
from types import SimpleNamespace
from plainrl.guard import StopGuard
state = SimpleNamespace(step=5, is_whole=True, is_being_saved=False, can_be_saved=lambda: True)
threads = concurrent.futures.ThreadPoolExecutor(1)
with StopGuard(state, lambda state: print("SAVED", flush=True), Path("runs/x")):
    threads.submit(time.sleep, 600)  # at a usual exit the interpreter would wait for it
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    print("WENT ON", flush=True)
"""


def test_a_second_signal_stops_at_once_and_saves_nothing():
    result = subprocess.run(
        [sys.executable, "-c", SECOND_SIGNAL], capture_output=True, text=True, cwd=REPOSITORY, timeout=300
    )
    assert result.returncode == 130
    assert "SAVED" not in result.stdout and "WENT ON" not in result.stdout
    assert "second signal: stopped at once" in result.stderr


def test_a_save_that_fails_does_not_hide_why_the_run_ended(guarded, capsys):
    guard, _, _ = guarded

    def full(state):
        raise OSError(28, "No space left on device")

    guard._save = full
    with pytest.raises(ZeroDivisionError), guard:
        print(1 / 0)
    assert "could not be saved: [Errno 28] No space left" in capsys.readouterr().err


def test_an_error_saves_what_is_whole_and_stays_the_error(guarded, capsys):
    guard, saved, state = guarded
    with pytest.raises(ZeroDivisionError), guard:
        print(1 / 0)
    assert saved == [5]
    state.is_whole = False
    with pytest.raises(ZeroDivisionError), guard:
        print(1 / 0)
    assert saved == [5]
    assert "nothing newer than the last checkpoint" in capsys.readouterr().err


def test_a_phase_within_its_limit_is_timed_and_leaves_nothing(tmp_path):
    seconds = {}
    for _ in range(2):
        with watched("train", 60, tmp_path, seconds):
            time.sleep(0.02)
    assert 0.04 <= seconds["time/train"] < 1
    assert list(tmp_path.iterdir()) == []


def test_the_time_of_a_phase_contains_the_work_that_a_gpu_was_handed(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    waited_for = []

    def synchronize(device):
        time.sleep(0.05)
        waited_for.append(device)

    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    seconds = {}
    with watched("train", 60, tmp_path, seconds, ["cuda:0", "cuda:1"]):
        pass
    assert 0.1 <= seconds["time/train"] < 1 and waited_for == ["cuda:0", "cuda:1"]


HANGS = {
    "in Python": ("time.sleep(600)", 124),
    "in a lock": ("threading.Event().wait()", 124),
    "while stderr is turned elsewhere": ("os.dup2(os.open(os.devnull, os.O_WRONLY), 2) and time.sleep(600)", 124),
    "in native code that holds the interpreter": ("ctypes.PyDLL(None).sleep(600)", 1),
}


@pytest.mark.parametrize("case", HANGS)
def test_a_phase_that_hangs_ends_the_process_and_leaves_its_stacks(case, tmp_path):
    hang, status = HANGS[case]
    code = f"""
        import ctypes, os, sys, threading, time
        from pathlib import Path
        from plainrl import guard
        guard.SECONDS_TO_GIVE_UP = {0.5 if status == 1 else 60}
        def a_function_that_hangs():
            {hang}
        with guard.watched("rollout", 1, Path(sys.argv[1])):
            a_function_that_hangs()
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=300,
    )  # fmt: skip
    assert result.returncode == status
    stacks = (tmp_path / "stacks_rollout.txt").read_text()
    assert "a_function_that_hangs" in stacks
    if status == 124:
        assert "rollout took longer than its limit" in stacks
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("error: rollout took longer than its limit of 1 seconds")
        assert str(Path(tmp_path)) in line and "resume=" in line


@pytest.mark.parametrize(
    ("first", "second", "ends"),
    [
        (signal.SIGINT, signal.SIGINT, True),
        (signal.SIGTERM, signal.SIGINT, True),
        (signal.SIGINT, signal.SIGHUP, False),  # the terminal was closed meanwhile
    ],
)
def test_which_later_signal_ends_the_process(guarded, monkeypatch, first, second, ends):
    ended, (guard, _, _) = [], guarded
    monkeypatch.setattr("os._exit", ended.append)
    guard._requested, guard._requested_at = first, time.monotonic() - 1.5
    guard._remember(second, None)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert ended == ([128 + second] if ends else [])


def test_of_several_ranks_none_gives_a_phase_up(guarded, monkeypatch):
    """The others would wait for it."""
    guard, _, _ = guarded
    guard._requested = signal.SIGTERM
    monkeypatch.setattr("plainrl.guard.num_ranks", lambda: 2)
    guard._give_up(signal.SIGALRM, None)
