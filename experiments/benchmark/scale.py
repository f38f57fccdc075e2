"""What more ranks bring: how evenly microbatches can be dealt, by simulation, and the speed of ranks on this CPU.

    efficiency = tokens / (ranks x sum over rounds of the largest microbatch)

The simulation draws lengths of responses, plans the microbatches as training does, and computes no model. The ranks
on the CPU take steps of SFT on the embedded model, with one thread each: two ranks on two cores at best double one.
"""

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from plainrl.microbatches import plan_microbatches
from plainrl.records import UserError

NUM_DRAWS = 10
SKIPPED = 0.15  # share of rows without an advantage
# questions, responses each, mean tokens of a response, ranks, tokens of a microbatch
CASES = [
    (32, 8, 400, 8, 4096),
    (128, 8, 400, 8, 16384),
    (128, 16, 1200, 8, 32768),
    (512, 16, 1200, 64, 32768),
    (64, 16, 1200, 64, 32768),
]
PROMPT_TOKENS = 150
REPOSITORY = Path(__file__).parent.parent.parent
STEP = Path(__file__).with_name("rank_step.py")


def measure_scale(arguments: list[str]) -> None:
    """Print both tables, and write them as CSV if `results=FILE.csv` is given."""
    results = ""
    for argument in arguments:
        key, _, results = argument.partition("=")
        if key != "results" or not results:
            raise UserError(f"{argument}: scale takes results=FILE.csv alone")
    if results:
        Path(results).parent.mkdir(parents=True, exist_ok=True)
    rows = [("simulation", *case, *simulate(*case)) for case in CASES]
    lines = ["kind,questions,group_size,mean_tokens,ranks,microbatch_tokens,efficiency_dealt,efficiency_fitted"]
    lines += [",".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row) for row in rows]
    print("\n".join(lines), flush=True)
    speeds = {num_ranks: measure_ranks(num_ranks) for num_ranks in (1, 2)}
    lines += ["", "kind,ranks,tokens_per_second,efficiency"]
    lines += [f"sft_cpu,{n},{speed:.1f},{speed / n / speeds[1]:.3f}" for n, speed in speeds.items()]
    print("\n".join(lines[-3:]), flush=True)
    if results:
        Path(results).write_text("\n".join(lines) + "\n")


def simulate(questions: int, group_size: int, mean_tokens: int, ranks: int, limit: int) -> tuple[float, float]:
    """Return the efficiency of the plan of one process, dealt, and of the plan that is fitted to the ranks."""
    found: list[tuple[float, float]] = []
    for draw in range(NUM_DRAWS):
        generator = random.Random(draw)
        prompts, responses = [], []
        for question in range(questions):
            for _ in range(group_size):
                length = round(mean_tokens * math.exp(generator.gauss(0, 0.6) - 0.18))
                if generator.random() >= SKIPPED:
                    prompts.append([question] * PROMPT_TOKENS)
                    responses.append([-len(responses)] * max(length, 4))
        pair = []
        for multiple in (1, ranks):
            plan = plan_microbatches(prompts, responses, len(prompts), limit, True, multiple)
            sizes = [part.num_tokens for part in plan]
            rounds = [sizes[first : first + ranks] for first in range(0, len(sizes), ranks)]
            pair.append(sum(sizes) / (ranks * sum(map(max, rounds))))
        found.append((pair[0], pair[1]))
    return sum(pair[0] for pair in found) / NUM_DRAWS, sum(pair[1] for pair in found) / NUM_DRAWS


def measure_ranks(num_ranks: int) -> float:
    """Return the tokens a second of an SFT step by so many ranks, with one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        launcher = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command = [sys.executable, *launcher, "--nproc-per-node", str(num_ranks), str(STEP), str(result)]
        subprocess.run(command, check=True, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads(result.read_text())
