"""Comparing expressions in worker processes, each item under a limit on time and on memory.

What a language model writes may make a parser or sympy hang or grow. Here that costs one item, never the run: a worker
that exceeds a limit is killed and replaced. No signal is set in the calling process, so that any thread may call.

    this process --- template: imports sympy once, then forks a worker whenever it is asked to, in milliseconds
        |                |
        +----------- worker: answers one question at a time

    python math_worker.py MEMORY_BYTES   the template itself; its standard input is a socket
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
SECONDS_TO_START = 60.0  # the template imports sympy first
MEMORY_BYTES = 2**30  # beyond what a worker takes when it starts
MAX_MESSAGE_BYTES = 2**16
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
    """The process that forks workers; it is started when first asked for one, and again should it have died."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start_worker(self) -> tuple[int, socket.socket]:
        """Return the process id of a new worker, and the socket to talk to it.

        Raises:
            OSError: there is none, within SECONDS_TO_START.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with self._lock, theirs:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                return int(self._ask(b"start", theirs)), ours
            except BaseException:  # Ctrl-C as well: an answer that nobody has read must not be the next question's
                ours.close()
                self._stop()
                raise

    def stop_worker(self, pid: int) -> None:
        """Kill a worker and wait until it is gone. It is for the template to do: to its parent alone the id is sure."""
        with self._lock:
            if self._process is not None:
                try:
                    self._ask(str(pid).encode())
                except OSError:  # the template is dead, and its worker ends by itself
                    self._stop()

    def stop(self) -> None:
        """End the process, and with it all its workers; wait until they are gone."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._stop()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), str(self._memory_bytes)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the run, which decides when its workers end
            )

    def _ask(self, request: bytes, *files: socket.socket) -> bytes:
        if self._socket is None:
            raise OSError("the template is not there")
        self._socket.settimeout(SECONDS_TO_START)
        socket.send_fds(self._socket, [request], [file.fileno() for file in files])
        try:
            reply = self._socket.recv(MAX_MESSAGE_BYTES)
        except TimeoutError:  # not the timeout of a question
            raise OSError("the template does not answer") from None
        if not reply:
            raise OSError("the template has ended")
        return reply

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()  # at which the template kills its workers and ends
            self._socket = None
        if self._process is not None:
            try:
                self._process.wait(SECONDS_PER_ITEM)
            except subprocess.TimeoutExpired:  # it still imports
                self._process.kill()
                self._process.wait()
            self._process = None


class Worker:
    """A process that compares expressions; it is started when first asked, and again after it was killed."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self._pid: int | None = None
        self._socket: socket.socket | None = None

    def ask(self, question: dict[str, str], seconds: float) -> tuple[dict[str, Any], float]:
        """Return the worker's answer, or after so many seconds the reason why there is none; and the seconds it took.

        The time to start a process is not counted: it is not the question's.
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
        except BaseException:  # Ctrl-C: an answer that nobody has read must not be the next question's
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
_pools: dict[int, "queue.LifoQueue[Worker]"] = {}  # by process: a fork must not share its parent's sockets
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
    """Be the template: fork a worker for each socket that comes in, kill the worker whose process id comes in.

    When the other side closes its end, or is gone, all workers are killed.
    """
    compare_expressions(r"\frac{x}{2}+\sqrt{y}+\sin 1", "x^2+1")  # what is imported or built on first use is there now
    control = socket.socket(fileno=0)
    workers: set[int] = set()
    try:
        while True:
            request, files, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1)
            if not request:
                return
            if files:
                pid = os.fork()  # safe: there is one thread
                if pid == 0:
                    control.close()
                    workers.clear()  # they are not its own to kill
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
    """Be a worker: compare the expressions that come in, under limits on memory, files and time."""
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while message := connection.recv(MAX_MESSAGE_BYTES):
        # Should parent and template be gone, nobody else would end a computation that hangs: the default action does.
        signal.setitimer(signal.ITIMER_REAL, 3 * SECONDS_PER_ITEM)
        question = json.loads(message)
        try:
            answer: dict[str, Any] = {"equal": compare_expressions(question["one"], question["other"])}
        except Exception as error:
            # Not an expression after all, or one that sympy cannot handle: it is not shown to be equal.
            answer = {"failure": "memory"} if _is_out_of_memory(error) else {"equal": False}
        connection.send(json.dumps(answer).encode())
        signal.setitimer(signal.ITIMER_REAL, 0)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is, or was raised while handling, a lack of memory.

    SystemError is what the interpreter raises where its own C code ran out of memory and does not say so.
    """
    while error is not None and not isinstance(error, MemoryError | SystemError):
        error = error.__cause__ or error.__context__
    return error is not None


def compare_expressions(one: str, other: str) -> bool:
    r"""Return whether two LaTeX expressions have the same value at each of `POINTS` at which both have one.

    Rational values are compared exactly, others to 40 digits of the 60 that are computed. A point at which one has a
    value and the other has none tells them apart; so does having none at all.
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


# Of each sign and several sizes, another one for each symbol: what is equal at all of them is equal.
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
    # A value of exactly zero, computed, is noise far below any value that an answer has.
    return bool(abs(x - y) <= size * sympy.Float(10, 60) ** -40) or bool(size < sympy.Float(10, 60) ** -50)


@lru_cache(256)  # the answers to one question have their ground truth in common, and parsing is most of the work
def _to_sympy(text: str) -> Any:
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex

    text = re.sub(r"\d*\.\d+", _as_fraction, text)  # exact, where a Float is not
    text = re.sub(r"\^\\circ", r"\\cdot\\frac{\\pi}{180}", text)
    text = re.sub(r"\^(?:T|\{T\})", "^{(T)}", text)  # a power; the parser would take it for a transpose, x^T for x
    text = text.replace("I", r"\iota ")  # a variable; the parser would take it for i
    converter: Any = _Latex2Sympy(config=ConversionConfig(lowercase_symbols=False))
    converter.convert_postfix_list = partial(_product, converter)
    expression = converter.parse(normalize_latex(text, NormalizationConfig()))
    if not isinstance(expression, sympy.Expr):
        raise ValueError(f"{text} is no expression")
    constants = {"i": sympy.I, "e": sympy.E}
    return expression.subs({symbol: constants.get(str(symbol), symbol) for symbol in expression.free_symbols})


def _product(converter: Any, factors: list[Any], start: int = 0) -> Any:
    r"""Multiply what stands side by side; only digits before a last \frac are a mixed number.

    The converter's own method would add any integer to any rational that follows: 5 for (2)(3).
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
