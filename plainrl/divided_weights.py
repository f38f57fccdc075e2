"""Let each rank read its share of a model's weights from the files, so that no rank ever holds the whole model.

    make_empty_model     the model's modules, with parameters that have a shape and no memory (PyTorch's meta device)
    divide_weights       divides them over the ranks (distributed.py)
    read_shares          gives each share its memory, and reads it from the safetensors files

This is done only where the files hold exactly the tensors of the model, by name and size, and where the model can be
tried without weights. Otherwise each rank loads the whole model: `model_files.load_weights` renames what older files
call otherwise, and says what is wrong.
"""

from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from plainrl.checkpoint import is_finite, saved_tensors
from plainrl.distributed import exchange, load_shares, local, num_ranks, rank, together
from plainrl.model_files import (
    NEEDS,
    causal_class,
    in_one_line,
    leave_out_sampling_flags,
    read_generation_config,
    refuse_tensors,
)


def make_empty_model(folder: str, label: str, model_config: PreTrainedConfig, attention: str) -> PreTrainedModel | None:
    """Return the model with float32 parameters on the meta device, or None if each rank has to load it whole.

    Buffers, such as the frequencies of rotary positions, follow from the configuration and are there.

    Args:
        folder: the model's folder.
        label: names the model at the start of messages.
        model_config: as `read_model_config` returned it.
        attention: the attention implementation.

    Raises:
        UserError: the model cannot be made from its configuration, or its generation config is damaged.
    """
    if num_ranks() == 1:
        return None
    from accelerate import init_empty_weights  # imported here, as it takes seconds

    with in_one_line(label, "the model", NEEDS), init_empty_weights(include_buffers=False):
        model_class = causal_class(model_config)
        # Flash attention cannot be tried without weights: with a mask it asks for values.
        on_trial = "sdpa" if "flash" in attention else attention
        policy = model_class._from_config(model_config, attn_implementation=on_trial, dtype=torch.float32)
    policy.tie_weights()  # within the context, a tied output layer was given a table of its own
    sizes = {name: tuple(tensor.shape) for name, tensor in saved_tensors(policy).items()}
    if not all(exchange(sizes_in_files(Path(folder)) == sizes and _runs_without_weights(policy))):
        if rank() == 0:
            print(f"{label}: each rank loads the whole model before it is divided, which takes memory")
        return None
    policy.set_attn_implementation(attention)
    policy.generation_config = read_generation_config(folder, label) or policy.generation_config
    leave_out_sampling_flags(policy, label)
    return cast(PreTrainedModel, policy)


def is_empty(policy: PreTrainedModel) -> bool:
    """Return whether the policy's weights are still to be read."""
    return any(weight.is_meta for weight in policy.parameters())


def read_shares(policy: PreTrainedModel, folder: str, label: str, device: str) -> None:
    """Read this rank's share of every weight, in place. All ranks have to call it. Other dtypes become float32.

    Args:
        policy: as `make_empty_model` made it, divided over the ranks.
        folder: the model's folder.
        label: names the model at the start of messages.
        device: where the shares are to be.

    Raises:
        UserError: a file cannot be read, or weights are infinite or NaN.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    buffers = {name: buffer.to(device) for name, buffer in policy.named_buffers()}
    policy.to_empty(device=torch.device(device))  # of the buffers too
    policy.tie_weights()  # if it was not divided, `to_empty` did the same
    for name, buffer in policy.named_buffers():
        buffer.copy_(buffers[name])
    with in_one_line(label, "the model", NEEDS, folder):
        load_shares(saved_tensors(policy), HuggingFaceStorageReader(folder))
    infinite = [name for name, weight in policy.named_parameters() if not is_finite(local(weight.detach()))]
    together(lambda: refuse_tensors(label, infinite=infinite))


def sizes_in_files(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the size of each tensor in a folder's safetensors files.

    There is none if a file is damaged, or if a tensor stands in two files, such as whole weights beside shards.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, KeyError, SafetensorError):
        return {}
    if any(len(getattr(tensor, "chunks", ())) > 1 for tensor in found.values()):
        return {}
    return {name: tuple(getattr(tensor, "size", ())) for name, tensor in found.items()}


def _runs_without_weights(policy: PreTrainedModel) -> bool:
    """Return whether a model on the meta device computes, and keeps its buffers. It does not if it looks at values."""
    token = torch.zeros(1, 1, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="meta")  # made by Transformers, it would depend on values
    try:
        with torch.no_grad():
            policy.base_model(input_ids=token, position_ids=token, attention_mask=mask, use_cache=False)
    except Exception:  # of any type: each model fails in its own way
        return False
    return not any(buffer.is_meta for buffer in policy.buffers())
