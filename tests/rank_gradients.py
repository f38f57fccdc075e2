"""The gradients of one step by one rank, by two and by four: `rank_gradients.py MODEL FOLDER`.

Of each case the first of N ranks writes FOLDER/N/<case>.safetensors, with every gradient whole, and FOLDER/N/sums.json.
The ranks are forked from one process, which has imported everything: an import takes longer than all gradients.
"""

import json
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_GRPO_train import ragged_rollouts, tiny_config

import GRPO_train
import SFT_helper
import SFT_train
from GRPO_helper import LENGTH_NORMALIZATIONS, LOSSES
from plainrl import distributed
from plainrl import policy as policy_module
from plainrl.config import SFTConfig
from plainrl.corrections import ENGINE_CORRECTIONS, KL_ESTIMATORS, RATIO_LEVELS
from plainrl.policy import load_policy, parameter_groups, prepare_training
from plainrl.records import TokenizedExample
from plainrl.supplement_config import DPOConfig
from supplement import DPO_train
from supplement.preference_data import TokenizedPair
from supplement.preference_scores import PairScore

CLIP = {"loss_type": "grpo_clip"}
# A key, the table of its names, and what else is set. Its cases have all names, also those that are added later.
TABLES = [
    ("ratio_level", RATIO_LEVELS, CLIP),
    ("engine_correction", ENGINE_CORRECTIONS, CLIP | {"sampling_min_tokens": 0, "engine_correction_cap": 1.1}),
    ("kl_estimator", KL_ESTIMATORS, {"kl_coefficient": 0.1}),
]
# name -> settings, and how many of the rollouts are in the step
CASES = {
    f"{loss} {length}": ({"loss_type": loss, "length_normalization": length, "ratio_cap": 1.1}, 8)
    for loss in LOSSES
    for length in LENGTH_NORMALIZATIONS
}
CASES |= {f"{key} {name}": (others | {key: name}, 8) for key, table, others in TABLES for name in table}
# 7 rows by two ranks: one microbatch is repeated with weight 0
CASES |= {f"SFT {name}": ({"length_normalization": name}, 7) for name in SFT_helper.LENGTH_NORMALIZATIONS}
CASES |= {
    "DPO": ({}, 6),  # 3 pairs
    "cliprange_high": (CLIP | {"cliprange": 0.1, "cliprange_high": 0.3}, 8),
    "cliprange_dual": (CLIP | {"cliprange_dual": 1.2}, 8),
    "another division into microbatches": ({"gradient_accumulation_steps": 1}, 8),
    "few tokens a microbatch": ({"microbatch_tokens": 24}, 8),
    "fewer rows than ranks": ({}, 1),
    "nothing to learn": ({}, 0),
    "entropy term": ({"entropy_coefficient": 0.1}, 8),
    "compute_dtype bfloat16": ({"compute_dtype": "bfloat16"}, 8),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, 8),
    "num_replicas": ({"num_replicas": 2}, 8),
}

CASES_OF_RANKS = {1: list(CASES), 2: list(CASES), 4: ["num_replicas"]}


def config_of(model, settings):
    settings = {"gradient_accumulation_steps": 8} | settings  # alone and by two ranks one row a microbatch
    needs_ratio = "old_log_probs" in LOSSES[settings.get("loss_type", "reinforce_with_baseline")].needs
    epochs = 2 if needs_ratio else 1
    return tiny_config(model=model, epochs_per_rollout_batch=epochs, max_context_tokens=512, **settings)


def rollouts_of(policy):
    """Rollouts whose log-probs by engine and reference differ from the old ones, so that each correction counts."""
    rollouts, generator = ragged_rollouts(policy), torch.Generator().manual_seed(1)
    for row in rollouts:
        noise = 0.2 * torch.randn(2, len(row.old_log_probs), generator=generator)
        row.response = row.response._replace(log_probs=(row.old_log_probs + noise[0]).tolist())
        row.reference_log_probs = row.old_log_probs + noise[1]
    return rollouts


