"""Try before the first step what a run needs only later: the scores, saving, reading back, room on the disk.

What a model's folder alone shows is checked in `load_policy`.
"""

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from plainrl.checkpoint import SPARE_BYTES
from plainrl.checkpoint_files import list_checkpoints
from plainrl.config import NUM_STEPS_KEYS, RunConfig, TrainConfig
from plainrl.devices import free_bytes
from plainrl.distributed import num_ranks, on_first, whole
from plainrl.faults import is_disk_full
from plainrl.log_probs import get_masked_response_log_probs
from plainrl.optimizers import OPTIMIZERS
from plainrl.policy import blocks_of
from plainrl.precision import working_copy
from plainrl.records import UserError
from SFT_helper import get_response_log_probs, join_prompt_and_response_ids

# Rounding gives about 1e-5 in float32 and up to 0.45 in bfloat16, on single tokens. An attention or logits of another
# kind give far more.
MOST_SCORE_DIFFERENCE = {torch.float32: 0.01, torch.bfloat16: 1.0, torch.float16: 1.0}  # nats


def preflight(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, config: TrainConfig) -> None:
    """Raise a UserError if the run would fail later for a reason that shows now.

    Args:
        policy: the policy, as `load_policy` returned it.
        tokenizer: its tokenizer.
        folder: the run's folder.
        config: the run's configuration.
    """
    check_scores(policy, config)
    if config.gradient_checkpointing and not policy.supports_gradient_checkpointing:
        raise UserError(
            f"gradient_checkpointing = true: {policy.config.model_type} does not support it; set it to false"
        )
    if config.compile_policy:
        blocks_of(policy)
    check_saving(policy, tokenizer, folder)
    on_first(lambda: check_room(policy, folder, config))


def check_scores(policy: PreTrainedModel, config: RunConfig) -> None:
    """Raise a UserError unless the fast scores in training mode are those of the plain model in evaluation mode.

    They are not if dropout is left, if logits change behind the output layer, or if the attention is not the plain one
    that a prefix tree replaces. Nor may a token's score depend on later tokens.
    """
    num_tokens = int(cast(Any, policy.get_input_embeddings()).weight.shape[0])
    prompt = [index % num_tokens for index in (11, 12, 13, 14)]
    responses = [[index % num_tokens for index in row] for row in ((15, 16, 17), (15, 18), (19, 20, 21, 22))]
    rows = join_prompt_and_response_ids([prompt] * len(responses), responses, padding_id=0)
    ids, labels, mask = (rows[name].to(policy.device) for name in ("input_ids", "labels", "response_mask"))
    # In 16 bits a GPU takes other kernels than in float32.
    model = policy if policy.device.type == "cpu" else working_copy(policy)
    was_training = model.training
    with torch.no_grad():
        model.eval()
        plain = get_response_log_probs(model, ids, labels)["log_probs"].float()
        model.train(not getattr(config, "dropout", False))
        fast = get_masked_response_log_probs(model, ids, labels, mask)["log_probs"].float()
    model.train(was_training)
    if not plain[mask].isfinite().all():
        raise UserError(f"model = {config.model}: its scores are infinite or NaN; use another model")
    # Not model.dtype, which is that of the first weight: a working copy looks its embeddings up in float32.
    # Nor are divided weights in the dtype that they are gathered in.
    weight = cast(Any, model.get_output_embeddings()).weight
    computes_in = weight.dtype if num_ranks() == 1 else getattr(torch, config.compute_dtype)
    found = {
        "its scores depend on later tokens; use a causal language model": plain[:, :3] - plain[:1, :3],
        "its scores in training are not those of the plain model; try attn_implementation=eager, or another model": (
            plain - fast
        )[mask],
    }
    for problem, differences in found.items():
        largest = cast(Tensor, differences).abs().max().item()
        if not largest <= MOST_SCORE_DIFFERENCE[computes_in]:
            raise UserError(f"model = {config.model}: {problem} (they differ by {largest:.2g} nats)")


def check_saving(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the policy without most of its weights, and its tokenizer, and read them back.

    Raises:
        UserError: the folder cannot be written, a file cannot be saved, or another tokenizer comes back.
    """
    name, smallest = min(policy.state_dict().items(), key=lambda item: item[1].numel())
    smallest = whole(smallest.detach())
    on_first(lambda: _try_saving(policy, name, smallest, tokenizer, folder))


def _try_saving(
    policy: PreTrainedModel, name: str, weight: Tensor, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    trial = folder / ".preflight"
    shutil.rmtree(trial, ignore_errors=True)
    sample = "".join(["User: What is 2 + 3?\nAssistant: <think> 5 ", *tokenizer.all_special_tokens])
    try:
        policy.save_pretrained(trial, state_dict={name: weight})
        tokenizer.save_pretrained(trial)
        AutoConfig.from_pretrained(trial, local_files_only=True)
        GenerationConfig.from_pretrained(trial, local_files_only=True)
        (values,) = load_file(trial / "model.safetensors").values()
        reread = AutoTokenizer.from_pretrained(trial, local_files_only=True)
        is_same = torch.equal(values, weight.cpu()) and reread.encode(sample) == tokenizer.encode(sample)
    except Exception as error:  # of any type, because each library wraps the system's error in its own
        reason = " ".join(str(error).split())[:300]
        advice = "free disk space" if is_disk_full(error) else "use another folder, or repair the model's files"
        raise UserError(f"{folder}: the policy could not be saved here ({reason}); {advice}") from error
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    if not is_same:
        raise UserError(
            f"{folder}: the saved policy or tokenizer is not the one that was loaded; repair the model's files"
        )


def check_room(policy: PreTrainedModel, folder: Path, config: TrainConfig) -> None:
    """Raise a UserError if the disk has too little room for the checkpoints that will exist at a time.

    Each holds the weights and the optimizer's moments of those that are trained, all float32. There are the kept ones
    and the one being written. final/ takes no room, because it is linked. In SFT without `max_steps` the number of
    steps is not known yet: then one must have room, and a lack for the others is only said.
    """
    free = free_bytes(folder)
    if free is None:
        return
    num_trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    num_moment_bytes = 4 * OPTIMIZERS[config.optimizer].num_moments
    size = (
        4 * sum(parameter.numel() for parameter in policy.parameters()) + num_moment_bytes * num_trained + SPARE_BYTES
    )
    most = config.keep_last + config.keep_best + 1
    num_steps = next((getattr(config, key) for key in NUM_STEPS_KEYS if getattr(config, key, 0)), 0)
    num_saved = -(-num_steps // config.checkpoint_interval) if num_steps else most
    num_new = max(1, min(most, num_saved) - len(list_checkpoints(folder)))
    if free >= num_new * size:
        return
    message = (
        f"{folder}: {num_new} checkpoints need {num_new * size / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free; "
        "free disk space, use another runs_dir, or lower keep_last"
    )
    if num_steps or free < size:
        raise UserError(message)
    print(f"warning: {message}")
