"""The first policy of GRPO and expert iteration: a model, or a short SFT run that is made first.

`warm_start` names a preset of config.yaml, a run in `runs_dir`, or the folder of a run or of a model.
"""

from plainrl.startup import ENDS_WITH_PARENT

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from plainrl.checkpoint_files import policy_of_run
from plainrl.cli import PIPE_STATUS, load_config, own_command, read_yaml
from plainrl.config import RunConfig, SFTConfig, WarmStartConfig
from plainrl.data import hold_out, load_examples, load_sft_examples, load_validation_set
from plainrl.distributed import environment_of_one_process, num_ranks, on_first
from plainrl.folder_lock import is_known_to_be_locked
from plainrl.grading.rewards import REWARD_FUNCTIONS
from plainrl.help import blocks_of
from plainrl.records import Stopped, UserError
from plainrl.shared_config import EMBEDDED_DATA, is_embedded
from plainrl.sources import is_pipe, path_exists

WarmStartConfigType = TypeVar("WarmStartConfigType", bound=WarmStartConfig)

SCRIPT = Path(__file__).parent.parent / "SFT_train.py"
YAML = SCRIPT.with_name("config.yaml")
SECONDS_BETWEEN_LOOKS = 2.0  # whether another process has made the warm start
# What the policy of a warm start depends on. A finished one is taken again if they are the same.
DECISIVE = (
    *("model", "prompt", "reward", "stop_string", "train_data", "validation_data", "extra_validation_data"),
    *("validation_fraction", "validation_seed", "question_field", "answer_field", "trace_field", "fill_prompts"),
    *("arithmetic_terms", "arithmetic_max_term"),
)
# How its preset trains it. A finished one is taken again if this has changed, and the change is said.
OF_THE_PRESET = ("learning_rate", "lr_schedule", "train_batch_size", "num_epochs", "max_steps", "num_sft_examples")
# Of data without worked responses, the warm start takes none: it teaches the format on the embedded arithmetic.
EMBEDDED = {"train_data": EMBEDDED_DATA, "validation_data": EMBEDDED_DATA} | {
    key: RunConfig.model_fields[key].default
    for key in (
        *("extra_validation_data", "validation_fraction", "question_field", "answer_field", "trace_field"),
        "fill_prompts",
    )
}
# What the SFT run takes over: all but its name, its seed, and how it trains, which its preset says. It is one process.
OF_RANKS = {"num_replicas", "engine_tensor_parallel"}
INHERITED = {"num_final_eval_examples", *RunConfig.model_fields} - {"preset", "run_name", "seed"} - OF_RANKS
# Of the SFT run's own evaluations, at most: the run that follows evaluates the same policy on all of its questions.
NUM_EVAL_EXAMPLES = 16


def apply_warm_start(config: WarmStartConfigType, checkpoint: Path | None = None) -> WarmStartConfigType:
    """Return the configuration with the policy of the warm start as its model. Run SFT_train.py first if needed.

    The SFT run of a preset is in `runs_dir/<preset>`. If one with another model, prompt, reward or data is there, a
    hash of these follows the name. If `config.warm_start` is empty, nothing changes. Nor does it for a run that goes on
    from a checkpoint, unless it needs its first policy: for the frozen weights beside adapters, or for a KL term.

    Raises:
        UserError: there is no such preset or model, the data has nothing to imitate, or the SFT run failed.
    """
    if not config.warm_start or (checkpoint and not config.needs_first_policy):
        return config
    presets = blocks_of(read_yaml(YAML), "presets", YAML)
    make = _run_preset if config.warm_start in presets else partial(_find_model, presets=presets)
    model = on_first(lambda: make(config), is_long=True)
    print(f"warm start: {model}")
    return config.model_copy(update={"model": str(model)})


def reward_to_teach(config: WarmStartConfig) -> str | tuple[str, ...]:
    """Return the reward function whose format the warm start teaches: the first of the table with the same format."""
    write = config.reward_function.write_response
    return next((name for name, other in REWARD_FUNCTIONS.items() if other.write_response is write), config.reward)


