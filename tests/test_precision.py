"""The working copy in 16 bits beside float32 weights."""

import copy

import pytest
import torch
from test_lora import make_rows
from transformers import AutoConfig, AutoModelForCausalLM

from plainrl.checkpoint import TrainingState, restore, write_checkpoint
from plainrl.config import SFTConfig
from plainrl.log_probs import get_masked_response_log_probs
from plainrl.policy import load_policy, prepare_training
from plainrl.precision import add_working_copy, refresh_working_copy, working_copy
from plainrl.prefix_tree import share_prefixes


def loss_of(policy):
    return -get_masked_response_log_probs(working_copy(policy), **make_rows())["log_probs"].sum()


def gradient_of(policy):
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def load(folder, dtype="bfloat16", **settings):
    sizes = {"max_context_tokens": 256, "sampling_max_tokens": 8}
    config = SFTConfig(model=str(folder), compute_dtype=dtype, **sizes, **settings)
    return *load_policy(config), config


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scores_are_those_of_a_model_in_16_bits(tiny_model_folder, dtype):
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=getattr(torch, dtype))
    share_prefixes(plain)
    policy, _, _ = load(tiny_model_folder, dtype)
    assert torch.equal(loss_of(policy), loss_of(plain))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


def test_in_float32_the_policy_computes_itself(tiny_model_folder):
    policy, _, _ = load(tiny_model_folder, "float32")
    assert working_copy(policy) is policy


def test_the_copy_is_no_part_of_the_policy(tiny_model_folder):
    policy, _, _ = load(tiny_model_folder)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    assert list(policy.state_dict()) == list(plain.state_dict())
    assert list(dict(policy.named_modules())) == list(dict(plain.named_modules()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_near_that_in_float32(tiny_model_folder, checkpointing):
    gradients = []
    for dtype in ("float32", "bfloat16"):
        policy, _, config = load(tiny_model_folder, dtype, gradient_checkpointing=checkpointing)
        prepare_training(policy, config)
        loss_of(policy).backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in policy.parameters())
        weights = working_copy(policy).parameters()
        assert all(weight.grad is None for weight in weights if weight.dtype == torch.bfloat16)
        gradients.append(gradient_of(policy))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    assert gradients[1].norm() == pytest.approx(gradients[0].norm().item(), rel=0.05)


def test_microbatches_are_added_in_float32(tiny_model):
    """In bfloat16 a sum of 300 ones would stop at 256."""
    add_working_copy(tiny_model, "bfloat16")
    layer = working_copy(tiny_model).model.layers[0].mlp.up_proj
    for _ in range(300):
        layer(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
    assert (tiny_model.model.layers[0].mlp.up_proj.weight.grad == 300).all()


def test_a_frequent_token_has_the_gradient_of_all_its_places(tiny_model):
    """1,000 places, each with a gradient of 1."""
    add_working_copy(tiny_model, "bfloat16")
    embed = working_copy(tiny_model).get_input_embeddings()
    found = embed(torch.full((1000,), 7))
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert (tiny_model.get_input_embeddings().weight.grad[7] == 1000).all()


def test_a_scaled_embedding_is_that_of_a_model_in_16_bits():
    """Gemma multiplies by sqrt(640) = 25.298, which is 25.25 in bfloat16."""
    sizes = {"hidden_size": 640, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32, "head_dim": 32}
    policy = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gemma3_text", num_attention_heads=2, num_key_value_heads=1, **sizes)
    )
    in_16_bits = copy.deepcopy(policy).to(torch.bfloat16)
    add_working_copy(policy, "bfloat16")
    ids = torch.arange(32)[None]
    found = working_copy(policy).get_input_embeddings()(ids)
    assert torch.equal(found, in_16_bits.get_input_embeddings()(ids))
    found.sum().backward()
    assert policy.get_input_embeddings().weight.grad[1:].unique().tolist() == [25.25]  # token 0 is padding


def test_the_tied_output_layer_and_the_embedding_move_one_weight(tiny_model):
    add_working_copy(tiny_model, "bfloat16")
    worker = working_copy(tiny_model)
    weight = tiny_model.get_input_embeddings().weight
    assert weight is tiny_model.get_output_embeddings().weight
    (2 * worker.get_input_embeddings()(torch.tensor([7]))).sum().backward()
    worker.get_output_embeddings()(torch.ones(1, 64, dtype=torch.bfloat16))[0, 7].backward()
    assert (weight.grad[7] == 3).all() and not weight.grad[8].any()


def test_no_rounded_embedding_is_kept_that_nobody_uses(tiny_model_folder):
    """Without a tied output layer the table is looked up in float32 alone."""
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32, tie_word_embeddings=False)
    add_working_copy(policy, "bfloat16")
    masters = [id(master) for master, _ in policy._working_copy[1]]
    assert id(policy.get_input_embeddings().weight) not in masters
    assert id(policy.get_output_embeddings().weight) in masters
    assert len(masters) == len(list(policy.parameters())) - 1


def test_steps_too_small_for_16_bits_add_up(tiny_model_folder):
    """The spacing of bfloat16 next to 1 is 1/128 above and 1/256 below, so a step of 1e-3 rounds to nothing."""
    policy, _, config = load(tiny_model_folder, learning_rate=1e-3)
    norm, of_copy = policy.model.norm.weight, working_copy(policy).model.norm.weight
    optimizer = prepare_training(policy, config)
    with torch.no_grad():
        norm.fill_(1.0)
    refresh_working_copy(policy)
    for number in range(1, 5):
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert norm[0].item() == pytest.approx(1 - number * 1e-3, abs=1e-5)
        assert of_copy[0].item() == (1.0 if number == 1 else torch.tensor(norm[0].item()).bfloat16().item())
    assert of_copy[0].item() < 1


def take_steps(policy, optimizer, count):
    for _ in range(count):
        loss_of(policy).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(tiny_model_folder, tmp_path, checkpointing):
    """From the checkpoint's float32 weights, on a CPU."""
    settings = {"learning_rate": 1e-3, "gradient_checkpointing": checkpointing}
    policy, tokenizer, config = load(tiny_model_folder, **settings)
    optimizer = prepare_training(policy, config)
    state = TrainingState(policy, tokenizer, optimizer, "data")
    take_steps(policy, optimizer, 3)
    state.complete_step(3, 0)
    write_checkpoint(tmp_path / "step_3", state, {})
    take_steps(policy, optimizer, 3)

    resumed, _ = load_policy(config, tmp_path / "step_3")
    optimizer = prepare_training(resumed, config)
    restore(tmp_path / "step_3", TrainingState(resumed, tokenizer, optimizer, "data"))
    take_steps(resumed, optimizer, 3)
    for (name, expected), found in zip(policy.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert torch.equal(loss_of(resumed), loss_of(policy)) and loss_of(policy).isfinite()