def accumulate(name, policy, rollouts, config):
    """Add the gradients of a case by the script that its name begins with. Return its sums, or its metrics as sums."""
    rows = [(row.response.prompt_ids, row.response.token_ids) for row in rollouts]
    sizes = {"model": config.model, "train_batch_size": 8, "gradient_accumulation_steps": 8}
    if name.startswith("SFT"):
        settings = SFTConfig(length_normalization=name.removeprefix("SFT "), **sizes)
        examples = [TokenizedExample(rollout.example, *row) for rollout, row in zip(rollouts, rows, strict=True)]
        metrics = SFT_train.accumulate_gradients(policy, examples, 0, settings)
    elif name == "DPO":
        pairs = [TokenizedPair(None, *one, other[1]) for one, other in zip(rows[::2], rows[1::2], strict=True)]
        references = [PairScore(-20.0, -30.0)] * len(pairs)
        metrics = DPO_train.accumulate_gradients(policy, pairs, references, 0, DPOConfig(**sizes))
    else:
        return GRPO_train.accumulate_gradients(policy, rollouts, 0, config)
    return metrics | {"loss": metrics["train/loss"], "num_tokens": metrics["train/num_response_tokens"]}


def timeouts_of(policies):
    """How long a rank waits for the others, in seconds, by the kind of its process groups."""
    if distributed.num_ranks() == 1:
        return {}
    meshes = [next(policy.parameters()).device_mesh for policy in policies]
    groups = {
        "tensors": [dist.group.WORLD],
        "objects": [distributed._world.objects],
        "patient": [distributed._world.patient],
        "meshes": [group for mesh in meshes for group in mesh.get_all_groups()],
        "replicas": [group for mesh in meshes if mesh.ndim == 2 for group in mesh.get_all_groups()],
    }
    cpu = torch.device("cpu")
    return {
        kind: [group._get_backend(cpu).options._timeout.total_seconds() for group in of_kind]
        for kind, of_kind in groups.items()
    }


def run_rank(rank, num_ranks, port, model, folder):
    """Be one of several ranks, as torchrun would start it."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ.update({name: str(value) for name, value in (address | world).items()})
    first = tiny_config(model=model, max_context_tokens=512)
    distributed.join(first)
    if num_ranks > 1:
        policy_module.load_weights = None  # each rank reads its share alone
    sums, loaded = {}, {}
    for name in CASES_OF_RANKS[num_ranks]:
        settings, num_rows = CASES[name]
        if settings.get("num_replicas", 1) > num_ranks:
            settings = {}
        of_script = {} if name.startswith("SFT") else settings
        config = config_of(model, of_script)
        key = (config.compute_dtype, config.gradient_checkpointing, config.num_replicas)
        if key not in loaded:
            policy, _ = load_policy(config)
            prepare_training(policy, config)
            loaded[key] = policy, rollouts_of(policy)
        policy, rollouts = loaded[key]
        policy.zero_grad()
        policy.train()
        sums[name] = accumulate(name, policy, rollouts[:num_rows], config)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1e9).item()
        sums[name]["grad_norm"] = distributed.largest(norm)
        gradients = {key: distributed.whole(p.grad).contiguous() for key, p in policy.named_parameters()}
        if distributed.rank() == 0:
            save_file(gradients, folder / f"{name}.safetensors")
    policy, _ = next(iter(loaded.values()))
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
    limits = [value for name, value in first if name.startswith("max_") and name.endswith("_seconds")]
    found = {
        "sums": sums,
        "held": by_rank,
        "limits": limits,
        "timeouts": timeouts_of([one for one, _ in loaded.values()]),
    }
    if distributed.rank() == 0:
        (folder / "sums.json").write_text(json.dumps(found))


def main(model, folder):
    for num_ranks in CASES_OF_RANKS:
        own_folder = Path(folder) / str(num_ranks)
        own_folder.mkdir()
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]  # a free one
        torch.multiprocessing.start_processes(
            run_rank, (num_ranks, port, model, own_folder), nprocs=num_ranks, start_method="fork"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
