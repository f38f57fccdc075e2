"""A script's command line: configuration, `--help`, signals, and errors in one line.

The configuration comes from schema defaults -> YAML file -> preset -> recipe -> `key=value` arguments. Each later
source overrides the earlier ones. The result is validated once, at the end. A resumed run reads its own configuration
instead of the YAML file.
"""

import difflib
import os
import select
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from plainrl.changes import describe_changes, with_defaults
from plainrl.config import ConfigType, RunConfig
from plainrl.devices import run_command
from plainrl.faults import describe_fault
from plainrl.grading.rewards import RewardError
from plainrl.help import SCHEMAS, TABLES, blocks_of, explain, help_text
from plainrl.records import Stopped, UserError
from plainrl.yaml_files import YamlError, load_yaml

PIPE_STATUS = 128 + signal.SIGPIPE  # 141: whoever reads the output has closed it, as `head -1` does
PACKAGES = ("experiments", "supplement")  # whose modules are run with -m
LONGEST_MESSAGE = 2000  # characters: a value that a message shows may be a whole file
SMALL_GPU_BYTES = 40e9  # a smaller card cannot hold what AdamW on all weights of the presets' model takes
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, the scheduler, a closed terminal


def load_config(schema: type[ConfigType], yaml_path: str | Path, arguments: list[str]) -> ConfigType:
    """Return the validated configuration of a script.

    Args:
        schema: the typed configuration to fill.
        yaml_path: the script's YAML file. `config=path` among the arguments names another one.
        arguments: the command line after the script's name, each `key=value` (value in YAML syntax).

    With `resume`, the resolved configuration of that run replaces the YAML file; see `resumed_config`.

    Raises:
        UserError: an argument, key or value is wrong. The message names it, where it stands and what to do.
    """
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):  # bytes that Python could not decode
            raise UserError(f"argument {argument!r}: not UTF-8 text; name it in UTF-8")
    if {"--help", "-h"} & set(arguments):
        keys = [argument.partition("=")[0] for argument in arguments if argument not in ("--help", "-h")]
        print_help(schema, Path(yaml_path), keys)
        raise SystemExit(0)
    overrides = _parse_arguments(arguments, schema)
    if overrides.get("resume", "auto") not in ("", "auto"):
        return resumed_config(schema, Path(overrides["resume"]), overrides)
    yaml_path = Path(overrides.get("config", yaml_path))
    yaml_values = read_yaml(yaml_path)
    presets, recipes = blocks_of(yaml_values, "presets", yaml_path), blocks_of(yaml_values, "recipes", yaml_path)
    yaml_values = {key: value for key, value in yaml_values.items() if key not in ("presets", "recipes")}
    preset = str(overrides.get("preset", yaml_values.get("preset", "auto")))
    if preset == "auto":
        preset, reason = choose_preset()
        print(f"preset: {preset} ({reason})")
    elif not presets:
        raise UserError(f"preset = {preset}: {yaml_path} has no presets; leave preset out, or add the block")
    if presets and preset not in presets:
        raise UserError(f"preset = {preset}: {yaml_path} has {', '.join(map(str, presets))}")
    preset_values = presets.get(preset, {})
    recipe = str(overrides.get("recipe", preset_values.get("recipe", yaml_values.get("recipe", ""))))
    if recipe and recipe not in recipes:
        raise UserError(f"recipe = {recipe}: {yaml_path} has {', '.join(map(str, recipes)) or 'none'}")
    if yaml_values.get("resume") or preset_values.get("resume"):
        raise UserError(f"resume ({yaml_path}): it is read from the command line alone; give it there")

    config = _validate(
        schema,
        {
            str(yaml_path): yaml_values,
            f"{yaml_path}, preset {preset}": preset_values,
            f"{yaml_path}, recipe {recipe}": recipes.get(recipe, {}),
            "command line": {key: value for key, value in overrides.items() if key != "config"},
        },
        {key: value for key, value in {"preset": preset, "resume": ""}.items() if key in schema.model_fields},
    )
    if overrides.get("resume") == "auto":
        folder = newest_unfinished_run(schema, config)
        if folder is not None:
            return resumed_config(schema, folder, overrides)
        print("resume = auto: there is no unfinished run with a checkpoint, so this is a new one")
    for warning in config.warnings():
        print(f"warning: {warning}")
    return config


def print_help(schema: type[RunConfig], yaml_path: Path, keys: Sequence[str]) -> None:
    """Print all keys by group, or explain the named ones."""
    for key in keys:
        print(explain(schema, yaml_path, key, read_yaml(yaml_path)))
    if not keys:
        print(help_text(schema, yaml_path, command_of(Path(sys.argv[0]))))


def command_of(script: Path) -> str:
    """Return how a script is started, after `python`.

    >>> command_of(Path("GRPO_train.py")), command_of(Path("/a/experiments/benchmark/__main__.py"))
    ('GRPO_train.py', '-m experiments.benchmark')
    """
    names = script.with_suffix("").parts
    package = next((name for name in reversed(names) if name in PACKAGES), None)
    if package is None:
        return script.name
    last = len(names) - 1 - names[::-1].index(package)  # a clone may lie below a folder of that name
    return f"-m {'.'.join(name for name in names[last:] if name != '__main__')}"


