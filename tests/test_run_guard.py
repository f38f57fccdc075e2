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

import run_guard
from run_config import Stopped
from run_guard import StopGuard, watched


@pytest.fixture
def guarded(tmp_path):
    """A guard, what it saved, and the state that it saves."""
    saved, state = [], SimpleNamespace(step=5, is_whole=True)

    def save(state):
        saved.append(state.step)
        return tmp_path / "checkpoints" / f"step_{state.step:06d}"

    return StopGuard(state, save, tmp_path), saved, state


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_waits_for_the_phase_then_saves(guarded, number, status, capsys):
    guard, saved, state = guarded
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    with pytest.raises(Stopped) as caught, guard:
        os.kill(os.getpid(), number)
        state.step = 6  # the phase goes on to its end
        guard.stop_if_requested()
        pytest.fail("the guard did not stop the loop")
    assert caught.value.status == status
    assert saved == [6]
    out, err = capsys.readouterr()
    assert "stopping after this phase" in out
    assert "state after step 6 saved" in err and "with resume=" in err
    assert before == {n: signal.getsignal(n) for n in before}


def test_a_long_phase_is_given_up_after_the_grace_period(guarded, monkeypatch):
    monkeypatch.setattr(run_guard, "GRACE_SECONDS", 0.3)
    guard, saved, _ = guarded
    started = time.monotonic()
    with pytest.raises(Stopped), guard:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert time.monotonic() - started < 10
    assert saved == [5]


def test_weights_in_motion_are_not_given_up_but_finished(guarded, monkeypatch):
    monkeypatch.setattr(run_guard, "GRACE_SECONDS", 0.05)
    guard, saved, state = guarded
    state.is_whole = False
    with pytest.raises(Stopped), guard:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        state.step, state.is_whole = 6, True
        guard.stop_if_requested()
    assert saved == [6]


def test_a_second_signal_stops_at_once_and_saves_nothing(guarded):
    guard, saved, _ = guarded
    with pytest.raises(Stopped), guard:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the second signal did not stop the phase")
    assert saved == []


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


HANGS = {
    "in Python": ("time.sleep(60)", 124, "a phase that hangs"),
    "in a lock": ("threading.Lock().acquire() and threading.Event().wait()", 124, "a phase that hangs"),
    "in native code that holds the interpreter": ("ctypes.PyDLL(None).sleep(60)", 1, None),
}


@pytest.mark.parametrize("case", HANGS)
def test_a_phase_that_hangs_ends_the_process_and_leaves_its_stacks(case, tmp_path):
    hang, status, _ = HANGS[case]
    code = f"""
        import ctypes, sys, threading, time
        from pathlib import Path
        import run_guard
        run_guard.SECONDS_TO_GIVE_UP = 0.5
        def a_function_that_hangs():
            {hang}
        with run_guard.watched("rollout", 0.3, Path(sys.argv[1])):
            a_function_that_hangs()
    """
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=60,
    )  # fmt: skip
    assert time.monotonic() - started < 45
    assert result.returncode == status
    assert "a_function_that_hangs" in (tmp_path / "stacks_rollout.txt").read_text()
    if status == 124:
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("error: rollout took longer than its limit of 0.3 seconds")
        assert str(Path(tmp_path)) in line and "resume=" in line
