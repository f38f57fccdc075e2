"""Let each rank read its share of a model's weights from the files, so that no rank ever holds the whole model.

    make_empty_model     the model's modules, with parameters that have a shape and no memory (PyTorch's meta device)
    distributed.shard    divides them over the ranks
    read_shares          gives each share its memory, and reads it from the safetensors files

Files whose names or sizes are not exactly the model's are not read in this way. Each rank then loads the whole model,
where `model_files.load_weights` renames what older files call otherwise, and says what is wrong.
"""

from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from plainrl.checkpoint import saved_tensors
from plainrl.distributed import local, num_ranks, together
from plainrl.model_files import (
    NEEDS,
    causal_class,
    in_one_line,
    is_finite,
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
        policy = model_class._from_config(model_config, attn_implementation=attention, dtype=torch.float32)
    policy.tie_weights()  # within the context, a tied output layer was given a table of its own
    if sizes_in_files(Path(folder)) != {name: tuple(tensor.shape) for name, tensor in saved_tensors(policy).items()}:
        return None
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
        UserError: weights are infinite or NaN.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    buffers = {name: buffer.to(device) for name, buffer in policy.named_buffers()}
    policy.to_empty(device=torch.device(device))  # of the buffers too
    policy.tie_weights()  # `to_empty` did the same
    for name, buffer in policy.named_buffers():
        buffer.copy_(buffers[name])
    load(saved_tensors(policy), storage_reader=HuggingFaceStorageReader(folder))
    infinite = [name for name, weight in policy.named_parameters() if not is_finite(local(weight.detach()))]
    together(lambda: refuse_tensors(label, infinite=infinite))


def sizes_in_files(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the size of each tensor in a folder's safetensors files. Files that are damaged count as none."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError):
        return {}
    return {name: tuple(getattr(tensor, "size", ())) for name, tensor in found.items()}