def resume_command(folder: Path) -> str:
    """Return how the run in a folder is gone on with: its own script, with its own settings."""
    return run_command(f"python {command_of(Path(sys.argv[0]))} {shlex.quote(f'resume={folder}')}")


def resumed_config(schema: type[ConfigType], folder: Path, overrides: Mapping[str, Any]) -> ConfigType:
    """Return the configuration that a run's folder holds, with the changes of the command line if they are allowed.

    Args:
        schema: the script's configuration.
        folder: the run's folder.
        overrides: what the command line gives.

    Raises:
        UserError: there is no such run, another configuration file or preset is named, or settings differ although
            `resume_with_changes` is not true. The message lists them.
    """
    if "config" in overrides:
        raise UserError(
            f"config = {overrides['config']}: {folder} goes on with its own config.yaml; leave config out, and name "
            "the keys that are to change"
        )
    if folder.name in ("", ".."):  # `resume=.`: its name is the run's
        folder = folder.resolve()
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"resume = {folder}: {path} does not exist; name the folder of a run, or use resume=auto")
    saved = read_yaml(path)
    if unknown := [key for key in saved if key not in schema.model_fields]:
        raise UserError(
            f"resume = {folder}: its config.yaml has keys that this script does not know ({', '.join(unknown)}); go on "
            "with the script and the version that made it (environment.json names both), or begin a new run"
        )
    if overrides.get("preset", "auto") not in ("auto", saved.get("preset")):
        raise UserError(
            f"preset = {overrides['preset']}: {folder} was started with preset {saved.get('preset')}, whose values it "
            "keeps; leave preset out, and name the keys that are to change"
        )
    if overrides.get("recipe", saved.get("recipe", "")) != saved.get("recipe", ""):
        raise UserError(
            f"recipe = {overrides['recipe']}: {folder} keeps the values that it was started with; leave recipe out, "
            "and name the keys that are to change"
        )
    overrides = {key: value for key, value in overrides.items() if key != "preset"}
    fixed = {"run_name": folder.name, "runs_dir": str(folder.parent), "resume": str(folder)}
    config = _validate(schema, {str(path): saved, "command line": overrides}, fixed)
    changes = describe_changes(with_defaults(saved, schema), config.model_dump(mode="json"))
    if changes and not getattr(config, "resume_with_changes", False):
        raise UserError(
            f"resume = {folder}: settings differ from the run's own: {', '.join(changes)}; leave them out, or accept "
            "them with resume_with_changes=true"
        )
    print(f"settings of {path}{', changed: ' if changes else ''}{', '.join(changes)}")
    return config


def newest_unfinished_run(schema: type[RunConfig], config: RunConfig) -> Path | None:
    """Return the folder that `resume=auto` means: the one of run_name if given, else the newest unfinished run.

    Runs of other scripts and those in folders of other users are passed over. One whose configuration cannot be read
    is, too, and is named.
    """
    if config.run_name:
        folder = Path(config.runs_dir) / config.run_name
        return folder if (folder / "config.yaml").is_file() else None
    unfinished = [
        path.parent
        for path in Path(config.runs_dir).glob("*/config.yaml")
        if os.access(path.parent / "lock", os.W_OK)
        and (path.parent / "checkpoints").is_dir()
        and (path.parent / "lock").is_file()
        and not (path.parent / "final").is_dir()
    ]
    own = [folder for folder in unfinished if _is_of_schema(schema, folder / "config.yaml")]
    # the newest by its lock, because each process that starts or resumes a run writes it
    return max(own, key=lambda folder: (folder / "lock").stat().st_mtime, default=None)