def _find_model(config: WarmStartConfig, presets: Mapping[str, Any]) -> Path:
    """Return the folder of the model that `warm_start` names, a path or the name of a run in `runs_dir`."""
    for folder in (Path(config.warm_start), Path(config.runs_dir) / config.warm_start):
        if path_exists(folder / "final") or path_exists(folder / "config.json"):
            settings = _inherited(config)
            if config.learns_from_pairs:  # other data than any SFT run's
                unused = {*EMBEDDED, *(() if config.needs_engine else ("reward",))}  # no response is graded
                settings = {key: value for key, value in settings.items() if key not in unused}
            if different := _differences(_saved(folder), settings):
                print(f"warning: warm_start = {config.warm_start} was trained with {'; '.join(different)}")
            label = f"warm_start = {config.warm_start}"
            return policy_of_run(folder, label) if path_exists(folder / "final") else folder
        if path_exists(folder / "checkpoints"):
            raise UserError(f"warm_start = {config.warm_start}: that run is not finished; go on with resume={folder}")
    raise UserError(
        f"warm_start = {config.warm_start}: neither a preset of config.yaml ({', '.join(presets)}), nor the folder of "
        "a finished run or of a model in Transformers format; name one of them, or none with warm_start="
    )


def _run_preset(config: WarmStartConfig) -> Path:
    """Return the folder of the model that a preset of config.yaml trains. It is trained if it is not there."""
    inherited = _inherited(config) | _data_to_teach(config)
    name = config.warm_start
    folder = Path(config.runs_dir) / name
    if different := _differences(_saved(folder), inherited):
        # Of a run of before `fill_prompts` was decisive, the name stays.
        decisive = json.dumps([inherited[key] for key in DECISIVE if key != "fill_prompts" or inherited[key]])
        name = f"{name}-{hashlib.sha256(decisive.encode()).hexdigest()[:8]}"
        print(f"warm start: {folder} was trained with {'; '.join(different)}; this one is {name}")
        folder = folder.with_name(name)
    if name == config.run_name:
        raise UserError(f"run_name = {name}: the warm start of this run has that name; give another run_name")
    _wait_for_maker(folder)
    if (folder / "final").is_dir():
        used, wanted = _saved(folder), _preset_values(config.warm_start)
        if used.get("num_sft_examples") == "all":  # the data had fewer examples than the preset asks for
            del wanted["num_sft_examples"]
        if different := _differences(used, wanted, OF_THE_PRESET):
            print(f"warning: {folder} was trained with {'; '.join(different)}; remove it to make it anew")
        return folder / "final"
    settings = {"preset": config.warm_start, "run_name": name, **inherited, **_fewer_questions(inherited)}
    settings |= _limit_to_data(config, settings)
    print(f"warm start: {folder / 'final'} does not exist yet; running SFT_train.py preset={config.warm_start} first")
    # An interrupted one goes on, also with other settings: those that decide on the policy have given another name.
    command = [sys.executable, str(SCRIPT), *_arguments(settings), "resume=auto", "resume_with_changes=true"]
    # The ranks may be killed together, and nothing may be left behind.
    ends_with_rank = {ENDS_WITH_PARENT: "1"} if num_ranks() > 1 else {}
    process = subprocess.Popen(command, env=environment_of_one_process() | ends_with_rank)
    try:
        status = process.wait()
    except KeyboardInterrupt as interrupt:
        if isinstance(interrupt, Stopped):  # the signal may have reached only this process
            process.send_signal(interrupt.status - 128)
        process.wait()  # the SFT run finishes its phase and saves
        print(f"to go on with the warm start, and then with this run: {own_command(sys.argv[1:])}")
        raise
    if status == PIPE_STATUS:
        raise BrokenPipeError  # whoever read the output of both has closed it
    if status != 0 and _wait_for_maker(folder):  # another process was faster
        return _run_preset(config)
    if status != 0:
        raise UserError(
            f"warm_start = {config.warm_start}: SFT_train.py ended with status {status}; fix what it says, or "
            f"remove {folder}, and try again"
        )
    return folder / "final"


