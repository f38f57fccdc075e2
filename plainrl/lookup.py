"""Finding what a configuration names: an entry of a table, or a function of the user's own by its path.

    reward=r1_zero                   an entry of the table REWARD_FUNCTIONS
    reward=my_rewards.py:my_reward   a function in a file; the path is absolute or relative to the working directory
    reward=my_package.rewards:mine   a function in a module that Python can import

A file is executed once in a process, however often it is looked up. One that the program has imported is not executed
again. One that failed is not kept, as with Python's own `import`.

`TableOf` stands for a table of a module that is not imported yet. Its names are read from the module's source, so that
the command line can be checked before torch is imported.
"""

import ast
import difflib
import importlib
import importlib.util
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from plainrl.records import UserError

T = TypeVar("T")
PATH_FORMS = "file.py:function or package.module:function"
_loaded: dict[Path, ModuleType] = {}
_lock = threading.RLock()  # a file is half executed while another thread looks it up


class TableOf(Mapping[Any, Any]):
    """A table that a module holds. The module is imported when a value is asked for, not when a name is.

    >>> losses = TableOf("GRPO_helper", "LOSSES")
    >>> list(losses)[:2], "grpo_clip" in losses
    (['no_baseline', 'reinforce_with_baseline'], True)
    """

    def __init__(self, module: str, table: str) -> None:
        """Note where the table is: the module's name, and the name of its dictionary."""
        self._module, self._table = module, table

    def __getitem__(self, name: Any) -> Any:
        return getattr(importlib.import_module(self._module), self._table)[name]

    def __contains__(self, name: object) -> bool:
        return any(name == known for known in self)

    def __iter__(self) -> Iterator[Any]:
        if self._module in sys.modules:
            return iter(getattr(sys.modules[self._module], self._table))
        return iter(_names_in_source(self._module, self._table))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def look_up(name: str, table: Mapping[str, T], kind: str) -> T | Callable[..., Any]:
    """Return the entry of a table, or the function of the user's own, that a name stands for.

    Args:
        name: a name in the table, `file.py:function` or `package.module:function`.
        table: the choices that plainrl brings.
        kind: the configuration key that holds the name, for messages.

    Returns:
        `table[name]`, or what the user's file or module holds under the function's name.

    Raises:
        UserError: the name is unknown, the file or module is missing or fails, or it has no such function. The message
            is one line and says what to change.

    >>> look_up("double", {"double": 2}, "factor")
    2
    >>> look_up("math:sqrt", {}, "factor")(9.0)
    3.0
    """
    if name in table:
        return table[name]
    setting = f"{kind} = {name}"
    place, _, function_name = name.rpartition(":")
    if not place:
        raise UserError(_describe_unknown(name, table, kind))
    load = _load_file if place.endswith(".py") or "/" in place else _load_module
    with _lock:
        module = load(place, setting)
    return _get_function(module, function_name, setting)


@cache
def _names_in_source(module: str, table: str) -> tuple[Any, ...]:
    """Return the keys of a dictionary that is written out in a module's source."""
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin, f"{module} has no source"
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if table in names and isinstance(value := getattr(node, "value", None), ast.Dict):
            return tuple(ast.literal_eval(key) for key in value.keys if key)
    raise LookupError(f"{module} has no dictionary {table} that is written out")


def _describe_unknown(name: str, table: Mapping[str, Any], kind: str) -> str:
    if name.endswith(".py"):
        return f"{kind} = {name}: name the function in the file as well, {name}:function"
    near = difflib.get_close_matches(name, table, n=1)
    guess = f" did you mean {near[0]}?" if near else ""
    return f"{kind} = {name}: unknown;{guess} use {', '.join(table)}, or a function of your own as {PATH_FORMS}"


def _load_file(place: str, setting: str) -> ModuleType:
    """Return the module of a file, which is executed unless it has been."""
    path = Path(place).expanduser().resolve()
    if path in _loaded:  # a look-up stands in inner loops
        return _loaded[path]
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.py")], n=1)
        guess = f"did you mean {Path(place).with_name(near[0])}?" if near else "correct the path"
        raise UserError(f"{setting}: there is no file {path}; {guess}")
    for module in list(sys.modules.values()):
        file = getattr(module, "__dict__", {}).get("__file__")  # plain getattr would start the import of a lazy module
        if isinstance(file, str) and file.endswith(path.name) and Path(file).resolve() == path:
            _loaded[path] = module
            return module
    try:
        # Imported where that is possible, so that an `import` elsewhere finds the same module.
        _loaded[path] = importlib.import_module(path.stem) if _is_importable(path) else _execute(path)
        return _loaded[path]
    except (Exception, SystemExit) as error:
        raise UserError(_describe_failure(error, str(path), setting)) from error


def _load_module(place: str, setting: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
            message = f"{setting}: there is no module {error.name}; install it, or give its file as file.py:function"
            raise UserError(message) from None
        raise UserError(_describe_failure(error, place, setting)) from error


def _is_importable(path: Path) -> bool:
    """Return whether `import` finds this file under its name."""
    if not path.stem.isidentifier() or path.stem in sys.modules:
        return False
    spec = importlib.util.find_spec(path.stem)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == path


def _execute(path: Path) -> ModuleType:
    """Execute a file as a module whose name is its path, so that it cannot hide another module."""
    loader = SourceFileLoader(str(path), str(path))
    module = importlib.util.module_from_spec(ModuleSpec(str(path), loader, origin=str(path)))
    module.__file__ = str(path)
    sys.modules[str(path)] = module  # dataclasses and pickle look there
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[str(path)]
        raise
    return module


def _describe_failure(error: BaseException, place: str, setting: str) -> str:
    """Return a message with the file and line of what a user's module raised."""
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if not frame.filename.startswith(("<", importlib.__path__[0], __file__))]
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        place = f"{error.filename}:{error.lineno}"
    elif frames:  # the first file is the user's; its last line there is the closest to the cause
        place = next(
            f"{frame.filename}:{frame.lineno}" for frame in reversed(frames) if frame.filename == frames[0].filename
        )
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{setting}: {place}: {type(error).__name__}: {text}; correct that line, or install what it needs"


def _get_function(module: ModuleType, name: str, setting: str) -> Callable[..., Any]:
    functions = [
        key
        for key, value in vars(module).items()
        if inspect.isroutine(value) and getattr(value, "__module__", "") == module.__name__ and not key.startswith("_")
    ]
    choices = f"it has {', '.join(functions[:20])}" if functions else "it has no function"
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{setting}: {_file_of(module)} has no function {name!r}; {choices}{guess}")
    function = getattr(module, name)
    if not callable(function):
        kind = type(function).__name__
        raise UserError(f"{setting}: {name} in {_file_of(module)} is of type {kind}, not a function; {choices}")
    return function


def _file_of(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or module.__name__
