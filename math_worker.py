"""Comparing expressions in worker processes, each item under a limit on time and on memory.

What a language model writes may make a parser or sympy hang or grow. Here that costs one item, never the run: a worker
that exceeds a limit is killed and replaced. No signal is set in the calling process, so that any thread may call.

    python math_worker.py MEMORY_BYTES   the worker itself: reads questions as JSON lines, writes answers
"""

import atexit
import json
import os
import queue
import re
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, cast

NUM_WORKERS = 2
SECONDS_PER_ITEM = 5.0
SECONDS_TO_START = 60.0  # a worker imports sympy first
MEMORY_BYTES = 2**30  # beyond what a worker takes when it starts
MAX_KNOWN = 2**16  # results remembered


class GradingError(Exception):
    """Two expressions could not be compared; the message is the reason: timeout, memory or error."""


@dataclass
class Budget:
    """The time that the workers may still spend on one answer."""

    seconds: float = SECONDS_PER_ITEM


def expressions_equal(one: str, other: str, budget: Budget) -> bool:
    """Return whether two expressions are equal, as a worker process finds; what it finds is remembered.

    Raises:
        GradingError: timeout, memory or error (not remembered).
    """
    if (one, other) in _known:
        return _known[one, other]
    if budget.seconds <= 0:
        raise GradingError("timeout")
    pool = _pool()
    worker = pool.get()
    started = time.perf_counter()
    try:
        answer = worker.ask({"one": one, "other": other}, budget.seconds)
    finally:
        budget.seconds -= time.perf_counter() - started
        pool.put(worker)
    if "failure" in answer:
        raise GradingError(answer["failure"])
    if len(_known) >= MAX_KNOWN:
        _known.clear()
    _known[one, other] = answer["equal"]
    return answer["equal"]


class Worker:
    """A process that compares expressions; it is started when first asked, and again after it was killed."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict[str, str], seconds: float) -> dict[str, Any]:
        """Return the worker's answer, or after so many seconds at most the reason why there is none."""
        try:
            if self._process is None or self._process.poll() is not None:
                self._start()
            process = cast("subprocess.Popen[bytes]", self._process)
            cast(IO[bytes], process.stdin).write(json.dumps(question).encode() + b"\n")
            cast(IO[bytes], process.stdin).flush()
            line = self._read_line(seconds)
        except OSError:
            line = b""
        answer = json.loads(line) if line else {"failure": "timeout" if line is None else "error"}
        if "failure" in answer:
            self.stop()
        return answer

    def stop(self) -> None:
        """Kill the process and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        self.stop()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(self._memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run, which decides when its workers end
        )
        if not self._read_line(SECONDS_TO_START):
            self.stop()
            raise OSError("the worker did not start")

    def _read_line(self, seconds: float) -> bytes | None:
        """Return a line, empty if the process has ended, None if it takes longer."""
        stdout = cast(IO[bytes], cast("subprocess.Popen[bytes]", self._process).stdout)
        poll = select.poll()
        poll.register(stdout, select.POLLIN | select.POLLHUP)
        return stdout.readline() if poll.poll(seconds * 1000) else None


def stop_workers() -> None:
    """End all worker processes; the next comparison starts new ones."""
    with _pool_lock:
        pool = _pools.pop(os.getpid(), None)
    if pool is not None:
        for _ in range(NUM_WORKERS):
            pool.get().stop()


_known: dict[tuple[str, str], bool] = {}
_pools: dict[int, "queue.LifoQueue[Worker]"] = {}  # by process: a fork must not share its parent's pipes
_pool_lock = threading.Lock()


def _pool() -> "queue.LifoQueue[Worker]":
    with _pool_lock:
        if os.getpid() not in _pools:
            _pools.clear()
            _pools[os.getpid()] = queue.LifoQueue()
            for _ in range(NUM_WORKERS):
                _pools[os.getpid()].put(Worker())
            atexit.register(stop_workers)
        return _pools[os.getpid()]


def serve(memory_bytes: int) -> None:
    """Compare the expressions that come in as JSON lines, under limits on memory, files and time."""
    import resource
    import signal

    import sympy  # noqa: F401
    from latex2sympy2_extended import latex2sympy

    latex2sympy("1+x")  # what is built on first use is built now
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer: dict[str, Any] = {"equal": True}
    while True:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)
        line = sys.stdin.readline()
        if not line:
            return
        # Should the parent be gone, nobody else would end a computation that hangs: the default action does.
        signal.setitimer(signal.ITIMER_REAL, 3 * SECONDS_PER_ITEM)
        question = json.loads(line)
        try:
            answer = {"equal": compare_expressions(question["one"], question["other"])}
        except MemoryError:
            answer = {"failure": "memory"}
        except Exception:
            # Not an expression after all, or one that sympy cannot handle: it is not shown to be equal.
            answer = {"equal": False}


def compare_expressions(one: str, other: str) -> bool:
    r"""Return whether two LaTeX expressions have the same value wherever both have one; run in a worker.

    Both are evaluated to 60 digits at points of either sign; a difference beyond 40 digits at any point, or no value,
    means that they differ.
    """
    import sympy

    a, b = _to_sympy(one), _to_sympy(other)
    if a.has(sympy.nan, sympy.zoo) or b.has(sympy.nan, sympy.zoo):
        return False
    if a.has(sympy.oo, -sympy.oo) or b.has(sympy.oo, -sympy.oo):
        return bool(a == b)
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    num_compared = 0
    for signs in ((1,), (1, -1), (-1, 1), (-1,)):
        point = {
            symbol: sympy.Rational(signs[index % len(signs)] * (2 * index + 3), 7 + 4 * index)
            for index, symbol in enumerate(symbols)
        }
        values = [complex_value(expression.subs(point)) for expression in (a, b)]
        if None in values:
            return False
        x, y = cast(list[Any], values)
        if abs(x - y) > sympy.Float(10, 60) ** -40 * max(1, abs(x), abs(y)):
            return False
        num_compared += 1
        if not symbols:
            break
    return num_compared > 0


def complex_value(expression: Any) -> Any:
    """Return a number to 60 digits, or None if the expression has none."""
    import sympy

    value = sympy.N(expression, 60, maxn=400)
    return value if value.is_number and value.is_finite and not value.has(sympy.nan) else None


def _to_sympy(text: str) -> Any:
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    text = re.sub(r"\d*\.\d+", _as_fraction, text)  # exact, where a Float is not
    text = re.sub(r"\^\\circ", r"\\cdot\\frac{\\pi}{180}", text)
    expression = latex2sympy(text, conversion_config=ConversionConfig(lowercase_symbols=False))
    if not isinstance(expression, sympy.Expr):
        raise ValueError(f"{text} is no expression")
    constants = {"i": sympy.I, "e": sympy.E}
    return expression.subs({symbol: constants.get(str(symbol), symbol) for symbol in expression.free_symbols})


def _as_fraction(match: re.Match[str]) -> str:
    numerator, denominator = Fraction(match[0]).as_integer_ratio()
    return rf"(\frac{{{numerator}}}{{{denominator}}})"


if __name__ == "__main__":
    serve(int(sys.argv[1]))
