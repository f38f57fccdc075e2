"""The gradients of one step by ranks: `rank_gradients.py MODEL FOLDER`, alone or under torchrun.

For each case the first rank writes FOLDER/<case>.safetensors, with every gradient whole, and FOLDER/sums.json.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from safetensors.torch import save_file
from test_GRPO_train import LENGTH_NORMALIZATIONS, LOSS_TYPES, ragged_rollouts, tiny_config

from GRPO_train import accumulate_gradients
from plainrl import distributed
from plainrl import policy as policy_module
from plainrl.policy import load_policy, parameter_groups, prepare_training

# name -> settings, and how many of the rollouts are in the step
CASES = {f"{loss} {length}": ({"loss_type": loss, "length_normalization": length}, 8) for loss in LOSS_TYPES
         for length in LENGTH_NORMALIZATIONS}  # fmt: skip
CASES |= {
    "another division into microbatches": ({"gradient_accumulation_steps": 1}, 8),
    "few tokens a microbatch": ({"microbatch_tokens": 24}, 8),
    "fewer rows than ranks": ({}, 1),
    "nothing to learn": ({}, 0),
    "entropy term": ({"entropy_coefficient": 0.1}, 8),
    "engine correction": ({"engine_correction": "token_truncate", "sampling_min_tokens": 0}, 8),
    "compute_dtype bfloat16": ({"compute_dtype": "bfloat16"}, 8),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, 8),
    "num_replicas": ({"num_replicas": 2}, 8),
}


def config_of(model, settings):
    settings = {"gradient_accumulation_steps": 8} | settings  # alone and by two ranks one row a microbatch
    on_policy = settings.get("loss_type", "reinforce_with_baseline") in ("no_baseline", "reinforce_with_baseline")
    epochs = 1 if on_policy else 2
    return tiny_config(model=model, epochs_per_rollout_batch=epochs, max_context_tokens=512, **settings)


def main(model, folder):
    first = tiny_config(model=model, max_context_tokens=512)
    distributed.join(first)
    if distributed.num_ranks() > 1:
        policy_module.load_weights = None  # each rank reads its share alone
    sums = {}
    loaded = {}
    for name, (settings, num_rows) in CASES.items():
        if settings.get("num_replicas", 1) > distributed.num_ranks():
            settings = {}
        config = config_of(model, settings)
        key = (config.compute_dtype, config.gradient_checkpointing, config.num_replicas)
        if key not in loaded:
            loaded[key], _ = load_policy(config)
            prepare_training(loaded[key], config)
        policy = loaded[key]
        policy.zero_grad()
        policy.train()
        rollouts = ragged_rollouts(policy)[:num_rows]
        sums[name] = accumulate_gradients(policy, rollouts, 0, config)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1e9).item()
        sums[name]["grad_norm"] = distributed.largest(norm)
        gradients = {key: distributed.whole(p.grad).contiguous() for key, p in policy.named_parameters()}
        if distributed.rank() == 0:
            save_file(gradients, Path(folder) / f"{name}.safetensors")
    policy = next(iter(loaded.values()))
    optimizer = torch.optim.AdamW(parameter_groups(policy), lr=1e-3)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    parts = {
        "weights": list(policy.parameters()),
        "gradients": [p.grad for p in policy.parameters()],
        "moments": states,
    }
    sizes = {name: sum(distributed.local(part).numel() for part in tensors) for name, tensors in parts.items()}
    by_rank = distributed.exchange(sizes)
    if distributed.rank() == 0:
        (Path(folder) / "sums.json").write_text(json.dumps({"sums": sums, "held": by_rank}))


if __name__ == "__main__":
    main(*sys.argv[1:])
