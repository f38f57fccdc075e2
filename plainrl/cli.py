"""A script's command line: configuration, `--help`, signals, and errors in one line.

The configuration comes from schema defaults -> YAML file -> preset -> recipe -> `config=` files -> `key=value`
arguments. Each later source overrides the earlier ones: see plainrl/layers.py. The result is validated once, at the
end. A resumed run reads its own configuration instead of the YAML files.
"""

import io
import os
import re
import select
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Generic, NamedTuple

from pydantic import ValidationError

from plainrl.changes import changes_since, with_defaults
from plainrl.chat_config import ChatConfig
from plainrl.config import ConfigType, RunConfig, SFTConfig
from plainrl.devices import choose_preset, guess_preset, has_gpu_driver, run_command
from plainrl.faults import describe_fault
from plainrl.folder_lock import is_known_to_be_locked
from plainrl.grading.own_rewards import RewardError
from plainrl.help import FLAGS, SCHEMAS, TABLES, explain, help_text, show_text
from plainrl.layers import (
    Files,
    check_block,
    describe_problems,
    find_typos,
    layers_of,
    layers_over,
    named_last,
    parse_arguments,
    read_yaml,
    validate,
    without_files,
)
from plainrl.records import Stopped, UserError, first_line
from plainrl.shared_config import DTYPE_KEYS
from plainrl.sources import is_pipe

PIPE_STATUS = 128 + signal.SIGPIPE  # 141: whoever reads the output has closed it, as `head -1` does
PACKAGES = ("experiments", "supplement")  # whose modules are run with -m
LONGEST_MESSAGE = 2000  # characters: a value that a message shows may be a whole file
# torchrun's. Read here, because vLLM sets the last one anew on a CPU.
RANK, NUM_RANKS, NUM_LOCAL_RANKS = (
    int(os.environ.get(name, default))
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1"))
)
SECONDS_FOR_FIRST_RANK = 8.0  # to say an error, before another rank says its own
EVALUATION_SCRIPT = "policy_evaluation.py"
PROGRAMS = {command: (schema, path) for schema, (command, path) in SCHEMAS.items()}
PROGRAMS |= {EVALUATION_SCRIPT: (SFTConfig, "config.yaml"), "-m experiments.chat": (ChatConfig, "config.yaml")}
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, the scheduler, a closed terminal


def load_config(schema: type[ConfigType], yaml_path: str | Path, arguments: list[str]) -> ConfigType:
    """Return the validated configuration of a script, and print what was chosen for the user.

    `--help` and `--show` print the keys, or the resolved configuration, and end the program.

    Args: as for `resolve`.

    Raises:
        UserError: as there.
    """
    answer_questions(command_of(Path(sys.argv[0])), schema, Path(yaml_path), arguments)
    resolved = resolve(schema, Path(yaml_path), arguments)
    is_resumed = getattr(resolved.config, "resume", "") != ""
    warnings = [] if is_resumed else resolved.config.warnings()  # a resumed run has had them
    for line in [*resolved.notes, *(f"warning: {warning}" for warning in warnings)] if RANK == 0 else ():
        print(line)
    return resolved.config


def answer_questions(command: str, schema: type[RunConfig], yaml_path: Path, arguments: Sequence[str]) -> None:
    """Print what `--help` or `--show` asks of a command, and end the program. Without them, do nothing."""
    questions = FLAGS & set(arguments)
    others = [argument for argument in arguments if argument not in questions]
    chosen = [argument for argument in others if argument.startswith(("preset=", "recipe=", "config="))]
    keys = [argument.partition("=")[0] for argument in others if argument not in chosen]
    if questions == {"--show"}:
        print(show_text(*resolve(schema, yaml_path, others)))
    elif questions and keys:
        print("\n".join(explain(schema, yaml_path, key, read_yaml(yaml_path)) for key in keys))
    elif questions:
        config = resolve(schema, yaml_path, chosen, guess_preset).config
        print(help_text(schema, yaml_path, command, config.model_dump(mode="json"), read_yaml(yaml_path)))
    if questions:
        raise SystemExit(0)


class Resolved(NamedTuple, Generic[ConfigType]):
    """A configuration, where each value that is no default comes from, and what to say of how it was found."""

    config: ConfigType
    sources: dict[str, str]
    notes: list[str]