def _wait_for_maker(folder: Path) -> bool:
    """Wait while another process makes the warm start; return whether one did."""
    has_waited = False
    while is_known_to_be_locked(folder):
        if not has_waited:
            print(f"warm start: another process is making {folder}; waiting for it", flush=True)
        has_waited = True
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return has_waited


def _inherited(config: WarmStartConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json", include=INHERITED)
    reward = reward_to_teach(config)
    return values | {"reward": reward if isinstance(reward, str) else list(reward)}


def _fewer_questions(settings: Mapping[str, Any]) -> dict[str, int]:
    """Return how many questions the SFT run's evaluations have.

    >>> _fewer_questions({"num_eval_examples": 8, "num_final_eval_examples": "all"})
    {'num_eval_examples': 8, 'num_final_eval_examples': 16}
    """
    asked = {key: settings[key] for key in ("num_eval_examples", "num_final_eval_examples")}
    return {key: NUM_EVAL_EXAMPLES if num == "all" else min(num, NUM_EVAL_EXAMPLES) for key, num in asked.items()}


def _data_to_teach(config: WarmStartConfig) -> dict[str, Any]:
    """Return what the SFT run takes instead of the run's own data, if that has no worked response; else nothing."""
    if is_embedded(config.train_data):
        return {} if config.validation_data else {"validation_data": EMBEDDED_DATA}  # DPO may have no questions
    if not config.learns_from_pairs:
        if is_pipe(config.train_data):
            return {}
        with contextlib.redirect_stdout(io.StringIO()):  # it has been said
            examples = load_examples(config.train_data, config, "train")
        if any(example.response for example in examples):
            return {}
    print(f"warm start: {config.train_data} has no worked responses, so {EMBEDDED_DATA} teaches the format")
    return EMBEDDED


def _preset_values(preset: str) -> dict[str, Any]:
    """Return the settings of a preset of config.yaml."""
    with contextlib.redirect_stdout(io.StringIO()):
        return load_config(SFTConfig, YAML, [f"preset={preset}"]).model_dump(mode="json")


def _saved(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in a folder; none if there is no run."""
    return read_yaml(folder / "config.yaml") if path_exists(folder / "config.yaml") else {}


def _differences(used: Mapping[str, Any], settings: Mapping[str, Any], names: Sequence[str] = DECISIVE) -> list[str]:
    """Return what a run was trained with, where that is something else."""
    keys = [key for key in names if key in settings and used.get(key, settings[key]) != settings[key]]
    return [f"{key} = {used[key]}, not {settings[key]}" for key in keys]


def _limit_to_data(config: WarmStartConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `num_sft_examples` for the SFT run, if its preset asks for more than the data has.

    Raises:
        UserError: the SFT run could not read its data again, or the data has nothing to imitate.
    """
    pipes = [key for key in ("train_data", "validation_data") if is_pipe(settings[key])]
    if pipes:
        raise UserError(
            f"{pipes[0]} = {settings[pipes[0]]} is a pipe, which the warm start cannot read a second time; name a file"
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the SFT run says it again
            sft_config = load_config(SFTConfig, YAML, _arguments(settings))
            examples = hold_out(load_sft_examples(sft_config), load_validation_set(sft_config), sft_config)
    except UserError as error:
        raise UserError(
            f"warm_start = {config.warm_start}: {error}; or name a model to start from with warm_start=FOLDER, or none "
            "with warm_start="
        ) from None
    wanted = sft_config.num_sft_examples
    if wanted == "all" or wanted <= len(examples):
        return {}
    print(f"warm start: trained on all {len(examples)} examples of {sft_config.train_data}, fewer than {wanted}")
    return {"num_sft_examples": "all"}


def _arguments(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]
