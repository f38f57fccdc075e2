"""Kill training runs, resume them, and compare them with runs that were left alone, bit for bit.

    uv run python tests/kill_and_resume.py --kills 20    SFT, GRPO on-policy and GRPO off-policy in turn
    uv run python tests/kill_and_resume.py --kills 10 --ranks 2    the same by torchrun; who is killed is drawn
    uv run python tests/kill_and_resume.py --kills 10 --ranks 2 --other-ranks    each start is by one rank or by two
    uv run python tests/kill_and_resume.py --soak 200    GRPO of 200 steps, left alone: its memory must stay flat

Another number of ranks adds in another order. Such runs are compared to rounding.

The scripts are the real ones, with the real engine, on a tiny model in float32. Three moments of a kill -9: during the
start, between two steps after the start, while a checkpoint is being written.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from ranks import left_alive
from tiny import REPOSITORY, grpo_arguments, make_answering_model, make_tiny_model, tiny_arguments

from plainrl.checkpoint_files import find_damage
from plainrl.run_records import read_metrics

TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # a free port
SFT = {"max_steps": 30, "eval_interval": 5, "checkpoint_interval": 1}
GRPO = {
    "n_grpo_steps": 20,
    "rollout_batch_size": 32,
    "train_batch_size": 32,
    "eval_interval": 5,
    "checkpoint_interval": 1,
    "sampling_max_tokens": 12,
}
SELECTION = {"dynamic_sampling": True, "max_resampling_rounds": 2, "drop_solved_questions": True}
# Relative and absolute. Differences between engine and policy are rounding themselves. An implicit reward is a small
# difference of two log-probs of whole responses.
TOLERANCES = {
    **dict.fromkeys(("gap", "difference"), (0, 1e-4)),
    **dict.fromkeys(("chosen_reward", "rejected_reward", "margin"), (1e-5, 1e-5)),
}
BY_RANKS = {"train/rank_efficiency"}
RUNS = {
    "SFT": ("SFT_train.py", tiny_arguments, SFT),
    "GRPO on-policy": ("GRPO_train.py", grpo_arguments, GRPO | SELECTION),
    "GRPO off-policy": ("GRPO_train.py", grpo_arguments, GRPO | {"loss_type": "grpo_clip", "train_batch_size": 16}),
}


def start(
    script: str,
    arguments: Sequence[str | Path],
    log: Path,
    popen: Callable[..., subprocess.Popen] = subprocess.Popen,
    num_ranks: int = 0,
    torchrun_options: Sequence[str] = (),
) -> subprocess.Popen:
    """Start a script of the repository, by torchrun if there are ranks; what it prints is added to a file."""
    launcher = [*TORCHRUN, "--nproc-per-node", str(num_ranks), *torchrun_options] if num_ranks else []
    return popen(
        [sys.executable, *launcher, str(REPOSITORY / script), *arguments],
        stdout=log.open("a"),
        stderr=subprocess.STDOUT,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 1800) -> None:
    """Return when a condition holds or the process has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened in {seconds} seconds")
        time.sleep(0.0005)


def wait_for_moment(moment: str, folder: Path, process: subprocess.Popen, chance: random.Random) -> None:
    """Return at a moment of a run: `start`, `step` or `save`, each at a random time within it."""
    if moment == "start":
        time.sleep(chance.uniform(0, 20))
        return
    metrics = folder / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    # A resumed run first cuts the file back: it grows again once its steps are under way.
    wait_for(lambda: metrics.exists() and metrics.stat().st_size != size, process)
    num_steps = count_steps(metrics) + chance.randrange(8)  # so that most resumed runs begin with a checkpoint
    wait_for(lambda: count_steps(metrics) >= num_steps, process)
    if moment == "step":
        time.sleep(chance.uniform(0, 1.5))
    else:
        wait_for(lambda: any(folder.glob("checkpoints/.step_*.unfinished")), process)
        time.sleep(chance.uniform(0, 0.02))