def resolve(
    schema: type[ConfigType],
    yaml_path: Path,
    arguments: Sequence[str],
    choose: Callable[[], tuple[str, str]] | None = None,
    of_run: Files | None = None,
) -> Resolved[ConfigType]:
    """Return the validated configuration of a script, without printing it.

    Args:
        schema: the typed configuration to fill.
        yaml_path: the script's YAML file. Each `config=path` among the arguments names one that overlays it.
        arguments: the command line after the script's name, each `key=value` (value in YAML syntax).
        choose: what `preset: auto` means, with the reason; by default `choose_preset`.
        of_run: settings of another run, by the file that holds them. They count over `yaml_path`, and under `config=`.

    With `resume`, the resolved configuration of that run replaces the YAML files; see `resumed_config`.

    Raises:
        UserError: an argument, key or value is wrong. The message names it, where it stands and what to do.
    """
    overrides = parse_arguments(arguments, schema)
    # Each is read once, for it may be a pipe. One that is named twice counts where it stands last.
    given_files: dict[Path, dict[str, Any]] = {}
    for path in map(Path, overrides.get("config", ())):
        given_files[path] = given_files.pop(path, None) or read_yaml(path)
    if overrides.get("resume", "auto") not in ("", "auto"):
        return resumed_config(schema, Path(overrides["resume"]), overrides, given_files)
    files = ({} if yaml_path in given_files else {yaml_path: read_yaml(yaml_path)}) | dict(of_run or {}) | given_files
    given = without_files(overrides)
    preset, notes = named_last("preset", [*files.values(), given], default="auto"), []
    if preset == "auto":
        if choose is None and has_gpu_driver():  # torch is asked for GPUs, which takes seconds
            find_typos(schema, {**layers_of(files, preset, given), "command line": given})
        preset, reason = (choose or choose_preset)()
        notes = [f"preset: {preset} ({reason})"]
        check_block("preset", preset, files, needs_blocks=False)
    else:
        check_block("preset", preset, files, needs_blocks=True)
    layers = {**layers_of(files, preset, given), "command line": given}
    config, sources = validate(
        schema,
        layers,
        {key: value for key, value in {"preset": preset, "resume": ""}.items() if key in schema.model_fields},
    )
    if slow := [key for key in DTYPE_KEYS if key not in sources and getattr(config, key) == "float32"]:
        notes.append(f"{' and '.join(slow)}: float32 (this processor has no AVX-512, and is slow in 16 bits)")
    if overrides.get("resume") == "auto":
        if folder := newest_unfinished_run(schema, config):
            return resumed_config(schema, folder, overrides, given_files)
        notes.append("resume = auto: there is no unfinished run with a checkpoint, so this is a new one")
    return Resolved(config, sources, notes)


def check_arguments(command: str, arguments: Sequence[str]) -> None:
    """Answer the questions of a script's command line and find its mistakes, before anything large is imported.

    The script itself reads the arguments again, and prints what is to be said of them. A configuration file that is a
    pipe can be read only once, so that then nothing is checked here.

    Args:
        command: how the script is started, after `python`. Programs that are not in `PROGRAMS` are left alone.
        arguments: what follows it.
    """
    files = [argument.removeprefix("config=") for argument in arguments if argument.startswith("config=")]
    if command not in PROGRAMS or any(map(is_pipe, files)):
        return
    schema, yaml_path = PROGRAMS[command][0], Path(__file__).parent.parent / PROGRAMS[command][1]
    arguments = with_data_key(arguments) if command == EVALUATION_SCRIPT else arguments

    def check(_: list[str]) -> None:
        of_run = schema is ChatConfig and any(text.startswith("model=") for text in arguments)
        if of_run and FLAGS & set(arguments) <= {"--show"}:  # its run decides, too: the chat does the rest
            keys = [text for text in arguments if text not in FLAGS]
            return find_typos(schema, {"command line": without_files(parse_arguments(keys, schema))})
        answer_questions(command, schema, yaml_path, arguments)
        with redirect_stdout(io.StringIO()):  # the script says it
            resolve(schema, yaml_path, arguments)

    run_main(check)


