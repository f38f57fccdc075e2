"""The fast log-probs of response tokens: those of SFT_helper.get_response_log_probs, values and gradients."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from plainrl import log_probs
from plainrl.config import GRPOConfig
from plainrl.devices import can_compile
from plainrl.log_probs import compute_output_in_float32, get_masked_response_log_probs
from plainrl.policy import load_policy
from plainrl.precision import working_copy
from plainrl.prefix_tree import share_prefixes
from plainrl.preflight import check_scores
from plainrl.records import UserError
from SFT_helper import (
    compute_entropy,
    get_response_log_probs,
    join_prompt_and_response_ids,
    sft_microbatch_train_step,
)

RESPONSES = [[20, 21], [20, 22, 23, 24], [20, 21], [25], [26, 27, 28, 29, 30], [31, 32]]  # two of them the same


def ragged_batch():
    return join_prompt_and_response_ids(
        [[5, 6, 7], [8], [9, 10, 11, 12, 13]], [[20, 21], [22, 23, 24, 25, 26], [27]], padding_id=0
    )


def test_label_scores_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0]]])
    scores = log_probs._score_labels(logits, torch.tensor([[1, 1]]), True)
    expected = torch.tensor([[math.log(0.75), math.log(0.2)]])
    torch.testing.assert_close(scores["log_probs"], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(scores["token_entropy"], compute_entropy(logits), atol=1e-6, rtol=0)
    assert set(log_probs._score_labels(logits, torch.tensor([[1, 1]]), False)) == {"log_probs"}


@pytest.mark.parametrize("block_numbers", [1, 2 * 7, 2**21])
def test_the_gradient_of_label_scores_is_that_of_finite_differences(block_numbers, monkeypatch):
    """Whatever the blocks; one logit is impossible."""
    monkeypatch.setattr(log_probs, "CPU_BLOCK_NUMBERS", block_numbers)
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, 3])

    def scores_of(logits):
        return log_probs._score_labels(logits, labels, False)["log_probs"]

    assert torch.autograd.gradcheck(scores_of, logits, eps=1e-7, atol=1e-6)
    impossible = logits.detach().clone()
    impossible[0, 3] = -math.inf
    impossible.requires_grad_()
    scores = log_probs._score_labels(impossible, labels, True)
    scores["log_probs"].sum().backward()
    expected = torch.nn.functional.one_hot(labels, 7) - impossible.detach().softmax(-1)
    torch.testing.assert_close(impossible.grad, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("autocasts", [False, True])
def test_bfloat16_logits_are_scored_in_float32(autocasts):
    """Also under autocast, which makes matmuls bfloat16."""
    logits = torch.randn(1, 2, 50_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[..., 7] = -torch.inf
    labels = torch.tensor([[3, 4]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocasts):
        scores = log_probs._score_labels(logits, labels, True)
    expected = logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(scores["log_probs"].double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores["token_entropy"].double(), compute_entropy(logits.double()), atol=1e-5, rtol=0)


def test_masked_scores_equal_full_scores(tiny_model):
    batch = ragged_batch()
    mask = batch["response_mask"]
    full = get_response_log_probs(tiny_model, batch["input_ids"], batch["labels"], return_token_entropy=True)
    masked = get_masked_response_log_probs(tiny_model, **batch, return_token_entropy=True)
    for name in ("log_probs", "token_entropy"):
        torch.testing.assert_close(masked[name][mask], full[name][mask], atol=1e-6, rtol=1e-6)
        assert (masked[name][~mask] == 0).all()


def test_masked_scores_have_the_same_gradient(tiny_model):
    """In float64: in float32 two ways to compute a softmax differ by a few 1e-6 here."""
    tiny_model, batch = tiny_model.double(), ragged_batch()
    gradients = []
    for masked in (False, True):
        tiny_model.zero_grad()
        if masked:
            log_probs = get_masked_response_log_probs(tiny_model, **batch)["log_probs"]
        else:
            log_probs = get_response_log_probs(tiny_model, batch["input_ids"], batch["labels"])["log_probs"]
        sft_microbatch_train_step(log_probs, batch["response_mask"], 1)
        gradients.append(torch.cat([p.grad.flatten() for p in tiny_model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7])
def test_scores_and_gradients_do_not_depend_on_the_chunks(tiny_model, monkeypatch, chunk_tokens):
    """Several chunks recompute their logits in the backward pass; no chunk holds more than its share."""
    batch = ragged_batch()
    results, seen = [], []
    tiny_model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    for size in (1024, chunk_tokens):
        monkeypatch.setattr(log_probs, "LOGIT_CHUNK_TOKENS", size)
        tiny_model.zero_grad()
        seen.clear()
        scores = get_masked_response_log_probs(tiny_model, **batch, return_token_entropy=True)
        sft_microbatch_train_step(scores["log_probs"], batch["response_mask"], 1)
        gradient = torch.cat([p.grad.flatten() for p in tiny_model.parameters()])
        results.append((scores["log_probs"].detach(), scores["token_entropy"], gradient))
    assert max(seen) <= chunk_tokens
    assert sum(seen) == 2 * 8  # forward, and again in backward
    torch.testing.assert_close(results[0][:2], results[1][:2], atol=1e-6, rtol=1e-6)
    assert (results[0][2] - results[1][2]).norm() < 2e-6 * results[0][2].norm()


def test_only_response_positions_reach_the_output_layer(tiny_model):
    """A prompt of 400 tokens with a response of 10 computes 10 rows of logits, not 409."""
    batch = join_prompt_and_response_ids([list(range(1, 401))], [list(range(1, 11))], padding_id=0)
    seen = []
    tiny_model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    get_masked_response_log_probs(tiny_model, **batch)
    assert seen == [(10, 512)]


def test_masked_scores_refuse_models_that_change_their_logits(tiny_model):
    tiny_model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        get_masked_response_log_probs(tiny_model, **ragged_batch())


def test_padding_does_not_change_scores(tiny_model):
    short = join_prompt_and_response_ids([[5, 6, 7]], [[20, 21]], padding_id=0)
    batch = ragged_batch()
    alone = get_masked_response_log_probs(tiny_model, **short)["log_probs"][short["response_mask"]]
    together = get_masked_response_log_probs(tiny_model, **batch)["log_probs"][0][batch["response_mask"][0]]
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=1e-6)


def test_scoring_leaves_inputs_and_weights_alone(tiny_model):
    batch = ragged_batch()
    copies = {name: value.clone() for name, value in batch.items()}
    weights = [parameter.detach().clone() for parameter in tiny_model.parameters()]
    get_masked_response_log_probs(tiny_model, **batch, return_token_entropy=True)
    for name, value in batch.items():
        assert torch.equal(value, copies[name]), name
    assert all(torch.equal(a, b) for a, b in zip(weights, tiny_model.parameters(), strict=True))


@pytest.mark.parametrize("num_copies", [4, 16])  # 16: 256 response tokens, far above the weight's 64 rows
def test_no_tensor_grows_with_rows_times_vocabulary(tiny_model, monkeypatch, num_copies):
    """Neither saved for the backward pass nor made by an operation: logits exist a chunk at a time."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        num_logits = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == 512:
                    self.num_logits = max(self.num_logits, tensor.numel() // 512)
            return result

    monkeypatch.setattr(log_probs, "LOGIT_CHUNK_TOKENS", 6)
    monkeypatch.setattr(log_probs, "CPU_BLOCK_NUMBERS", 2 * 512)
    assert share_prefixes(tiny_model)
    prompts = [[5, 6, 7 + index] for index in range(6 * num_copies)]
    batch = join_prompt_and_response_ids(prompts, RESPONSES * num_copies, padding_id=0)
    with Largest() as largest:
        scores = get_masked_response_log_probs(tiny_model, **batch, return_token_entropy=True)
        sft_microbatch_train_step(scores["log_probs"], batch["response_mask"], 1)
    assert 6 <= largest.num_logits <= 64  # the weight itself, transposed, has 64 rows of 512


def plain_scores(logits, labels, temperature):
    """Log-probs and entropies by torch's softmax, whose gradients are autograd's."""
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, labels[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("of_log_probs", "of_entropies"), [(1.0, 0.0), (0.0, 1.0), (1.0, -0.3)])
@pytest.mark.parametrize("block_numbers", [1, 2 * 7, 2**21])
def test_gradients_of_log_probs_and_entropies_are_autograds(
    temperature, of_log_probs, of_entropies, block_numbers, monkeypatch
):
    """Apart and together, whatever the blocks. What the loss does not contain reaches the function as None."""
    monkeypatch.setattr(log_probs, "CPU_BLOCK_NUMBERS", block_numbers)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 7, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 6, 3, 3, 1])

    def gradient(score):
        leaf = logits.clone().requires_grad_()
        parts = zip((of_log_probs, of_entropies), weights, score(leaf), strict=True)
        sum(factor * (weight * values).sum() for factor, weight, values in parts if factor).backward()
        return leaf.grad

    fast = gradient(lambda leaf: log_probs._score_labels(leaf, labels, True, temperature).values())
    plain = gradient(lambda leaf: plain_scores(leaf, labels, temperature))
    torch.testing.assert_close(fast, plain, atol=1e-13, rtol=1e-11)