def count_steps(metrics: Path) -> int:
    """Return how many training steps a run's metrics hold. The file is not parsed: this is asked all the time."""
    return metrics.read_bytes().count(b'"train_step"') if metrics.exists() else 0


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Return the ranks that torchrun has started."""
    found = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error):  # a child of another kind, which has just ended
            found += [child] if "TORCHELASTIC_RUN_ID" in child.environ() else []
    return found


def kill(process: subprocess.Popen, chance: random.Random | None = None) -> None:
    """Kill a process with SIGKILL; its own processes must notice and end.

    With `chance` it is torchrun: killed is that, or one of its ranks, or all ranks.
    """
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    ranks = ranks_of(process) if children else []
    victims = chance.choice([[process], chance.sample(ranks, min(len(ranks), 1)), ranks]) if chance else [process]
    for victim in victims or [process]:
        victim.send_signal(signal.SIGKILL)
    process.wait()
    if alive := left_alive(children):
        raise AssertionError(f"left behind: {alive}")


def find_torn(folder: Path) -> list[str]:
    """Return the checkpoints that look whole by their names, but are not."""
    checkpoints = sorted(folder.glob("checkpoints/step_*"))
    return [f"{path}: {damage}" for path in checkpoints if (damage := find_damage(path)) is not None]


def find_differences(one: Path, other: Path) -> list[str]:
    """Return in what two runs differ: metrics (times aside), samples, final weights, optimizer state."""
    found = []
    first, second = (comparable_metrics(folder) for folder in (one, other))
    if len(first) != len(second):
        found.append(f"{len(first)} and {len(second)} lines of metrics")
    for a, b in zip(first, second, strict=False):
        found += [f"{name} at {a}: {a.get(name)}, {b.get(name)}" for name in {**a, **b} if a.get(name) != b.get(name)]
    for pattern in ("samples/*", "final/*.safetensors", "checkpoints/*/optimizer*.safetensors"):
        files = [
            {path.relative_to(folder): path.read_bytes() for path in folder.glob(pattern)} for folder in (one, other)
        ]
        if not files[0] or files[0] != files[1]:
            found.append(f"{pattern} differ")
    return found


def differences_to_rounding(one: Path, two: Path, factor: float = 1.0) -> list[str]:
    """Return in what two runs differ by more than rounding: keys, texts, metrics, final weights.

    Args:
        one, two: the runs' folders.
        factor: how many times the tolerances count. Rounding grows from step to step.
    """
    found = []
    first, second = (comparable_metrics(folder) for folder in (one, two))
    if [row.keys() - BY_RANKS for row in first] != [row.keys() - BY_RANKS for row in second]:
        found.append("keys of metrics")
    for a, b in zip(first, second, strict=False):
        for key in (a.keys() & b.keys()) - BY_RANKS:
            rel, most = next((value for part, value in TOLERANCES.items() if part in key), (1e-5, 2e-7))
            is_number = isinstance(a[key], float) and isinstance(b[key], float)
            if not (is_number and math.isclose(a[key], b[key], rel_tol=factor * rel, abs_tol=factor * most)):
                found += [f"{key}: {a[key]}, {b[key]}"] if a[key] != b[key] else []
    names = [sorted(file.name for file in (path / "samples").iterdir()) for path in (one, two)]
    found += ["names of samples"] if names[0] != names[1] else []
    for name in set(names[0]) & set(names[1]):
        files = (path / "samples" / name for path in (one, two))
        keys = ("response", "response_length", "finish_reason")
        texts = [[[row.get(key) for key in keys] for row in map(json.loads, file.open())] for file in files]
        found += [f"texts of {name}"] if texts[0] != texts[1] else []
    weights, others = (
        {name: value for file in (path / "final").glob("*.safetensors") for name, value in load_file(file).items()}
        for path in (one, two)
    )
    found += ["names of weights"] if weights.keys() != others.keys() else []
    for name in weights.keys() & others.keys():
        # AdamW makes a whole step of a tiny gradient, and so of its rounding.
        if not torch.allclose(weights[name], others[name], rtol=factor * 1e-5, atol=factor**2 * 1e-6):
            found.append(f"{name}: {(weights[name] - others[name]).abs().max():.1e} apart")
    return found


def steps_of(folder: Path) -> list[int]:
    """Return the training steps in metrics.jsonl, in the order in which they stand there."""
    return [row["train_step"] for row in comparable_metrics(folder) if "train_step" in row]


def kill_and_resume(
    name: str, num_kills: int, model: str, folder: Path, chance: random.Random, ranks: Sequence[int]
) -> tuple[list[str], int]:
    """Run once in peace and once with kills (starting over where a run ends before its last kill).

    Args:
        name: of RUNS.
        num_kills: how many.
        model, folder: what is trained, and where the runs are.
        chance: draws the moments, the victims and the ranks.
        ranks: of torchrun, or 0 for none. The first number is that of the run in peace, and each start draws one.

    Returns:
        What is wrong: differences, torn checkpoints, steps that stand twice or are missing; and how many kills left a
        checkpoint half written.
    """
    script, arguments_of, settings = RUNS[name]
    folder.mkdir()
    arguments = arguments_of(model, folder, run_name="straight", **settings)
    straight = start(script, arguments, folder / "straight.log", num_ranks=ranks[0])
    if straight.wait() != 0:
        raise RuntimeError(f"{name}: the run without kills failed; see {folder / 'straight.log'}")
    wrong, num_done, num_runs, num_halves = [], 0, 0, 0
    while num_done < num_kills:
        num_runs += 1
        run = folder / f"killed_{num_runs}"
        arguments = arguments_of(model, folder, run_name=run.name, resume="auto", **settings)
        while True:
            num_ranks = chance.choice(ranks)
            process = start(script, arguments, folder / f"{run.name}.log", num_ranks=num_ranks)
            if num_done == num_kills:
                break
            moment = chance.choice(["start", "step", "step", "step", "save", "save"])
            wait_for_moment(moment, run, process, chance)
            if process.poll() is not None:
                break
            kill(process, chance if ranks[0] else None)
            num_done += 1
            torn = find_torn(run)
            wrong += torn
            halves = len(list(run.glob("checkpoints/.step_*")))
            num_halves += halves > 0
            saved = len(list(run.glob("checkpoints/step_*")))
            steps = steps_of(run) or [0]
            print(
                f"{name}: kill {num_done} of {num_kills} at {moment}, {num_ranks} ranks, "
                f"{steps[-1]} optimizer steps logged, "
                f"checkpoints: {saved} whole, {halves} half written",
                flush=True,
            )
        if process.wait() != 0:
            raise RuntimeError(f"{name}: a resumed run failed; see {folder / run.name}.log")
        to_rounding = len(ranks) > 1
        differences = (
            differences_to_rounding(folder / "straight", run, factor=10)
            if to_rounding
            else find_differences(folder / "straight", run)
        )
        if steps_of(run) != list(range(1, len(steps_of(run)) + 1)):
            differences.append(f"steps in metrics.jsonl: {steps_of(run)}")
        how = "to rounding" if to_rounding else "bit for bit"
        print(f"{name}: {run.name} {'differs' if differences else f'equals the run without kills, {how}'}")
        wrong += differences
    return wrong, num_halves


def soak(num_steps: int, model: str, folder: Path) -> list[str]:
    """Run GRPO for many steps; return what is wrong with the memory and the open files of it and its processes."""
    settings = {"n_grpo_steps": num_steps, "eval_interval": 50, "checkpoint_interval": 50}
    process = start("GRPO_train.py", grpo_arguments(model, folder, run_name="soak", **settings), folder / "soak.log")
    samples: list[tuple[int, float, int]] = []  # step, GiB, open files
    while process.poll() is None:
        steps = steps_of(folder / "soak")
        try:
            everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            gib = sum(one.memory_info().rss for one in everyone) / 2**30
            samples.append((len(steps), gib, sum(one.num_fds() for one in everyone)))
        except psutil.Error:
            continue  # one of them ended meanwhile
        time.sleep(0.5)
    if process.wait() != 0:
        raise RuntimeError(f"the run failed; see {folder / 'soak.log'}")
    quarters = [
        [sample for sample in samples if 0 < sample[0] < num_steps and 4 * sample[0] // num_steps == quarter]
        for quarter in range(4)
    ]
    wrong = []
    for what, index in (("memory of all its processes, GiB", 1), ("open files", 2)):
        medians = [statistics.median(sample[index] for sample in quarter) for quarter in quarters]
        growth = medians[3] / medians[2] - 1
        print(f"{what}, median of each quarter: {', '.join(f'{m:.4g}' for m in medians)}; last {growth:+.3%}")
        wrong += [f"{what}: {growth:+.2%} in the last quarter"] if growth >= 0.01 else []
    return wrong


def main() -> None:
    """Do what is asked for, and print one line about it at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="how many, over the three kinds of run")
    parser.add_argument("--ranks", type=int, default=0, help="of torchrun (0: without)")
    parser.add_argument("--other-ranks", action="store_true", help="each start is by --ranks or by one rank")
    parser.add_argument("--soak", type=int, default=0, help="how many steps")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args()
    if options.other_ranks and options.ranks < 2:
        parser.error("--other-ranks: give --ranks, too, 2 or more")
    shared_memory = set(os.listdir("/dev/shm"))
    chance = random.Random(options.seed)
    wrong, num_halves = [], 0
    folder = Path(tempfile.mkdtemp())
    make_tiny_model(folder / "tiny")
    make_answering_model(folder / "answering", folder / "tiny")
    model = str(folder / "answering")
    for index, name in enumerate(RUNS):
        if num_kills := len(range(index, options.kills, len(RUNS))):
            ranks = [options.ranks, 1] if options.other_ranks else [options.ranks]
            found, halves = kill_and_resume(name, num_kills, model, folder / name.replace(" ", "_"), chance, ranks)
            wrong, num_halves = wrong + found, num_halves + halves
    if options.kills:
        print(f"{num_halves} of {options.kills} kills left a checkpoint half written")
        wrong += ["no kill met a save: more kills are needed"] if options.kills >= 10 and not num_halves else []
    if options.soak:
        wrong += soak(options.soak, model, folder)
    left = set(os.listdir("/dev/shm")) - shared_memory
    wrong += [f"shared memory left behind: {left}"] if left else []
    print("\n".join(wrong) or "all well: nothing differs, torn 0, steps twice or missing 0, nothing left behind")
    if wrong:
        print(f"runs and logs: {folder}")
    else:
        shutil.rmtree(folder)
    sys.exit(1 if wrong else 0)


def comparable_metrics(folder: Path) -> list[dict]:
    """Return the rows of a run's metrics, without times and memory."""

    def is_time(name: str) -> bool:
        return name.startswith(("time/", "memory/")) or name.endswith(("seconds", "per_second"))

    return [{name: value for name, value in row.items() if not is_time(name)} for row in read_metrics(folder)]


if __name__ == "__main__":
    main()
