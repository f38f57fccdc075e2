"""Comparing expressions in worker processes, each comparison under a limit on time and on memory.

What a language model writes may make a parser or sympy hang, or take all memory. Here that costs one comparison and
never the run: a worker that exceeds a limit is killed and replaced. The calling process sets no signal handler, so
that any thread may call.

    this process --- template: imports sympy once, then forks a worker in milliseconds whenever it is asked to
        |                |
        +----------- worker: answers one question at a time

This file is also the program of the template: `python worker.py MEMORY_BYTES`, with a socket as its standard input.
It imports nothing of plainrl, so that it runs from any working directory and starts as fast as sympy does.
"""

import atexit
import json
import os
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

NUM_WORKERS = 2
SECONDS_PER_ITEM = 5.0
SECONDS_TO_START = 60.0  # for the template, which imports sympy first
MEMORY_BYTES = 2**30  # that a worker may take beyond what it has at its start
MAX_MESSAGE_BYTES = 2**16
MAX_KNOWN = 2**16  # results remembered


class GradingError(Exception):
    """Two expressions could not be compared; the message is the reason: timeout, memory or error."""


@dataclass
class Budget:
    """The time that the workers may still spend on one answer."""

    seconds: float = SECONDS_PER_ITEM


def expressions_equal(one: str, other: str, budget: Budget) -> bool:
    r"""Return whether a worker process finds two expressions equal.

    Args:
        one: LaTeX that `is_expression` accepts (equality.py).
        other: likewise.
        budget: what the comparison takes of the answer's time is subtracted from it.

    Returns:
        Whether they are equal. The result is remembered, so that no worker is asked twice.

    Raises:
        GradingError: timeout, memory or error. These are not remembered.

    >>> expressions_equal(r"\sqrt{8}", r"2\sqrt{2}", Budget())
    True
    """
    if (one, other) in _known:
        return _known[one, other]
    if budget.seconds <= 0:
        raise GradingError("timeout")
    pool = _pool()
    worker = pool.get()
    try:
        answer, seconds = worker.ask({"one": one, "other": other}, budget.seconds)
    finally:
        pool.put(worker)
    budget.seconds -= seconds
    if "failure" in answer:
        raise GradingError(answer["failure"])
    if len(_known) >= MAX_KNOWN:
        _known.clear()
    _known[one, other] = answer["equal"]
    return answer["equal"]