def test_an_impossible_token_leaves_the_gradient_of_the_entropy_finite():
    """Its probability is 0, and so is its part of the gradient, though its log-prob is -inf."""
    logits = torch.tensor([[0.0, -math.inf, math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    log_probs._score_labels(logits, torch.tensor([0]), True)["token_entropy"].sum().backward()
    p = [0.25, 0.0, 0.75]
    entropy = -sum(value * math.log(value) for value in p if value)
    expected = [-value * (math.log(value) + entropy) if value else 0.0 for value in p]
    torch.testing.assert_close(logits.grad, torch.tensor([expected], dtype=torch.float64), atol=1e-14, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bit_logits_are_computed_in_float32(dtype):
    """They differ from those in float64 by their own last rounding alone, also under autocast."""
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    labels = torch.tensor([3, 4, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = log_probs._score_labels(logits, labels, True, 0.6)
        (1000 * (scores["log_probs"] - 0.3 * scores["token_entropy"])).sum().backward()  # 1000: no float16 is tiny
    exact = logits.detach().double().requires_grad_()
    of_labels, entropies = plain_scores(exact, labels, 0.6)
    (1000 * (of_labels - 0.3 * entropies)).sum().backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("chunk_tokens", [1024, 3])
def test_an_entropy_in_the_loss_gives_the_plain_models_gradient(tiny_model, monkeypatch, chunk_tokens):
    """Through the whole model in float64, in one chunk and in several that are computed again."""
    monkeypatch.setattr(log_probs, "LOGIT_CHUNK_TOKENS", chunk_tokens)
    tiny_model, batch = tiny_model.double(), ragged_batch()
    mask, gradients = batch["response_mask"], []
    for fast in (False, True):
        tiny_model.zero_grad()
        if fast:
            scores = get_masked_response_log_probs(tiny_model, **batch, return_token_entropy=True, temperature=0.8)
            of_labels, entropies = scores["log_probs"], scores["token_entropy"]
        else:
            of_labels, entropies = plain_scores(tiny_model(batch["input_ids"]).logits, batch["labels"], 0.8)
        ((of_labels + 0.2 * entropies) * mask).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in tiny_model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-11, rtol=1e-6)


def test_an_entropy_that_no_loss_contains_costs_no_backward_pass(tiny_model, monkeypatch):
    """The clamp of the entropy's gradient is not reached, and gradients are bit for bit those without entropies."""
    batch, gradients = ragged_batch(), []
    for return_token_entropy in (False, True):
        tiny_model.zero_grad()
        scores = get_masked_response_log_probs(tiny_model, **batch, return_token_entropy=return_token_entropy)
        sft_microbatch_train_step(scores["log_probs"], batch["response_mask"], 1)
        gradients.append(torch.cat([p.grad.flatten() for p in tiny_model.parameters()]))
    assert torch.equal(*gradients)
    scores = get_masked_response_log_probs(tiny_model, **batch, return_token_entropy=True)
    assert scores["token_entropy"].requires_grad
    monkeypatch.setattr(torch.Tensor, "clamp", lambda *_, **__: pytest.fail("the entropy's gradient was computed"))
    scores["log_probs"].sum().backward()


@pytest.mark.parametrize("has_bias", [False, True])
def test_an_output_layer_in_float32_rounds_nothing(tiny_model, has_bias):
    """The weights stay in 16 bits, and keep their names. Logits are no longer rounded."""
    tiny_model.to(torch.bfloat16)
    layer = tiny_model.get_output_embeddings()
    if has_bias:
        layer.bias = torch.nn.Parameter(torch.randn(512, generator=torch.Generator().manual_seed(1)).bfloat16())
    hidden = 3 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    names = set(tiny_model.state_dict())
    expected = hidden.double() @ layer.weight.double().T + (layer.bias.double() if has_bias else 0)
    errors = []
    for in_float32 in (False, True):
        if in_float32:
            compute_output_in_float32(tiny_model)
        logits = layer(hidden)
        errors.append((logits.double() - expected).abs().max().item())
    assert logits.dtype == torch.float32 and errors[1] < 1e-4 < 1e-2 < errors[0]
    logits.sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert set(tiny_model.state_dict()) == names


def test_an_output_layer_of_another_kind_is_refused():
    policy = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    policy.lm_head = torch.nn.Sequential(policy.lm_head)
    with pytest.raises(UserError, match="^float32_output_layer = true: the output layer of gpt2 is a Sequential, no"):
        compute_output_in_float32(policy)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_policy_with_an_output_layer_in_float32(tiny_model_folder, lora_rank):
    """Its fast scores are those of the plain model, also beside adapters, where the layer is held in 16 bits."""
    settings = {"model": tiny_model_folder, "max_context_tokens": 256, "sampling_max_tokens": 8, "lora_rank": lora_rank}
    batch, seen = ragged_batch(), []
    for in_float32 in (False, True):
        config = GRPOConfig(**settings, compute_dtype="bfloat16", float32_output_layer=in_float32)
        policy, _ = load_policy(config)
        check_scores(policy, config)
        model = working_copy(policy)
        model.get_output_embeddings().register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
        scores = get_masked_response_log_probs(model, **batch)["log_probs"]
        plain = get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
        scores.sum().backward()
        mask = batch["response_mask"]
        assert (scores - plain)[mask].abs().max() < 0.1
        assert seen == [torch.float32 if in_float32 else torch.bfloat16] * 2
        seen.clear()


@pytest.mark.skipif(not can_compile("cpu"), reason="needs a compiler")
@pytest.mark.parametrize(("dtype", "temperature"), [("float32", 1.0), ("bfloat16", 0.7)])
def test_compiled_scores_are_those_of_the_plain_computation(dtype, temperature):
    """Values, and the gradients of log-probs and entropies, for two numbers of rows."""
    for num_rows in (5, 9):
        generator = torch.Generator().manual_seed(num_rows)
        logits = (3 * torch.randn(num_rows, 700, generator=generator)).to(getattr(torch, dtype))
        labels = torch.randint(0, 700, (num_rows,), generator=generator)
        found = []
        for is_compiled in (False, True):
            leaf = logits.clone().requires_grad_()
            scores = log_probs._score_labels(leaf, labels, True, temperature, is_compiled)
            (scores["log_probs"].sum() + 0.5 * scores["token_entropy"].sum()).backward()
            found.append((scores["log_probs"], scores["token_entropy"], leaf.grad))
        for plain, compiled in zip(*found, strict=True):
            torch.testing.assert_close(compiled, plain, atol=2e-5 if dtype == "float32" else 2e-3, rtol=1e-3)