def with_data_key(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of policy_evaluation.py, where `data` is another name of `validation_data`."""
    return [re.sub(r"^data(?==|$)", "validation_data", argument) for argument in arguments]


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


def own_command(arguments: Sequence[str]) -> str:
    """Return how this program is started with some arguments, by torchrun if it was."""
    nodes = f"--nnodes {NUM_RANKS // NUM_LOCAL_RANKS} " if NUM_LOCAL_RANKS < NUM_RANKS else ""
    program = "python" if NUM_RANKS == 1 else f"torchrun {nodes}--nproc-per-node {NUM_LOCAL_RANKS}"
    return run_command(f"{program} {command_of(Path(sys.argv[0]))} {shlex.join(arguments)}")


def resumed_config(
    schema: type[ConfigType], folder: Path, overrides: Mapping[str, Any], files: Files
) -> Resolved[ConfigType]:
    """Return the configuration that a run's folder holds, with the changes of the command line if they are allowed.

    Args:
        schema: the script's configuration.
        folder: the run's folder.
        overrides: what the command line gives.
        files: the content of each `config=FILE`.

    Raises:
        UserError: there is no such run, another name, preset, recipe or optimizer is given, or settings differ although
            `resume_with_changes` is not true. The message lists them. Those of a file `config=FILE` count, too.
    """
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
    named = {key: value for values in [*files.values(), overrides] for key, value in values.items()}
    for key, same in (("preset", "auto"), ("recipe", saved.get("recipe", ""))):
        if named.get(key, same) not in (same, saved.get(key)):
            raise UserError(
                f"{key} = {named[key]}: {folder} keeps the values that it was started with; leave {key} out, "
                "and name the keys that are to change"
            )
    fixed = {"run_name": folder.name, "runs_dir": str(folder.parent), "resume": str(folder)}
    for key, own in (("run_name", folder.name), ("runs_dir", folder.parent)):
        if named.get(key) and Path(str(named[key])).resolve() != Path(own).resolve():
            raise UserError(f"{key} = {named[key]}: {folder} keeps its name and its place; leave {key} out")
    layers = {str(path): saved, **layers_over(saved, files)}
    layers["command line"] = {key: value for key, value in overrides.items() if key not in ("preset", "config")}
    config, sources = validate(schema, layers, fixed)
    sources |= dict.fromkeys(fixed, "the run's folder")
    changes = changes_since(saved, config)
    if with_defaults(saved, schema).get("optimizer") != getattr(config, "optimizer", None):
        raise UserError(
            f"resume = {folder}: {', '.join(changes)}: the moments are of the other optimizer; leave it out, or start "
            "a new run with the model/ of a checkpoint as model"
        )
    if changes and not getattr(config, "resume_with_changes", False):
        raise UserError(
            f"resume = {folder}: settings differ from the run's own: {', '.join(changes)}; leave them out, or accept "
            "them with resume_with_changes=true"
        )
    return Resolved(config, sources, [f"settings of {path}{', changed: ' if changes else ''}{', '.join(changes)}"])


def newest_unfinished_run(schema: type[RunConfig], config: RunConfig) -> Path | None:
    """Return the folder that `resume=auto` means: the one of run_name if given, else the newest unfinished run.

    Runs of other scripts and those in folders of other users are passed over. One whose configuration cannot be read
    is, too, and is named. One that a process is writing is taken only if there is no other; opening it says so.
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
    return max(own, key=lambda run: (not is_known_to_be_locked(run), (run / "lock").stat().st_mtime), default=None)


def require_one_process(program: str) -> None:
    """Raise a UserError in a program that several ranks cannot share."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{program} runs in one process: start it without torchrun")


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
    except (UserError, RewardError, OSError) as error:
        if isinstance(error, BrokenPipeError) and is_output_closed():  # else another pipe broke, which is a bug
            sys.exit(PIPE_STATUS)
        message = describe_fault(error) if isinstance(error, OSError) else str(error)
        if message is None:
            raise
        _let_first_rank_speak()
        say(f"{of_rank()}error: {_as_one_line(message)}")
        _end_rank(2)
        sys.exit(2)
    except Stopped as stopped:
        if _speaks_for_all():  # torchrun's signal may come while the loss of a rank is told
            say(_describe_lost_rank(stopped.__context__) or f"stopped by {stopped}")
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        if not RANK:
            say("stopped by Ctrl-C")
        sys.exit(130)
    except Exception as error:
        if NUM_RANKS == 1:
            raise
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        lost = _describe_lost_rank(error)
        if not lost:
            _let_first_rank_speak()
            traceback.print_exception(error)
        elif _speaks_for_all():
            say(lost)
        _end_rank(1)
    finally:
        _flush_output()
        restore_handlers(previous_handlers)


def _let_first_rank_speak() -> None:
    """Wait, on any rank but the first. When one has ended, torchrun ends all: what all found is said once.

    An error of this rank alone is said after that.
    """
    if not RANK:
        _speaks_for_all()  # which the others are told
        return
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(SECONDS_FOR_FIRST_RANK)


def _speaks_for_all() -> bool:
    """Return whether this rank says what all ranks met; see `distributed.speaks_for_all`. Alone it does."""
    distributed = sys.modules.get("plainrl.distributed")  # before it is imported, the ranks do not know each other
    return distributed.speaks_for_all(SECONDS_FOR_FIRST_RANK) if distributed else not RANK


def _describe_lost_rank(error: BaseException | None) -> str:
    """Return a line if an error only says that another rank has ended, else nothing."""
    distributed = sys.modules.get("plainrl.distributed")
    if error is None or distributed is None or not distributed.is_lost_rank(error):
        return ""
    return f"{of_rank()}error: another rank has ended, or was not heard of in time ({first_line(error)})"


def _end_rank(status: int) -> None:
    """End a rank at once. The interpreter would wait for threads, and these may wait for a rank that is lost."""
    if NUM_RANKS > 1:
        _flush_output()
        os._exit(status)


def of_rank() -> str:
    """Return what a line of this rank begins with. That of the first is empty."""
    return f"rank {RANK}: " if RANK else ""


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
            reason = describe_problems(error, schema, {}) if isinstance(error, ValidationError) else error
            print(f"resume = auto: {path.parent} is passed over ({reason})")
        return False
    return True
