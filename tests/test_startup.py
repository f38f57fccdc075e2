"""How a program of this project begins and ends at its terminal: Ctrl-C during the imports, a closed output."""

from plainrl.startup import own_command

import os
import signal
import subprocess
import sys

import pytest
from tiny import REPOSITORY, run_python

from plainrl.cli import run_main

SLOW_TORCH = """
import sys, time
print("importing torch", flush=True)
sys.stdin.read()
"""
PROGRAMS = [["-m", "experiments.runs"], ["SFT_train.py"], ["GRPO_train.py"], ["policy_evaluation.py"]]


@pytest.fixture
def slow_torch(tmp_path):
    """An environment in which the import of torch takes until the standard input ends."""
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    return os.environ | {"PYTHONPATH": str(tmp_path)}


def start_and_interrupt(arguments, environment, cwd=REPOSITORY, **options):
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout.readline() == "importing torch\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.mark.parametrize("arguments", PROGRAMS, ids=lambda arguments: arguments[-1])
def test_ctrl_c_while_torch_is_imported_ends_without_a_traceback(slow_torch, arguments):
    assert start_and_interrupt(arguments, slow_torch) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    ("arguments", "is_own"),
    [
        (["-m", "experiments.runs"], True),
        (["-mexperiments.runs"], True),
        (["-mexperiments.runs", "runs"], True),
        (["-X", "dev", "-mplainrl.help"], True),
        (["-mmine", "runs"], False),
        (["-m", "mine", "-mexperiments.runs", "runs"], False),  # the first names the program, the rest is its own
        (["-m"], False),
    ],
)
def test_a_module_is_ours_with_and_without_a_space(arguments, is_own):
    assert bool(own_command(None, ["python", *arguments])) == is_own


def test_ctrl_c_stays_as_it_is_in_a_program_of_somebody_else(slow_torch, tmp_path):
    """Who imports plainrl keeps the KeyboardInterrupt; under nohup it stays ignored."""
    (tmp_path / "mine.py").write_text("import plainrl\nimport torch\n")
    environment = slow_torch | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    status, error = start_and_interrupt(["mine.py"], environment, cwd=tmp_path)
    assert (status, error.splitlines()[-1]) == (-signal.SIGINT, "KeyboardInterrupt")
    program = "import signal, plainrl.startup as s; s.own_command = lambda *_: '-m mine'; s.prepare_program(); "
    program += "print(signal.getsignal(signal.SIGINT).name)"
    ignoring = (
        f"import os, signal, sys; signal.signal(2, signal.SIG_IGN); os.execv(sys.executable, ['p', '-c', {program!r}])"
    )
    assert run_python("-c", program).stdout == "SIG_DFL\n"
    assert run_python("-c", ignoring).stdout == "SIG_IGN\n"


TALKS = """
from plainrl.cli import run_main
run_main(lambda arguments: [print("a line of output") for _ in range(100_000)])
"""


def test_an_output_that_nobody_reads_ends_the_program_without_a_word():
    """As with `... | head -1`: what a shell shows for a program that SIGPIPE ended, and nothing on stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", TALKS]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (141, b"")


def test_help_that_nobody_reads_and_outputs_that_are_closed():
    """`--help | true` and `>&-`. Status 0: only what was printed last is not read."""
    commands = {
        "python -m experiments.sweep --help | true; echo ${PIPESTATUS[0]}": ("0\n", ""),
        "python -m experiments.runs nowhere >&-": ("", "error: nowhere holds no run; name the folder that holds the "),
    }
    for command, (output, error) in commands.items():
        command = command.replace("python", sys.executable)
        result = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
        assert result.stdout == output and result.stderr.startswith(error) and result.stderr.count("\n") <= 1
        assert result.returncode == (0 if output else 2)


def test_what_is_buffered_for_a_reader_that_has_gone_is_dropped(monkeypatch):
    """Else the interpreter ends with `Exception ignored ... BrokenPipeError` and status 120."""

    class Closed:
        def write(self, text):
            return len(text)

        def flush(self):
            raise BrokenPipeError

    replaced = []
    monkeypatch.setattr("os.dup2", lambda source, target: replaced.append(target))
    monkeypatch.setattr("sys.stdout", Closed())
    run_main(lambda arguments: None)
    assert replaced == [1]
