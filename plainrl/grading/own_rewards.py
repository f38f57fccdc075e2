"""Calling a reward function of the user's own: with which fields, for how long, and what becomes of a mistake.

    def my_reward(response, ground_truth, question, level):
        return 0.5                               # or {"reward": 0.5, "is_short": 1.0}

Parameters after the first two are filled by name, from the fields of the record. The function returns a number, or a
dictionary with the key `reward`. Whatever else it returns or raises costs one response: it counts as 0, with a line
that names the function.
"""

import ctypes
import inspect
import math
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

USUAL_KEYS = ("format_reward", "answer_reward", "reward")
# What metrics and samples are named already.
TAKEN_KEYS = {
    *("timeouts", "out_of_memory", "errors", "accuracy"),
    *("question", "sample", "prompt", "response", "ground_truth", "advantage", "token_entropy"),
    *("response_length", "finish_reason"),
}
EXAMPLE = "return a finite number, or a dictionary of them with the key 'reward'"


class RewardError(ValueError):
    """A reward function is of no use: the user's mistake, shown as one line."""


class CallError(Exception):
    """A call of a reward function failed. `kind` is `error` or `timeout`; the message is one line."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Wanted(NamedTuple):
    """The fields that a function asks for: those that it names, those of them that it needs, or all of them.

    With `**fields` it gets all but those that are called like its first two parameters.
    """

    names: frozenset[str]
    required: frozenset[str]
    takes_all: bool
    taken: frozenset[str] = frozenset()


def wanted_fields(function: Callable[..., Any]) -> Wanted:
    """Return the fields that a reward function asks for: its parameters after the first two.

    Raises:
        RewardError: it does not take a response and a ground truth.

    >>> wanted_fields(lambda response, ground_truth, level, weight=1.0: level).required
    frozenset({'level'})
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin that does not tell
        return Wanted(frozenset(), frozenset(), takes_all=False)
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(positional) < 2 and not takes_any:
        raise RewardError(
            f"the reward function {name_of(function)} takes {signature}: let it take (response, ground_truth), and "
            "fields of the record by name after them"
        )
    named = [p for p in parameters if p not in positional[:2] and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Wanted(
        frozenset(p.name for p in named),
        frozenset(p.name for p in named if p.default is p.empty),
        takes_all=any(p.kind is p.VAR_KEYWORD for p in parameters),
        taken=frozenset(p.name for p in positional[:2] if p.kind is p.POSITIONAL_OR_KEYWORD),
    )


def call_reward(
    function: Callable[..., Any],
    response: str,
    ground_truth: str,
    fields: Mapping[str, Any],
    max_seconds: float | None,
) -> dict[str, float]:
    """Return what a reward function says of a response, complete: see `complete_rewards`.

    The function is never called by two threads at once. With a limit it runs in a thread of its own, which is given up
    if the call takes longer. A call that never comes back to Python, such as an endless regular expression, cannot be
    given up: the phase's own limit then ends the run.

    Raises:
        CallError: the function raised an exception, took too long, or returned no reward.
    """
    wanted = wanted_fields(function)
    names = fields.keys() - wanted.taken if wanted.takes_all else wanted.names
    chosen = {name: value for name, value in fields.items() if name in names}

    def call() -> Any:
        return function(response, ground_truth, **chosen)

    if isinstance(threading.current_thread(), _Caller):  # a reward that asks another one
        outcome = _run(call)
    else:
        with _one_by_one:
            outcome = _run(call) if max_seconds is None else _call_in_thread(call, max_seconds)
    if outcome is None:
        message = f"the reward function {name_of(function)} took longer than max_reward_seconds = {max_seconds:g}"
        raise CallError("timeout", message)
    result, error = outcome
    if error is not None:
        raise CallError("error", _describe_exception(function, error)) from error
    return complete_rewards(result, function)


def complete_rewards(result: Any, function: Callable[..., Any]) -> dict[str, float]:
    """Return what a user's function returned as floats by name, with the usual keys that it may leave out.

    Raises:
        CallError: it is neither a finite number nor a dictionary of them with `reward`, or takes a name that is taken.
    """
    items = result if isinstance(result, Mapping) else {"reward": result}
    try:  # numbers of numpy and torch are numbers too; text, an array of several and an integer too large are none
        rewards = {key: float(v) if isinstance(v, SupportsFloat) else math.nan for key, v in items.items()}
    except (TypeError, ValueError, RuntimeError, OverflowError):
        rewards = {}
    if "reward" not in rewards or not all(map(math.isfinite, rewards.values())):
        shown = repr(result) if len(repr(result)) <= 100 else f"{repr(result)[:100]}..."
        raise CallError("error", f"the reward function {name_of(function)} returned {shown}: {EXAMPLE}")
    if taken := [key for key in rewards if key in TAKEN_KEYS or not isinstance(key, str)]:
        raise CallError("error", f"the reward function {name_of(function)} returned the key {taken[0]!r}: rename it")
    rewards.setdefault("answer_reward", rewards["reward"])
    rewards.setdefault("format_reward", 1.0)
    return rewards


def name_of(function: Callable[..., Any]) -> str:
    """Return a function's name for messages: `file.py:function` where it has a file."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    file = _file_of(function)
    return f"{file}:{name}" if file else f"{getattr(function, '__module__', '')}.{name}"


def say_once(problem: str) -> None:
    """Print why a response could not be graded, but no more than `MOST_SAID` different reasons in a process."""
    if problem not in _said and len(_said) < MOST_SAID:
        _said.add(problem)
        text = f"warning: {problem}; the response counts as 0, and reward/errors or reward/timeouts counts it"
        print(text, file=sys.stderr, flush=True)


MOST_SAID = 5
_said: set[str] = set()
_one_by_one = threading.RLock()  # a user's function need not be safe to call from several threads
Outcome = tuple[Any, BaseException | None]


def _run(call: Callable[[], Any]) -> Outcome:
    try:
        return call(), None
    except (Exception, SystemExit) as error:  # of any type: it is the user's code
        return None, error


class _Caller(threading.Thread):
    """A thread that makes one call after the other. As a daemon it does not keep the process alive if one hangs."""

    def __init__(self) -> None:
        super().__init__(name="reward function", daemon=True)
        self.is_given_up = False
        self.calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Outcome]]] = queue.SimpleQueue()

    def run(self) -> None:
        while not self.is_given_up:
            call, outcomes = self.calls.get()
            outcomes.put(_run(call))


_callers: list[_Caller] = []  # none, or the one that is free


def _call_in_thread(call: Callable[[], Any], max_seconds: float) -> Outcome | None:
    """Return the outcome of a call, or None if it takes too long. Then its thread is stopped, or left to itself."""
    if not _callers or not _callers[0].is_alive():
        _callers[:] = [_Caller()]
        _callers[0].start()
    outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    _callers[0].calls.put((call, outcomes))
    try:
        return outcomes.get(timeout=max_seconds)
    except queue.Empty:
        hung = _callers.pop()
        hung.is_given_up = True
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(hung.ident or 0), ctypes.py_object(SystemExit))
        return None


def _file_of(function: Callable[..., Any]) -> str:
    called = function if hasattr(function, "__code__") else type(function).__dict__.get("__call__")
    code = getattr(called, "__code__", None)
    return _short(code.co_filename) if code is not None else ""


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _describe_exception(function: Callable[..., Any], error: BaseException) -> str:
    """Return in one line what a function raised, and at which line of its file."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if _short(f.filename) == _file_of(function)]
    where = f" in line {lines[-1]}" if lines else ""
    text = f": {' '.join(str(error).split())[:200]}" if str(error) else ""
    return f"the reward function {name_of(function)} raised {type(error).__name__}{where}{text}"