class Template:
    """The process that forks workers. It starts when the first is asked for, and again if it has died."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start_worker(self) -> tuple[int, socket.socket]:
        """Return the process id of a new worker, and the socket that leads to it.

        Raises:
            OSError: no worker started within SECONDS_TO_START.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with self._lock, theirs:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                return int(self._ask(b"start", theirs)), ours
            except BaseException:  # Ctrl-C too: an unread reply must not be taken for that to the next request
                ours.close()
                self._stop()
                raise

    def stop_worker(self, pid: int) -> None:
        """Kill a worker and wait until it is gone.

        The template does it. As the parent, only it knows that the id is still that of the worker.
        """
        with self._lock:
            if self._process is not None:
                try:
                    self._ask(str(pid).encode())
                except OSError:  # the template is dead, and its workers end by themselves
                    self._stop()

    def stop(self) -> None:
        """End the template and all its workers, and wait until they are gone."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._stop()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                # -P: no folder of ours comes before sympy's imports
                [sys.executable, "-P", str(Path(__file__).resolve()), str(self._memory_bytes)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the run alone, which decides when its workers end
            )

    def _ask(self, request: bytes, *files: socket.socket) -> bytes:
        if self._socket is None:
            raise OSError("the template is not running")
        self._socket.settimeout(SECONDS_TO_START)
        socket.send_fds(self._socket, [request], [file.fileno() for file in files])
        try:
            reply = self._socket.recv(MAX_MESSAGE_BYTES)
        except TimeoutError:  # to the caller, this would be the timeout of a question
            raise OSError("the template does not answer") from None
        if not reply:
            raise OSError("the template has ended")
        return reply

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()  # the template then kills its workers and ends
            self._socket = None
        if self._process is not None:
            try:
                self._process.wait(SECONDS_PER_ITEM)
            except subprocess.TimeoutExpired:  # it is still importing
                self._process.kill()
                self._process.wait()
            self._process = None


class Worker:
    """A process that compares expressions. It starts with the first question, and again after it was killed."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self._pid: int | None = None
        self._socket: socket.socket | None = None

    def ask(self, question: dict[str, str], seconds: float) -> tuple[dict[str, Any], float]:
        """Put a question to the worker.

        Args:
            question: the expressions `one` and `other`.
            seconds: the time after which the worker is killed. The start of a process does not count.

        Returns:
            `{"equal": bool}`, or `{"failure": reason}` with the reason timeout, memory or error; and the seconds that
            the comparison took.
        """
        started = time.perf_counter()
        try:
            if self._socket is None:
                self._pid, self._socket = self.template.start_worker()
            started = time.perf_counter()
            answer = self._exchange(question, seconds)
        except TimeoutError:
            answer = {"failure": "timeout"}
        except OSError:
            answer = {"failure": "error"}
        except BaseException:  # Ctrl-C: an unread answer must not be taken for that to the next question
            self.stop()
            raise
        if "failure" in answer:
            self.stop()
        return answer, time.perf_counter() - started

    def stop(self) -> None:
        """Kill the process and wait until it is gone."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._pid is not None:
            self.template.stop_worker(self._pid)
            self._pid = None

    def _exchange(self, question: dict[str, str], seconds: float) -> dict[str, Any]:
        connection = cast(socket.socket, self._socket)
        connection.settimeout(seconds)
        connection.send(json.dumps(question).encode())
        answer = connection.recv(MAX_MESSAGE_BYTES)
        return json.loads(answer) if answer else {"failure": "error"}


def stop_workers() -> None:
    """End all worker processes; the next comparison starts new ones."""
    with _pool_lock:
        pool = _pools.pop(os.getpid(), None)
    if pool is not None:
        workers = [pool.get() for _ in range(NUM_WORKERS)]
        for worker in workers:
            worker.stop()
        workers[0].template.stop()


atexit.register(stop_workers)
_known: dict[tuple[str, str], bool] = {}
_pools: dict[int, "queue.LifoQueue[Worker]"] = {}  # by process id: a fork must not share its parent's sockets
_pool_lock = threading.Lock()


def _pool() -> "queue.LifoQueue[Worker]":
    with _pool_lock:
        if os.getpid() not in _pools:
            _pools.clear()
            _pools[os.getpid()] = queue.LifoQueue()
            template = Template()
            for _ in range(NUM_WORKERS):
                _pools[os.getpid()].put(Worker(template))
        return _pools[os.getpid()]


def serve(memory_bytes: int) -> None:
    """Run the template: fork a worker for each socket that arrives, kill the worker whose process id arrives.

    When the other end is closed, or its process is gone, all workers are killed.
    """
    # Workers inherit what the first comparison imports and builds.
    compare_expressions(r"\frac{x}{2}+\sqrt{y}+\sin 1", "x^2+1")
    control = socket.socket(fileno=0)
    workers: set[int] = set()
    try:
        while True:
            request, files, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1)
            if not request:
                return
            if files:
                pid = os.fork()  # safe, because the template has one thread
                if pid == 0:
                    control.close()
                    workers.clear()  # a worker must not kill the others
                    return work(socket.socket(fileno=files[0]), memory_bytes)
                os.close(files[0])
                workers.add(pid)
                control.send(str(pid).encode())
            else:
                _kill({int(request)} & workers)
                workers.discard(int(request))
                control.send(b"gone")
    finally:
        _kill(workers)


def _kill(workers: set[int]) -> None:
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def work(connection: socket.socket, memory_bytes: int) -> None:
    """Run a worker: compare the expressions that arrive, under limits on memory, file size and time."""
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while message := connection.recv(MAX_MESSAGE_BYTES):
        # If parent and template are gone, nobody else ends a comparison that hangs. The signal's default action does.
        signal.setitimer(signal.ITIMER_REAL, 3 * SECONDS_PER_ITEM)
        question = json.loads(message)
        try:
            answer: dict[str, Any] = {"equal": compare_expressions(question["one"], question["other"])}
        except Exception as error:
            # This is no expression, or none that sympy can handle. It is not shown to be equal.
            answer = {"failure": "memory"} if _is_out_of_memory(error) else {"equal": False}
        connection.send(json.dumps(answer).encode())
        signal.setitimer(signal.ITIMER_REAL, 0)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error is a lack of memory, or was raised while one was handled.

    The interpreter raises SystemError where its own C code runs out of memory without saying so.
    """
    while error is not None and not isinstance(error, MemoryError | SystemError):
        error = error.__cause__ or error.__context__
    return error is not None


