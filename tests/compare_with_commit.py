"""Run tiny trainings of an older commit and of this one, and compare them bit for bit.

    uv run python tests/compare_with_commit.py 2e2aaa4              against HEAD
    uv run python tests/compare_with_commit.py 2e2aaa4 3075440      against another commit

Each commit gets a worktree in a temporary folder, and runs its own scripts with its own presets and the real engine:
SFT, GRPO on-policy and GRPO off-policy, in float32. Compared are all metrics that both have, but for times and memory,
and the weights at the end. The exit status is 1 if anything differs. What changed is then printed with how much.

A worktree holds what is committed. What is not yet committed is not compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny import REPOSITORY, grpo_arguments, make_answering_model, make_tiny_model, read_lines, tiny_arguments

OF_THE_CLOCK = ("time/", "memory/")
OFF_POLICY = {"loss_type": "grpo_clip", "train_batch_size": 8, "epochs_per_rollout_batch": 2}
GRPO = {"n_grpo_steps": 3, "rollout_batch_size": 16, "train_batch_size": 16, "eval_interval": 3}
RUNS = {
    "SFT": ("SFT_train", tiny_arguments, {}),
    "GRPO-on-policy": ("GRPO_train", grpo_arguments, GRPO),
    "GRPO-off-policy": ("GRPO_train", grpo_arguments, GRPO | OFF_POLICY),
}
RUN = """
import functools, importlib, json, sys
import policy_evaluation

policy_evaluation.init_vllm = functools.cache(policy_evaluation.init_vllm)
for module, settings in json.load(open(sys.argv[1])):
    importlib.import_module(module).main(settings)
"""


@contextmanager
def worktree(commit: str, path: Path) -> Iterator[Path]:
    """Check a commit out beside this repository in a `with` statement."""
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
    try:
        yield path
    finally:
        subprocess.run([*git, "remove", "--force", str(path)], check=True)


def train(tree: Path, chosen: list[str], model: Path, runs_dir: Path) -> None:
    """Run trainings of a worktree to their end, one after the other in one process with one engine.

    Raises:
        RuntimeError: one failed.
    """
    runs_dir.mkdir()
    plan, log = runs_dir / "plan.json", runs_dir / "output.log"
    runs = [
        (module, make(model, runs_dir, run_name=name, **settings))
        for name, module, make, settings in ((name, *RUNS[name]) for name in chosen)
    ]
    plan.write_text(json.dumps(runs))
    with log.open("w") as file:
        result = subprocess.run(
            [sys.executable, "-c", RUN, str(plan)],
            **{"stdout": file, "stderr": subprocess.STDOUT, "cwd": tree},
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)},
        )
    if result.returncode:
        raise RuntimeError(f"the scripts of {tree.name} ended with {result.returncode}:\n{log.read_text()[-3000:]}")


def differences(older: Path, newer: Path) -> Iterator[tuple[str, float]]:
    """Give each metric that both runs have and each weight, with the largest difference between them."""
    rows = [read_lines(folder / "metrics.jsonl") for folder in (older, newer)]
    if [row.keys() & {"train_step", "eval_step"} for row in rows[0]] != [
        row.keys() & {"train_step", "eval_step"} for row in rows[1]
    ]:
        raise RuntimeError(f"{older} has {len(rows[0])} rows of metrics, and {newer} has {len(rows[1])} of other kinds")
    found: dict[str, float] = {}
    for first, second in zip(*rows, strict=True):
        for key in first.keys() & second.keys():
            if not key.startswith(OF_THE_CLOCK) and not key.endswith(("seconds", "per_second")):
                a, b = first[key], second[key]
                is_number = isinstance(a, int | float) and isinstance(b, int | float)
                distance = abs(a - b) if is_number else 0.0 if a == b else float("inf")
                found[key] = max(found.get(key, 0.0), distance)
    yield from sorted(found.items())
    first, second = (load_file(folder / "final/model.safetensors") for folder in (older, newer))
    if first.keys() != second.keys():
        raise RuntimeError(f"the weights of {older} and {newer} have other names")
    for name, weight in first.items():
        is_equal = torch.equal(weight, second[name])
        yield f"weight {name}", 0.0 if is_equal else (weight - second[name]).abs().max().item() or float("nan")


def main() -> None:
    """Make both worktrees, run everything in both, and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("older", help="commit to compare with")
    parser.add_argument("newer", nargs="?", default="HEAD", help="commit that is compared (HEAD)")
    parser.add_argument("--only", choices=RUNS, action="append", help="compare this training alone")
    chosen = parser.parse_args()
    is_alike, trainings = True, chosen.only or list(RUNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_model(folder / "tiny")
        make_answering_model(folder / "model", folder / "tiny")
        folders = [folder / "runs-older", folder / "runs-newer"]
        with worktree(chosen.older, folder / "older") as older, worktree(chosen.newer, folder / "newer") as newer:
            for tree, runs_dir in zip((older, newer), folders, strict=True):
                train(tree, trainings, folder / "model", runs_dir)
        for training in trainings:
            compared = list(differences(*(runs_dir / training for runs_dir in folders)))
            differing = [(key, distance) for key, distance in compared if distance]
            is_alike = is_alike and not differing
            print(f"{training}: {len(compared)} metrics and weights compared, {len(differing)} differ")
            for key, distance in differing:
                print(f"    {key}: by up to {distance:.2g}")
    sys.exit(not is_alike)


if __name__ == "__main__":
    main()
