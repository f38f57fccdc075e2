"""Each side takes its turns, in a process of its own, so that its peak memory is its own."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from experiments.benchmark.figures import Row, unit_of
from experiments.benchmark.measuring import matmul_peak
from experiments.benchmark.settings import REPOSITORY, BenchmarkConfig
from experiments.benchmark.trl_task import TRL_CHECKPOINTING, trl_task
from plainrl.records import UserError

TRL = "trl==1.16.0"
TRL_NEEDS = ("torch", "transformers", "datasets", "accelerate")  # in the same versions as ours
TURNS = {
    "sft": ("ours", "trl", TRL_CHECKPOINTING),
    "grpo": ("ours", "trl"),
    "rollout": ("ours",),
    "logprob": ("ours", "twice the questions", "twice the length"),
    "grade": ("ours",),
}
PHASES = ("sync", "rollout", "grade", "old_log_probs", "train")
Figures = dict[str, float]


def measure(name: str, config: BenchmarkConfig, trl: dict[str, Any]) -> list[Row]:
    """Return the figures of one benchmark.

    Args:
        name: one of TURNS.
        config: our settings.
        trl: receives the versions and settings of TRL's side.
    """
    rows = []
    for pair in range(1, config.num_pairs + 1):
        of_pair = config.model_copy(update={"seed": config.seed + pair - 1})
        for turn in TURNS[name]:
            peak = matmul_peak(config.policy_device, config.compute_dtype)
            for side, figures in take_turn(name, turn, of_pair, trl).items():
                if "tflop_per_second" in figures:
                    figures |= {"matmul_peak_tflop_per_second": peak, "mfu": figures["tflop_per_second"] / peak}
                rows += [Row(name, side, pair, figure, unit_of(figure), value) for figure, value in figures.items()]
                values = ", ".join(f"{figure} {value:.4g}" for figure, value in figures.items())
                print(f"{name}, pair {pair} of {config.num_pairs}, {side}: {values}", flush=True)
    return rows


def take_turn(name: str, turn: str, config: BenchmarkConfig, trl: dict[str, Any]) -> dict[str, Figures]:
    """Run one side in a process of its own; return its figures, by side.

    Args:
        name: one of TURNS.
        turn: one of TURNS[name].
        config: our settings.
        trl: receives the versions and settings of TRL's side.

    Raises:
        UserError: the process failed; shows the last lines that it wrote.
    """
    is_trl = turn.startswith("trl")
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        task, result, log = folder / "task.json", folder / "result.json", folder / "log.txt"
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))}
        if is_trl:
            task.write_text(json.dumps(trl_task(name, turn, config, folder)))
            command = trl_command(task, result)
            environment |= only_visible(config.policy_device, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        else:
            task.write_text(json.dumps({"benchmark": name, "turn": turn, "config": config.model_dump(mode="json")}))
            command = [sys.executable, "-m", "experiments.benchmark.our_side", str(task), str(result)]
        with log.open("w") as file:
            process = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment, check=False
            )
        if process.returncode != 0:
            ending = " | ".join(log.read_text().splitlines()[-4:])
            raise UserError(f"{name}, {turn}: status {process.returncode}: {ending}")
        answer = json.loads(result.read_text())
    if not is_trl:
        return answer
    trl |= {"versions": answer["versions"], f"{name}, {turn}": answer["settings"]}
    return {turn: answer["figures"]}


def trl_command(task: Path, result: Path) -> list[str]:
    """Return the command that runs TRL's side in an environment of its own, with the versions that ours runs with."""
    needs = [TRL, *(f"{package}=={importlib.metadata.version(package)}" for package in TRL_NEEDS)]
    date = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["uv"]["exclude-newer"]
    command = ["uv", "run", "--no-project", "--python", "3.11", "--exclude-newer", date]
    command += [part for need in needs for part in ("--with", need)]
    return [*command, "python", "-m", "experiments.benchmark.trl_side", str(task), str(result)]


def only_visible(device: str, visible: str) -> dict[str, str]:
    """Return the environment variable that lets a process see one device alone: TRL takes all GPUs that it sees.

    >>> only_visible("cuda:1", "4,5"), only_visible("cuda:1", ""), only_visible("cpu", "")
    ({'CUDA_VISIBLE_DEVICES': '5'}, {'CUDA_VISIBLE_DEVICES': '1'}, {})
    """
    if device == "cpu":
        return {}
    number = int(device.removeprefix("cuda:"))
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[number] if visible else str(number)}
