"""How much memory training takes on a GPU: estimated before anything is loaded, and compared with the card.

The parts that depend on the number of parameters alone are exact. Activations are estimated for a Llama-like block in
16 bits, as 8 F + 48 d bytes a token. That was found on an H200 (tests/test_memory.py). The code there kept 10 d more
bytes of residuals, and 4 F + 8 d more of norms and gated layers (plainrl/lean_layers.py), so that the estimate is on
the safe side. Without checkpointing, 4 F + 13 d are what the backward pass needs now, as counted on a CPU.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from plainrl.config import TrainConfig
from plainrl.distributed import divided_blocks, num_ranks
from plainrl.log_probs import GPU_BLOCK_NUMBERS, LOGIT_CHUNK_TOKENS
from plainrl.optimizers import OPTIMIZERS
from plainrl.records import UserError

GIB = 2**30
SLEEPING_ENGINE_GIB = 2.0  # a guess: CUDA context, graphs and buffers that sleep does not free
EXACT = ("weights", "gradients", "moments", "16-bit copies", "engine")  # parts that are no estimates
ADVICE = (
    "lower microbatch_tokens (or raise gradient_accumulation_steps), set gradient_checkpointing=true, lower "
    "gpu_memory_utilization, or train adapters alone with lora_rank=32"
)


def check_memory(model_config: PreTrainedConfig, config: TrainConfig) -> None:
    """Compare the estimates for a model with the policy's GPU, and with the engine's. On a CPU, nothing is done.

    A peak that only estimated parts push over the card's memory is printed as a warning.

    Raises:
        UserError: weights, gradients, moments, copies in 16 bits and engine alone do not fit, or the engine's share
            of its GPU does not hold what it needs.
    """
    if config.needs_engine and config.evaluator_device != "cpu":
        check_engine_share(model_config, config, _card_gib(config.evaluator_device))
    if config.policy_device == "cpu":
        return
    total = _card_gib(config.policy_device)
    peaks = estimate_peaks(model_config, config, total)
    for phase, parts in peaks.items():
        needed = sum(parts.values())
        exact = sum(parts.get(name, 0.0) for name in EXACT)
        message = (
            f"{config.policy_device} has {total:.1f} GiB, and {phase} takes about {needed:.1f} GiB: "
            f"{', '.join(f'{name} {size:.1f}' for name, size in parts.items())}; {ADVICE}"
        )
        if needed > total:
            if exact > total:
                raise UserError(message)
            print(f"warning: {message}")


def check_engine_share(model_config: PreTrainedConfig, config: TrainConfig, total: float) -> None:
    """Raise a UserError if the engine's share of its GPU does not hold its weights and one context.

    Args:
        model_config, config: as in `estimate_engine_memory`.
        total: memory of the engine's GPU, in GiB.
    """
    parts, share = estimate_engine_memory(model_config, config), config.gpu_memory_utilization * total
    if sum(parts.values()) > share:
        raise UserError(
            f"gpu_memory_utilization = {config.gpu_memory_utilization:g}: that is {share:.1f} of the {total:.1f} GiB "
            f"of {config.evaluator_device}, and the engine takes {sum(parts.values()):.1f} GiB at least: "
            f"{', '.join(f'{name} {size:.1f}' for name, size in parts.items())}; raise it, lower max_context_tokens, "
            "or use a smaller model"
        )


def estimate_engine_memory(model_config: Any, config: TrainConfig) -> dict[str, float]:
    """Return what the engine must hold at least, in GiB: its weights, and keys and values of a row of full length.

        weights b n / k    a context  2 L G D b T / k                                                     bytes

    k ranks that share an engine, n parameters, b bytes of a number in `engine_dtype`, L blocks, G key-value heads, D
    width of a head, T tokens of `max_context_tokens`. What an engine needs beside them to compute is not known.

    Args:
        model_config: of the model, as Transformers reads it.
        config: precision and longest context of the engine.
    """
    text = model_config.get_text_config()
    num_heads = text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    num_bytes = 4 if config.engine_dtype == "float32" else 2
    of_a_token = 2 * text.num_hidden_layers * num_kv_heads * width
    num_parameters = sum(parameter.numel() for parameter in _make_shape(model_config).parameters())
    numbers = {"weights": num_parameters, "a context": of_a_token * config.max_context_tokens}
    return {name: num_bytes * count / config.engine_tensor_parallel / GIB for name, count in numbers.items()}


def estimate_peaks(model_config: Any, config: TrainConfig, total: float) -> dict[str, dict[str, float]]:
    """Return the parts of the peak of training and, if the engine shares the GPU, of that of sampling, in GiB.

    Args:
        model_config, config: as in `estimate_training_memory`.
        total: memory of the GPU, in GiB. The engine takes its share of it.
    """
    training = estimate_training_memory(model_config, config, max(1, num_ranks() // config.num_replicas))
    names = {
        "weights",
        "moments",
        "16-bit copies",
        "gathered",
        "logits",
    } & training.keys()  # logits: of responses that are scored
    kept = {name: size for name, size in training.items() if name in names}
    sampling = kept | {"engine": config.gpu_memory_utilization * total}
    return {"training": training} | ({"sampling": sampling} if config.shares_gpu else {})


def estimate_training_memory(model_config: Any, config: TrainConfig, num_shards: int = 1) -> dict[str, float]:
    """Return the peak of an optimizer step by parts, in GiB.

        weights 4 n    gradients 4 m    moments 8 m (rmsprop: 4 m)    copies 2 m (the working copy in 16 bits)
        with adapters: weights 4 m + 2 n (4 n in float32), no copies, but 6 w
        activations  t L (8 F + 48 d),  with gradient checkpointing  t (L 2 d + 8 F + 48 d)             bytes
        several ranks: weights, gradients and moments are divided by their number, and instead of copies there are
        gathered     (e + 2 l) 4, of weights and their gradients in 16 bits     8 in float32
        logits       c V 4 + 12 b,  with a float32 output layer  c V 8 + 8 V d + 12 b

    e parameters of the embedding and output layers, l of the largest block.
    n parameters of the model, m trained ones: all of them, or with adapters of rank r the r (in + out) of each linear
    layer of the blocks. t tokens of a microbatch, L blocks, d width, F width of the feed-forward layer, V vocabulary,
    c tokens of a chunk of logits, b numbers of a block of them. w numbers of the largest layer's matrix, whose sum with
    its adapter is made in float32 and then rounded.

    Args:
        model_config: of the model, as Transformers reads it.
        config: microbatches, checkpointing, precision, adapters, and whether the engine shares the GPU.
        num_shards: number of ranks that a copy of the policy is divided over.
    """
    text = model_config.get_text_config()
    width, num_blocks = text.hidden_size, text.num_hidden_layers
    feed_forward = getattr(text, "intermediate_size", None) or 4 * width
    model = _make_shape(model_config)
    layers = [module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
    num_added = config.lora_rank * sum(layer.in_features + layer.out_features for layer in layers)
    most_tokens = config.microbatch_size * config.max_context_tokens
    # A single row may be longer than the limit on the tokens of a microbatch.
    num_tokens = max(min(config.microbatch_tokens or most_tokens, most_tokens), config.max_context_tokens)
    is_half = config.compute_dtype != "float32"
    of_a_block = (8 * feed_forward + 48 * width) * (1 if is_half else 2)
    kept = num_blocks * of_a_block
    if config.gradient_checkpointing:
        kept = num_blocks * (2 if is_half else 4) * width + of_a_block
    has_float32_copy = is_half and config.float32_output_layer  # of the output layer's weights, and of their gradient
    logit_bytes = 4 if is_half and not has_float32_copy else 8
    logits = min(num_tokens, LOGIT_CHUNK_TOKENS) * text.vocab_size * logit_bytes + 12 * GPU_BLOCK_NUMBERS
    logits += 8 * text.vocab_size * width * has_float32_copy
    num_own = sum(parameter.numel() for parameter in model.parameters())
    own = num_own * (2 if config.lora_rank and is_half else 4)
    num_trained = num_added if config.lora_rank else num_own
    copies = {"16-bit copies": 2 * num_trained * is_half}
    if config.lora_rank:
        copies = {"merged layer": (4 + 2 * is_half) * max((layer.weight.numel() for layer in layers), default=0)}
    if num_shards > 1:
        blocks = [sum(p.numel() for p in module.parameters()) for module in divided_blocks(model)]
        gathered = num_own - sum(blocks) + 2 * max(blocks)
        copies = {"gathered": (4 if is_half else 8) * gathered}
    sizes = {
        "weights": (own + 4 * num_added) / num_shards,
        "gradients": 4 * num_trained / num_shards,
        "moments": 4 * OPTIMIZERS[config.optimizer].num_moments * num_trained / num_shards,
        **copies,
        "activations": num_tokens * kept,
        "logits": logits,
    }
    parts = {name: size / GIB for name, size in sizes.items()}
    return parts | ({"sleeping engine": SLEEPING_ENGINE_GIB} if config.shares_gpu else {})


def _make_shape(model_config: Any) -> PreTrainedModel:
    """Make a model that has no numbers, only their counts."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config)


def _card_gib(device: str) -> float:
    return torch.cuda.get_device_properties(device).total_memory / GIB
