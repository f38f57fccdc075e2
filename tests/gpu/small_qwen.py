"""What the cases of the GPU check share: the device, a small random Qwen2, its rows, and how errors are measured.

The model has what Qwen2.5-Math-1.5B has: heads of 128, grouped heads, biases, a tied output layer.
"""

import math
import os

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from plainrl.config import SFTConfig
from plainrl.lora import adapted_layers, add_adapters
from plainrl.policy import load_policy
from plainrl.precision import add_working_copy
from plainrl.prefix_tree import share_prefixes
from plainrl.records import TokenizedExample
from SFT_helper import get_response_log_probs, join_prompt_and_response_ids

DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda:0")
ON_GPU = DEVICE != "cpu"
GPU_CHECK = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason=f"no CUDA device for {DEVICE}"),
]
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")

# What is trained: settings of a run. Each variant resumes its optimizer, lowers the loss, is killed and resumed, and
# makes a whole run with the engine.
VARIANTS = {
    "all weights": {},
    "adapters": {"lora_rank": 8, "lora_alpha": 16.0, "learning_rate": 3e-3},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)

# Largest error of a score in nats, and relative error of a gradient. 16 bits on an H200 gave at most 0.010 and 0.010.
LIMITS = {"float32": (2e-4, 2e-4), "bfloat16": (0.15, 0.05), "float16": (0.15, 0.05)}
TEMPLATE = list(range(100, 160))
NUM_LAYERS = 4 if ON_GPU else 2


def save_model(folder, tokenizer):
    """Save a random Qwen2 and a tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.02,  # rounding to bfloat16 then gives sync errors of 1.004, another policy 1.4
        sliding_window=2048,
        use_sliding_window=False,  # as in Qwen2.5-Math's own configuration
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def load(folder, device=DEVICE, dtype=torch.float32, sharing=True, attention="sdpa", compute_dtype=None):
    """The model on a device. It computes shared prefixes once, unless told otherwise.

    With a compute dtype of 16 bits its working copy computes, as in a run.
    """
    from transformers import AutoModelForCausalLM

    if device != "cpu":
        torch.backends.cuda.enable_cudnn_sdp(False)  # as load_policy does
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).to(device).eval()
    assert not sharing or share_prefixes(model)
    if compute_dtype:
        add_working_copy(model, compute_dtype)
    return model


def settings_of_step(folder, **overrides):
    """The settings of a step on all rows. Some microbatches hold one row, others three."""
    settings = {
        "model": folder,
        "policy_device": DEVICE,
        "train_batch_size": 6,
        "gradient_accumulation_steps": 1,
        "microbatch_tokens": 256,
        "learning_rate": 1e-3,
    }
    return settings | overrides


def load_as_a_run(folder, **overrides):
    """The policy as a run of SFT loads it, and its configuration."""
    config = SFTConfig(**settings_of_step(folder, **overrides))
    return load_policy(config)[0], config


def with_adapters(policy, dtype):
    """The policy with adapters that are no longer zero, on its device, as preset small-gpu trains it."""
    add_adapters(policy, SFTConfig(lora_rank=8, lora_alpha=16.0, compute_dtype=dtype))
    generator = torch.Generator().manual_seed(3)
    for layer in adapted_layers(policy).values():
        layer.lora_b.data = 0.02 * torch.randn(layer.lora_b.shape, generator=generator)
    return policy.to(DEVICE)


def make_rows():
    """Two groups and a row alone. A response occurs twice. Some lengths are 64 more than a multiple of 128."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count):
        return torch.randint(5, 500, (count,), generator=generator).tolist()

    first, second = [*TEMPLATE, *tokens(40)], [*TEMPLATE, *tokens(7)]
    same = tokens(30)
    prompts = [first, first, first, second, second, TEMPLATE[:50]]
    return prompts, [tokens(92), same, same, tokens(125), tokens(1), tokens(270)]


def make_batch():
    return join_prompt_and_response_ids(*make_rows(), padding_id=0)


def make_examples():
    return [TokenizedExample(None, prompt, answer) for prompt, answer in zip(*make_rows(), strict=True)]


def take_rows(batch, rows, device=DEVICE):
    """Some rows of a batch, without needless padding, on a device."""
    width = int(batch["response_mask"][rows].nonzero()[:, 1].max()) + 1
    return {name: tensor[rows, :width].to(device) for name, tensor in batch.items()}


def score_row_by_row(model, batch):
    """The log-probs of the response tokens, each row alone and whole. They are zero elsewhere."""
    found = []
    for ids, labels, mask in zip(*(batch[name] for name in ("input_ids", "labels", "response_mask")), strict=True):
        end = int(mask.nonzero().max()) + 1
        scores = get_response_log_probs(model, ids[None, :end], labels[None, :end])["log_probs"][0]
        found.append(F.pad(scores.masked_fill(~mask[:end], 0), (0, len(mask) - end)))
    return torch.stack(found)


def norm(tensors):
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors))


def compare(found, expected, dtype, record_property):
    """Hold scores and gradients to the limits of a dtype, and record how far off they are.

    Args:
        found, expected: (scores, gradients) each.
    """
    (scores, gradients), (right_scores, right_gradients) = found, expected
    gradients = [gradient.double().cpu() for gradient in gradients]
    errors = (scores.detach().double().cpu() - right_scores.detach()).abs()
    difference = norm(one - other for one, other in zip(gradients, right_gradients, strict=True))
    record_property("score_error_max", float(errors.max()))
    record_property("score_error_mean", float(errors.sum() / right_scores.count_nonzero()))
    record_property("gradient_error", difference / norm(right_gradients))
    score_limit, gradient_limit = LIMITS[dtype]
    assert errors.max() < score_limit and difference < gradient_limit * norm(right_gradients)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
