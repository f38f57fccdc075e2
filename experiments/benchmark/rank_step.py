"""Time SFT steps of the embedded model by the ranks of torchrun: `rank_step.py RESULT.json`."""

import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from plainrl.cli import load_config
from plainrl.config import SFTConfig
from plainrl.data import load_sft_examples
from plainrl.distributed import join, rank
from plainrl.policy import compute_clipped_gradient, load_policy, prepare_training
from SFT_helper import pad_token_id
from SFT_train import accumulate_gradients, tokenize_examples

SETTINGS = [
    "preset=laptop",
    "train_batch_size=32",
    "compute_dtype=float32",
    "microbatch_tokens=1024",
    "gradient_checkpointing=false",  # as in results/scale
]
NUM_STEPS = 3


def main(result: Path) -> None:
    """Write the tokens a second of the median step, after one to warm up."""
    config = load_config(SFTConfig, Path(__file__).parents[2] / "config.yaml", SETTINGS)
    join(config)
    policy, tokenizer = load_policy(config)
    batch = tokenize_examples(load_sft_examples(config)[: config.train_batch_size], tokenizer, config)
    optimizer = prepare_training(policy, config)
    accumulate = partial(accumulate_gradients, policy, batch, pad_token_id(tokenizer), config)
    seconds = []
    for _ in range(1 + NUM_STEPS):
        started = time.perf_counter()
        compute_clipped_gradient(policy, accumulate, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    num_tokens = sum(len(row.prompt_ids) + len(row.response_ids) for row in batch)
    if rank() == 0:
        result.write_text(json.dumps(num_tokens / statistics.median(seconds[1:])))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
