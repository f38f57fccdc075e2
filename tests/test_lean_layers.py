"""Norms and gated layers that keep less for the backward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from plainrl.config import SFTConfig
from plainrl.lean_layers import RMSNorm, keep_less
from plainrl.policy import load_policy, prepare_training

SIZES = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50, "num_hidden_layers": 1}


def make_model(model_type, width=64, feed_forward=128, dtype=torch.float32):
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": width, "intermediate_size": feed_forward, **SIZES}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **tokens)).to(dtype).train()


def outputs_and_gradient(model):
    """Return the logits of 7 tokens, and the gradient of a sum over them."""
    model.zero_grad()
    logits = model(torch.arange(3, 10)[None]).logits
    (logits.float() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("llama", {"LlamaRMSNorm": 3, "LlamaMLP": 1}),
        ("qwen2", {"Qwen2RMSNorm": 3, "Qwen2MLP": 1}),
        ("qwen3", {"Qwen3RMSNorm": 5, "Qwen3MLP": 1}),
        ("phi3", {"Phi3RMSNorm": 3}),  # its gate and its other matrix are one
        ("gemma2", {"Gemma2MLP": 1}),  # its norms multiply by 1 + weight
        ("olmo2", {"Olmo2MLP": 1}),  # its norms round once
        ("gpt_oss", {}),
        ("gpt2", {}),
    ],
)
def test_layers_that_compute_otherwise_are_left_alone(model_type, changed):
    model = make_model(model_type, 16, 32)
    assert keep_less(model) == sum(changed.values())
    names = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    assert {name: names.count(name) for name in names} == changed


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_outputs_are_the_same_bits_and_gradients_equal(model_type, dtype, tolerance):
    model = make_model(model_type, dtype=dtype)
    names = list(model.state_dict())
    logits, gradient = outputs_and_gradient(model)
    assert keep_less(model)
    lean_logits, lean_gradient = outputs_and_gradient(model)
    assert torch.equal(logits, lean_logits) and names == list(model.state_dict())
    assert (gradient - lean_gradient).norm() < tolerance * gradient.norm()


def test_the_gradient_of_the_norm_is_that_in_float64():
    generator = torch.Generator().manual_seed(0)
    x, weight, of_y = (torch.randn(size, generator=generator) for size in ((2, 5, 8), (8,), (2, 5, 8)))
    exact = [part.double().requires_grad_() for part in (x, weight)]
    y = exact[1] * exact[0] / (exact[0].square().mean(-1, keepdim=True) + 1e-6).sqrt()
    y.backward(of_y.double())
    found = [part.requires_grad_() for part in (x, weight)]
    output = RMSNorm.apply(*found, 1e-6)
    output.backward(of_y)
    torch.testing.assert_close(output.double(), y, rtol=1e-6, atol=1e-6)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-6)


def bytes_kept(model, length):
    """Return what a forward pass keeps for the backward pass: storages, each once, that are no weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.arange(length)[None] % 50).logits.sum()
    return sum(storage.nbytes() for storage in kept.values())


def test_a_block_keeps_4_f_and_8_d_bytes_a_token_less():
    width, feed_forward, length = 64, 128, 32
    model = make_model("llama", width, feed_forward, torch.bfloat16)
    before = bytes_kept(model, length)
    keep_less(model)
    saved = before - bytes_kept(model, length)
    of_last_norm = 4 * width
    assert saved == length * (4 * feed_forward + 8 * width + of_last_norm)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}])
def test_no_matmul_is_computed_again(tiny_model_folder, settings):
    sizes = {"max_context_tokens": 256, "sampling_max_tokens": 8, "compute_dtype": "float32"}
    config = SFTConfig(model=tiny_model_folder, **sizes, **settings)
    policy, _ = load_policy(config)
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            outputs_and_gradient(policy)
        counts.append(counter.get_total_flops())
        prepare_training(policy, config)
    assert counts[0] == counts[1] > 0


def test_random_numbers_are_left_alone():
    model = make_model("llama")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    keep_less(model)
    outputs_and_gradient(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({}, {"LlamaRMSNorm", "LlamaMLP"}),
        ({"gradient_checkpointing": True}, {"LlamaRMSNorm"}),  # a block is computed again as a whole
        ({"lora_rank": 2}, {"LlamaRMSNorm"}),
    ],
)
def test_training_uses_them(tiny_model_folder, settings, changed):
    sizes = {"max_context_tokens": 256, "sampling_max_tokens": 8}
    config = SFTConfig(model=tiny_model_folder, compute_dtype="float32", **sizes, **settings)
    policy, _ = load_policy(config)
    prepare_training(policy, config)
    found = {type(module).__name__ for module in policy.modules() if "forward" in vars(module)}
    assert {name for name in found if name.startswith("Llama")} == changed