def choose_preset() -> tuple[str, str]:
    """Return the preset for this machine, and the reason.

    Only where there is a CUDA device, CUDA is started to read how much memory it has. Nothing is allocated on it.
    """
    import torch

    num_devices = torch.cuda.device_count()
    preset = ("laptop", "one-gpu", "two-gpu")[min(num_devices, 2)]
    reason = f"{num_devices} CUDA device{'s' * (num_devices != 1)} present"
    if num_devices and torch.cuda.is_available():  # if the driver is too old, check_devices says so
        sizes = [torch.cuda.get_device_properties(device).total_memory for device in range(min(num_devices, 2))]
        if min(sizes) < SMALL_GPU_BYTES:  # the first card alone is used
            preset = "one-gpu" if sizes[0] >= SMALL_GPU_BYTES else "small-gpu"
        reason += f", memory {' and '.join(f'{size / 2**30:.1f}' for size in sizes)} GiB"
    return preset, reason


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file: see plainrl/yaml_files.py.

    Raises:
        UserError: the file is missing, is not UTF-8, is not YAML (the message names the line) or is not a mapping.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"config = {path}: {error.strerror or error}; name a YAML file that can be read") from None
    try:
        values = load_yaml(content.decode("utf-8"), text_keys(*SCHEMAS))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    except YamlError as error:
        raise UserError(f"{path}, line {error.line}: {error}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"{path}, line 1: expected `key: value` lines, found {found}; write them, or name another file")
    return values


def text_keys(*schemas: type[RunConfig]) -> set[str]:
    """Return the keys that take any text, which is then taken as it is written."""
    return {key for schema in schemas for key, field in schema.model_fields.items() if field.annotation is str}


def run_main(main: Callable[[list[str]], None]) -> None:
    """Run a script's `main`, and end the process as its user expects.

    A UserError, and what the operating system refuses, become one line and exit status 2. A signal gives 128 + its
    number. If whoever reads the output has closed it, the script ends without a word: with 141 as soon as it writes
    (what a signal SIGPIPE gives), or with 0 if only the last lines were not read. A bug keeps its traceback.
    """

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise Stopped(signal_number)

    previous_handlers = handle_signals(stop)
    try:
        main(sys.argv[1:])
    except (UserError, RewardError) as error:
        say(f"error: {_as_one_line(str(error))}")
        sys.exit(2)
    except Stopped as stopped:
        say(f"stopped by {stopped}")
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        say("stopped by Ctrl-C")
        sys.exit(130)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and is_output_closed():  # else another pipe broke, which is a bug
            sys.exit(PIPE_STATUS)
        fault = describe_fault(error)
        if fault is None:
            raise
        say(f"error: {_as_one_line(fault)}")
        sys.exit(2)
    finally:
        _flush_output()
        restore_handlers(previous_handlers)


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Set the handler of each signal that asks a run to stop, and return the previous handlers.

    A signal that is ignored, as under nohup, stays ignored.
    """
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in handled}


def restore_handlers(previous: Mapping[int, Any]) -> None:
    """Set the handlers again that `handle_signals` returned."""
    for number, handler in previous.items():
        signal.signal(number, handler)


def say(text: str) -> None:
    """Print a line to stderr. A closed terminal is not an error."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _as_one_line(message: str) -> str:
    """Return a message in one line; its middle is left out if it is very long."""
    line, half = " ".join(message.split()), LONGEST_MESSAGE // 2
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:half]} [...] {line[-half:]}"


def is_output_closed() -> bool:
    """Return whether nobody can read the standard output or the standard error any more."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _flush_output() -> None:
    """Write what is still buffered. What nobody reads goes nowhere, else the interpreter would exit with status 120."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream is not None:  # closed by the caller
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _validate(
    schema: type[ConfigType], layers: Mapping[str, Mapping[str, Any]], fixed: Mapping[str, Any]
) -> ConfigType:
    """Return the validated configuration. Each layer is named by its source, and later layers override earlier ones."""
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, values in layers.items():
        merged |= values
        sources |= dict.fromkeys(values, source)
    try:
        return schema.model_validate(merged | dict(fixed))
    except ValidationError as error:
        raise UserError(_describe(error, schema, sources)) from None


def _is_of_schema(schema: type[RunConfig], path: Path) -> bool:
    """Whether a configuration is one of this schema. A user's own function is not looked up: that executes a file."""
    try:
        values = read_yaml(path)
    except UserError as error:
        print(f"resume = auto: {path.parent} is passed over ({error})")
        return False
    own = [key for key in TABLES if ":" in str(values.get(key))]
    try:
        schema.model_validate({key: value for key, value in values.items() if key not in own})
    except (UserError, ValidationError) as error:
        if values.keys() <= schema.model_fields.keys():  # of this script, whose keys no other has all
            reason = _describe(error, schema, {}) if isinstance(error, ValidationError) else error
            print(f"resume = auto: {path.parent} is passed over ({reason})")
        return False
    return True


def _parse_arguments(arguments: list[str], schema: type[RunConfig]) -> dict[str, Any]:
    as_written = {"config"} | text_keys(schema)
    overrides: dict[str, Any] = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator or not key.isidentifier():
            raise UserError(f"argument {argument!r}: write key=value; --help lists the keys")
        if key in overrides:
            raise UserError(f"{key} is given twice on the command line: keep one")
        try:
            overrides[key] = text if key in as_written else load_yaml(text)
        except YamlError as error:
            raise UserError(f"{key} = {text!r} (command line): {error}") from None
    return overrides


def _describe(error: ValidationError, schema: type[RunConfig], sources: dict[str, str]) -> str:
    problems: dict[str, str] = {}
    for item in error.errors():
        if not item["loc"]:
            problems[item["msg"]] = item["msg"].removeprefix("Value error, ")
            continue
        key = str(item["loc"][0])
        where = f" ({sources[key]})" if key in sources else ""
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, schema.model_fields, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]}?" if near else "--help lists the keys"
            problems[key] = f"unknown key {key}{where}: {fix}"
        else:
            message = item["msg"].removeprefix("Value error, ")
            if message.startswith(f"{key} = "):  # ours, which names the value already
                problems[key] = f"{message}{where}"
                continue
            message = message[0].lower() + message[1:]
            previous = f"{problems[key]}, or " if key in problems else f"{key} = {item['input']!r}{where}: "
            problems[key] = previous + message
    return "; ".join(problems.values())
