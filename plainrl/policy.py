"""The policy: load it, choose kernels and precision, make its optimizer, clip its gradient, score with it."""

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from plainrl.config import RunConfig, TrainConfig
from plainrl.devices import has_module
from plainrl.distributed import divide_weights, exchange, num_ranks
from plainrl.divided_weights import is_empty, make_empty_model, read_shares
from plainrl.lean_layers import keep_less
from plainrl.log_probs import changes_logits, compile_scores, compute_output_in_float32, get_masked_response_log_probs
from plainrl.lora import add_adapters, load_adapters
from plainrl.memory import check_memory
from plainrl.microbatches import microbatches
from plainrl.model_files import (
    causal_class,
    find_dropout,
    load_tokenizer,
    load_weights,
    read_model_config,
    resolve_model,
    set_dropout,
)
from plainrl.optimizers import OPTIMIZERS
from plainrl.precision import add_working_copy, refresh_working_copy, working_copy
from plainrl.prefix_tree import share_prefixes, why_not_shared
from plainrl.records import Response, UserError

MOST_LOSS_SCALE_REDUCTION = 1024  # if the gradient still overflows then, no scale helps
# For a model whose weights are only read. It computes nothing, so it needs no working copy and no GPU.
ON_CPU = {"policy_device": "cpu", "compute_dtype": "float32", "attn_implementation": "auto"}
Metrics = TypeVar("Metrics", bound=Mapping[str, float])


