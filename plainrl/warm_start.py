"""A short SFT run that gives GRPO and expert iteration their first policy."""

import subprocess
import sys
from pathlib import Path
from typing import TypeVar

from plainrl.cli import read_yaml
from plainrl.config import RolloutConfig
from plainrl.grading.rewards import REWARD_FUNCTIONS
from plainrl.records import Stopped, UserError

RolloutConfigType = TypeVar("RolloutConfigType", bound=RolloutConfig)


def apply_warm_start(config: RolloutConfigType) -> RolloutConfigType:
    """Return the configuration with the policy of the warm start as its model. Run SFT_train.py first if needed.

    The policy is in `runs_dir/warm_start/final`. If `config.warm_start` is empty, nothing changes.

    Raises:
        UserError: the SFT run failed, or the existing one has another model, prompt, reward or task.
    """
    if not config.warm_start:
        return config
    folder = Path(config.runs_dir) / config.warm_start
    shared = {
        "model": config.model,
        "prompt": config.prompt,
        "reward": reward_to_teach(config),
        "train_data": config.train_data,
        "validation_data": config.validation_data,
        "arithmetic_terms": list(config.arithmetic_terms),
        "arithmetic_max_term": config.arithmetic_max_term,
    }
    if (folder / "final").is_dir():
        used = read_yaml(folder / "config.yaml")
        different = [
            f"{name} = {used[name]}, not {value}" for name, value in shared.items() if used.get(name, value) != value
        ]
        if different:
            raise UserError(
                f"warm_start = {config.warm_start}: {folder} was trained with {'; '.join(different)}; remove it to "
                "train it again, or name another warm start"
            )
        print(f"warm start: {folder / 'final'}")
    else:
        print(
            f"warm start: {folder / 'final'} does not exist yet; running SFT_train.py preset={config.warm_start} first"
        )
        script = Path(__file__).parent.parent / "SFT_train.py"
        settings = shared | {
            "preset": config.warm_start,
            "run_name": config.warm_start,
            "runs_dir": config.runs_dir,
            "wandb_mode": config.wandb_mode,
            "resume": "auto",
        }
        arguments = [f"{name}={value}" for name, value in settings.items()]
        process = subprocess.Popen([sys.executable, str(script), *arguments])
        try:
            status = process.wait()
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Stopped):  # the signal may have reached only this process
                process.send_signal(interrupt.status - 128)
            process.wait()  # the SFT run finishes its phase and saves
            print("the same command goes on with the warm start")
            raise
        if status != 0:
            raise UserError(
                f"warm_start = {config.warm_start}: SFT_train.py ended with status {status}; fix what it says, or "
                f"remove {folder}, and try again"
            )
    return config.model_copy(update={"model": str(folder / "final")})


def reward_to_teach(config: RolloutConfig) -> str:
    """Return the reward function whose format the warm start teaches: the first of the table with the same format."""
    write = config.reward_function.write_response
    return next((name for name, other in REWARD_FUNCTIONS.items() if other.write_response is write), config.reward)