def compare_expressions(one: str, other: str) -> bool:
    r"""Return whether two LaTeX expressions have the same value at each of `POINTS` at which both have one.

    Rational values are compared exactly. Other values are computed to 60 digits and compared to 40. Two expressions
    differ if at some point only one has a value, or if neither has a value at any point.

    >>> compare_expressions("(x+1)^2", "x^2+2x+1"), compare_expressions("x+1", "x+2")
    (True, False)
    """
    import sympy

    a, b = _to_sympy(one), _to_sympy(other)
    if any(expression.has(sympy.oo, -sympy.oo) for expression in (a, b)):
        return bool(a == b)
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    num_equal = 0
    for point in POINTS if symbols else POINTS[:1]:
        values = {symbol: sympy.Rational(*point[index % len(point)]) for index, symbol in enumerate(symbols)}
        x, y = a.subs(values).doit(), b.subs(values).doit()
        are_defined = [not value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo) for value in (x, y)]
        if are_defined != [True, True]:
            if any(are_defined):
                return False
            continue
        if not _same_value(x, y):
            return False
        num_equal += 1
    return num_equal > 0


# Values of both signs and several sizes, a different one for each symbol. What is equal at all of them is equal.
POINTS = (
    ((3, 7), (-5, 11), (8, 13), (-2, 17)),
    ((-7, 19), (12, 23), (-3, 5), (9, 4)),
    ((41, 13), (37, 17), (-53, 11), (29, 7)),
    ((-67, 9), (-31, 12), (47, 5), (-19, 3)),
    ((1013, 6), (-907, 8), (811, 9), (-701, 4)),
    ((-2003, 12), (1801, 7), (-1609, 11), (1409, 3)),
)


def _same_value(x: Any, y: Any) -> bool:
    import sympy

    if x.is_Rational and y.is_Rational:
        return bool(x == y)
    x, y = (sympy.N(value, 60, maxn=400) for value in (x, y))
    if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
        return False
    size = max(abs(x), abs(y))
    # A value of exactly zero is computed as noise, which is far below any value that an answer has.
    return bool(abs(x - y) <= size * sympy.Float(10, 60) ** -40) or bool(size < sympy.Float(10, 60) ** -50)


@lru_cache(256)  # parsing is most of the work, and the answers to a question share their ground truth
def _to_sympy(text: str) -> Any:
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex

    text = re.sub(r"\d*\.\d+", _as_fraction, text)  # a fraction is exact, sympy's Float is not
    text = re.sub(r"\^\\circ", r"\\cdot\\frac{\\pi}{180}", text)
    text = re.sub(r"\^(?:T|\{T\})", "^{(T)}", text)  # a power; the parser would read x^T as a transpose
    text = text.replace("I", r"\iota ")  # a variable; the parser would read it as i
    converter: Any = _Latex2Sympy(config=ConversionConfig(lowercase_symbols=False))
    converter.convert_postfix_list = partial(_product, converter)
    expression = converter.parse(normalize_latex(text, NormalizationConfig()))
    if not isinstance(expression, sympy.Expr):
        raise ValueError(f"{text} is not an expression")
    constants = {"i": sympy.I, "e": sympy.E}
    return expression.subs({symbol: constants.get(str(symbol), symbol) for symbol in expression.free_symbols})


def _product(converter: Any, factors: list[Any], start: int = 0) -> Any:
    r"""Multiply factors that stand side by side; only digits before a last \frac are a mixed number.

    The converter's own method adds any integer to any rational that follows. It would read (2)(3) as 5.
    """
    is_mixed = (
        len(factors) == start + 2 and factors[start].getText().isdigit() and factors[-1].getText().startswith(r"\frac")
    )
    if len(factors) == start + 1 or is_mixed:
        return type(converter).convert_postfix_list(converter, factors, start)
    return converter.mul_flat(converter.convert_postfix(factors[start]), _product(converter, factors, start + 1))


def _as_fraction(match: re.Match[str]) -> str:
    numerator, denominator = Fraction(match[0]).as_integer_ratio()
    return rf"(\frac{{{numerator}}}{{{denominator}}})"


if __name__ == "__main__":
    serve(int(sys.argv[1]))