def load_policy(
    config: RunConfig, checkpoint: Path | None = None, for_training: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the policy with float32 weights on its device, in evaluation mode, and its tokenizer.

    In 16 bits it has a working copy that computes: see plainrl/precision.py. Over several ranks it is divided, and each
    reads its share alone: see plainrl/divided_weights.py. With `lora_rank` it has adapters, and its own weights are
    frozen: see plainrl/lora.py. Dropout is off, except in SFT with `dropout=true`. With dropout, the ratio of a policy
    that did not move would differ from 1.

    Args:
        config: names the model.
        checkpoint: folder of a checkpoint. If given, its policy is loaded instead.
        for_training: whether the GPU's memory has to hold what training takes.

    Raises:
        UserError: the model is unknown, incomplete or not supported, its tokenizer or its adapters do not fit, its
            context is too short, or training does not fit into the GPU's memory.
    """
    transformers_logging.disable_progress_bar()
    of_adapters = config if isinstance(config, TrainConfig) and config.lora_rank else None
    # Adapters stand beside the weights that the run began with. The checkpoint's model is the sum of both.
    folder = str(checkpoint / "model") if checkpoint and not of_adapters else resolve_model(config.model)
    label = f"model = {config.model}" + (f" ({folder})" if folder != config.model else "")
    model_config = read_model_config(folder, label)
    if for_training and isinstance(config, TrainConfig):
        check_memory(model_config, config)
    _begin_on_gpu(config)
    rates = find_dropout(model_config)
    keeps_dropout = getattr(config, "dropout", False)  # a key of SFT alone
    if not keeps_dropout:
        set_dropout(model_config, dict.fromkeys(rates, 0.0))
    source = (folder, label, model_config, choose_attention(config, model_config))
    policy = make_empty_model(*source) or load_weights(*source)
    tokenizer = load_tokenizer(folder, label, policy)
    if name := changes_logits(policy):
        raise UserError(f"{label}: it changes its logits ({name}), which is not supported; use another model")
    require_context(policy, config)
    if config.float32_output_layer:
        compute_output_in_float32(policy)
    if of_adapters:
        add_adapters(policy, of_adapters)
    if checkpoint:
        load_adapters(policy, checkpoint)
    if not is_empty(policy):
        policy.to(config.policy_device)  # pyright: ignore[reportArgumentType]
    obstacle = why_not_shared(policy)
    if not share_prefixes(policy):
        reason = obstacle or "its layers do not hand a prefix tree on to their attention"
        print(f"{label}: rows are padded and share no prefix ({reason})")
    if rates and not keeps_dropout:
        print(f"{label}: dropout is off ({', '.join(f'{key} = {rate:g}' for key, rate in rates.items())})")
        policy.config = copy.deepcopy(policy.config)  # what is saved; the layers keep the one without dropout
        set_dropout(policy.config, rates)
    # vLLM serves some architectures by the class of Transformers, which it changes for compiling when it starts. The
    # changed class reads this attribute, which only models made after the change would have.
    cast(Any, policy.base_model).do_not_compile = True
    _choose_what_computes(policy.eval(), config, folder, label)
    return policy, tokenizer


def _begin_on_gpu(config: RunConfig) -> None:
    """If the policy's device is a GPU, say that loading begins, and choose among its kernels."""
    if config.policy_device != "cpu":
        print(f"loading the policy onto {config.policy_device}: {config.model}", flush=True)
        # With a mask, cuDNN's backward pass can give NaN (PyTorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)


def _choose_what_computes(policy: PreTrainedModel, config: RunConfig, folder: str, label: str) -> None:
    """Divide the policy over the ranks, and read its shares. Alone, give it a working copy to compute in 16 bits."""
    if num_ranks() == 1:
        add_working_copy(policy, config.compute_dtype)
    else:  # what is gathered of a block is its 16-bit copy
        divide_weights(policy, config.policy_device, config.compute_dtype, config.num_replicas)
    if is_empty(policy):
        read_shares(policy, folder, label, config.policy_device)


def require_context(policy: PreTrainedModel, config: RunConfig) -> None:
    """Raise a UserError if rows may be longer than the context, or so long that the rotary embeddings change."""
    context = getattr(policy.config, "max_position_embeddings", None)
    if context is not None and config.max_context_tokens > context:
        raise UserError(
            f"max_context_tokens = {config.max_context_tokens}: {config.model} has a context of {context} tokens; "
            "lower it to that"
        )
    rope = getattr(policy.config, "rope_parameters", None) or {}
    for block in (rope, *(part for part in rope.values() if isinstance(part, dict))):  # or one by kind of layer
        original = block.get("original_max_position_embeddings") or context
        if block.get("rope_type") == "longrope" and original and config.max_context_tokens > original:
            raise UserError(
                f"max_context_tokens = {config.max_context_tokens}: beyond {original} tokens {config.model} has other "
                "rotary embeddings (longrope), for the shorter rows of a microbatch, too; lower it to that"
            )


def blocks_of(policy: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the policy's blocks, in order.

    Raises:
        UserError: the policy has no blocks that Transformers marks as such.
    """
    blocks = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UserError(f"compile_policy = true: {policy.config.model_type} has no blocks to compile; leave it out")
    return blocks


def compile_blocks(policy: PreTrainedModel) -> None:
    """Compile the policy's blocks in place, and its scores. One graph serves any number of tokens.

    Parameters keep their names.
    """
    for block in blocks_of(policy):
        block.compile(dynamic=True)
    compile_scores(policy)


def prepare_training(policy: PreTrainedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """Put the policy into training mode, as configured, and return its optimizer."""
    model = working_copy(policy)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.compile_policy:  # the compiler chooses itself what is computed again
        print("compile_policy = true: the first step compiles, which takes from half a minute to minutes", flush=True)
        compile_blocks(model)
    else:
        # Checkpointing computes them again anyhow. With adapters the last matmul would be computed again, too.
        keep_less(model, in_gated_layers=not (config.gradient_checkpointing or config.lora_rank))
    model.train()
    optimizer = OPTIMIZERS[config.optimizer].make(parameter_groups(policy), config)
    optimizer.register_step_post_hook(lambda *_: refresh_working_copy(policy))
    return optimizer


def parameter_groups(policy: PreTrainedModel) -> list[dict[str, Any]]:
    """Return the trained parameters for the optimizer. Weight decay leaves those of one dimension alone.

    These are the weights of norms, and biases. Source: Radford et al. 2018 (GPT), section 4.1.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    decayed, others = ([p for p in trained if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def choose_attention(config: RunConfig, model_config: PreTrainedConfig | None = None) -> str:
    """Return the attention implementation as configured.

    `auto` is flash-attention 2 if it can run, else sdpa, else eager. Few models lack sdpa.

    Args:
        config: the run's configuration.
        model_config: the model's. If given, `auto` also looks at what the model's class supports.

    Raises:
        UserError: flash_attention_2 is configured, but it cannot run.
    """
    obstacles = {
        "a CUDA policy_device": config.policy_device == "cpu",
        "compute_dtype = bfloat16 or float16": config.compute_dtype == "float32",
        "the package flash-attn (`uv sync --no-group cpu --group gpu --group flash`)": not has_module("flash_attn"),
    }
    missing = [need for need, is_missing in obstacles.items() if is_missing]
    if config.attn_implementation == "flash_attention_2" and missing:
        raise UserError(f"attn_implementation = flash_attention_2 needs {' and '.join(missing)}; or use auto")
    if config.attn_implementation != "auto":
        return config.attn_implementation
    model_class = None if model_config is None else causal_class(model_config)
    if not missing and (model_class is None or model_class._supports_flash_attn):
        return "flash_attention_2"
    return "sdpa" if model_class is None or model_class._supports_sdpa else "eager"


def compute_clipped_gradient(
    policy: PreTrainedModel, accumulate: Callable[[float], Metrics], config: TrainConfig
) -> tuple[Metrics, float, float]:
    """Compute the gradient of an optimizer step, and clip its norm to `max_grad_norm`.

        g = (gradient of loss_scale * loss) / loss_scale,      g <- g * min(1, max_grad_norm / |g|)

    In float16, numbers below 6e-8 are zero and numbers above 65,504 are infinite. The loss is therefore multiplied by a
    loss scale. The gradient is accumulated in float32 and divided by the scale there. If it overflows, the whole
    gradient is computed again with half the scale, so that no batch is skipped. Each step starts with the configured
    scale, so that a resumed run does not have to restore it.

    Args:
        policy: the policy, whose gradients are None or zero.
        accumulate: adds loss_scale times the step's gradient to the parameters' gradients, and returns the step's
            metrics.
        config: `compute_dtype`, `loss_scale`, `max_grad_norm`.

    Returns:
        What `accumulate` returned, the norm before clipping, and the scale that was used (1 except in float16). The
        norm may be infinite or NaN, see `require_finite`.

    Source: Micikevicius et al., Mixed Precision Training, 2018, section 3.2. If a gradient overflows, they skip the
    step instead.
    """
    loss_scale = config.loss_scale if config.compute_dtype == "float16" else 1.0
    smallest = max(loss_scale / MOST_LOSS_SCALE_REDUCTION, 1.0)
    while True:
        metrics = accumulate(loss_scale)
        if loss_scale != 1:
            torch._foreach_div_([p.grad for p in policy.parameters() if p.grad is not None], loss_scale)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        can_be_fixed = all(map(math.isfinite, metrics.values())) and loss_scale > smallest
        if math.isfinite(grad_norm) or not can_be_fixed:
            return metrics, grad_norm, loss_scale
        smaller = max(loss_scale / 2, smallest)
        tqdm.write(
            f"the gradient overflows float16 times loss_scale = {loss_scale:g}; computed again with {smaller:g}",
            file=sys.stdout,
        )
        loss_scale = smaller
        policy.zero_grad(set_to_none=True)


def require_finite(step: int, loss: float, grad_norm: float, advice: str) -> None:
    """Raise a UserError if loss or gradient norm is infinite or NaN. Call it before the weights change."""
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise UserError(f"step {step}: loss {loss}, gradient norm {grad_norm}; {advice}")


def score_responses(
    policy: PreTrainedModel,
    responses: Sequence[Response],
    padding_id: int,
    batch_size: int,
    temperature: float = 1.0,
) -> list[dict[str, Tensor]]:
    """Score the sampled token ids with the policy, without gradients and without dropout.

    Args:
        policy: the policy, whose working copy computes. Training or evaluation, its mode is the same afterwards.
        responses: with their prompts, in any order. Responses of similar length share a forward pass.
        padding_id: token id that fills rows up.
        batch_size: most responses in a forward pass.
        temperature: at which the scores are taken, as in `get_masked_response_log_probs`.

    Returns:
        For each response, in the order given, its `log_probs` and `token_entropy` in nats. Each has shape (number of
        response tokens,), float32, on the CPU.
    """
    prompts, tokens = [response.prompt_ids for response in responses], [response.token_ids for response in responses]
    model = working_copy(policy)
    was_training = model.training
    model.eval()
    scores: dict[int, dict[str, Tensor]] = {}
    for part in microbatches(model, prompts, tokens, padding_id, batch_size):
        with torch.no_grad():  # no inference mode: what FSDP gathers in it could not be trained afterwards
            part_scores = get_masked_response_log_probs(
                model, **part.tensors, return_token_entropy=True, temperature=temperature
            )
        mask = part.tensors["response_mask"].cpu()
        part_scores = {name: values.float().cpu() for name, values in part_scores.items()}
        for row, index in enumerate(part.indices):
            scores[index] = {name: values[row, mask[row]] for name, values in part_scores.items()}
    model.train(was_training)
    scores = {index: score for of_rank in exchange(scores) for index, score in of_rank.items()}
    return [scores[index] for index in range(len(responses))]
