"""Prefix trees: the same scores and gradients as row by row, for far fewer positions."""

import inspect
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from plainrl.devices import can_compile
from plainrl.log_probs import get_masked_response_log_probs
from plainrl.policy import compile_blocks
from plainrl.prefix_tree import (
    NAME_PREFIX,
    NAMES,
    build_prefix_tree,
    gather_rows,
    prefix_tree_attention,
    share_prefixes,
    shares_prefixes,
    why_not_shared,
)
from SFT_helper import get_response_log_probs, join_prompt_and_response_ids, sft_loss

TEMPLATE = list(range(100, 140))
PROMPTS = {
    "a template, groups of responses, ragged": [
        *[[*TEMPLATE, 5, 6, 7]] * 3,
        *[[*TEMPLATE, 8]] * 2,
        [*TEMPLATE, 9, 10, 11, 12],
    ],
    "nothing shared": [[5, 6, 7], [8], [9, 10], [11], [12, 13, 14, 15], [16]],
    "one prompt": [[5, 6, 7]] * 6,
}
RESPONSES = [[20, 21], [20, 22, 23, 24], [20, 21], [25], [26, 27, 28, 29, 30], [31, 32]]  # two of them the same


@pytest.fixture
def sharing_model(tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    assert share_prefixes(model)
    return model


def scores_and_gradient(model, batch, parts):
    """Scores of all response tokens and the gradient of their SFT loss, in microbatches of the rows given."""
    model.zero_grad()
    found = {}
    for rows in parts:
        width = int(batch["response_mask"][rows].nonzero()[:, 1].max()) + 1
        part = {name: tensor[rows, :width] for name, tensor in batch.items()}
        scores = get_masked_response_log_probs(model, **part, return_token_entropy=True)
        sft_loss(scores["log_probs"], part["response_mask"], 1.0, num_step_rows=len(RESPONSES)).backward()
        for index, row in enumerate(rows):
            mask = part["response_mask"][index]
            found[row] = torch.stack([scores["log_probs"][index][mask], scores["token_entropy"][index][mask]]).detach()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return torch.cat([found[row] for row in sorted(found)], dim=1), gradient


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4, 5]], [[0, 3, 5], [4], [2, 1]]])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_scores_and_gradients_are_those_of_row_by_row(tiny_model, sharing_model, prompts, parts, checkpointing):
    """In float64, but for the norms of Transformers, which compute in float32: that is all that differs."""
    tiny_model, sharing_model = tiny_model.double(), sharing_model.double()
    batch = join_prompt_and_response_ids(prompts, RESPONSES, padding_id=0)
    assert not shares_prefixes(tiny_model)
    expected, expected_gradient = scores_and_gradient(tiny_model, batch, [[row] for row in range(6)])
    if checkpointing:
        sharing_model.gradient_checkpointing_enable()
    sharing_model.train()
    scores, gradient = scores_and_gradient(sharing_model, batch, parts)
    torch.testing.assert_close(scores, expected, atol=2e-7, rtol=2e-7)
    assert (gradient - expected_gradient).norm() < 2e-7 * expected_gradient.norm()


def test_rows_that_are_wholly_shared(tiny_model, sharing_model):
    """A response of one token is predicted from its prompt: equal prompts leave nothing behind the trunk."""
    batch = join_prompt_and_response_ids([[5, 6, 7]] * 3, [[20], [21], [22]], padding_id=0)
    full = get_response_log_probs(tiny_model, batch["input_ids"], batch["labels"])["log_probs"]
    shared = get_masked_response_log_probs(sharing_model, **batch)["log_probs"]
    torch.testing.assert_close(shared[batch["response_mask"]], full[batch["response_mask"]], atol=2e-6, rtol=2e-6)


def test_a_row_without_a_response_is_no_trouble(sharing_model):
    batch = join_prompt_and_response_ids([[5, 6, 7], [5, 6]], [[], [21]], padding_id=0)
    assert get_masked_response_log_probs(sharing_model, **batch)["log_probs"].count_nonzero() == 1


def test_the_mask_may_end_before_the_rows_do(tiny_model, sharing_model):
    """No row's last tokens need be scored."""
    batch = join_prompt_and_response_ids([[5, 6, 7], [5, 6]], [[20, 21, 22], [23]], padding_id=0)
    batch["response_mask"][:, -2:] = False
    full = get_response_log_probs(tiny_model, batch["input_ids"], batch["labels"])["log_probs"]
    shared = get_masked_response_log_probs(sharing_model, **batch)["log_probs"]
    torch.testing.assert_close(shared, full.masked_fill(~batch["response_mask"], 0), atol=2e-6, rtol=2e-6)


def test_each_distinct_prefix_is_computed_once(sharing_model):
    batch = join_prompt_and_response_ids(PROMPTS["a template, groups of responses, ragged"], RESPONSES, padding_id=0)
    shapes = []
    sharing_model.base_model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    get_masked_response_log_probs(sharing_model, **batch)
    # the template, the rests of three prompts, and of the responses what predicts another token and is not repeated
    assert shapes == [(1, 40 + (3 + 1 + 4) + (1 + 2) + (0 + 4) + 1, 64)]


@pytest.mark.parametrize("kernel", ["flash-attn", "torch", "torch without enable_gqa"])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_the_packed_sequences_are_the_same_attention(prompts, kernel, monkeypatch):
    """What the kernels for sequences of unequal length are given, computed by a plain softmax per sequence."""
    batch = join_prompt_and_response_ids(prompts, RESPONSES, padding_id=0)
    tree = build_prefix_tree(batch["input_ids"], batch["response_mask"])
    num_nodes = tree.token_ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, heads, num_nodes, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]

    def attend(with_flash_attn):
        output, _ = prefix_tree_attention(
            torch.nn.Module(),
            *qkv,
            tree.can_see[:, None],
            with_flash_attn=with_flash_attn,
            scaling=0.5,
            prefix_tree=tree,
        )
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        return output, *torch.autograd.grad((output * weights).sum(), qkv)

    expected = attend(with_flash_attn=False)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    of_torch = varlen_attn if kernel == "torch" else varlen_attn_without_gqa
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_torch)
    monkeypatch.setattr("plainrl.prefix_tree.can_run_packed", lambda queries: True)
    assert tree.added_starts[-1] == num_nodes
    for ours, theirs in zip(attend(kernel == "flash-attn"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_torchs_packed_kernel_is_called_as_it_is_declared():
    """The stand-in below takes what the installed torch takes."""
    from torch.nn.attention import varlen

    declared, ours = (inspect.signature(function).parameters for function in (varlen.varlen_attn, varlen_attn))
    assert list(declared)[:7] == list(ours)[:7]
    assert set(list(ours)[7:]) == {"scale", "window_size", "enable_gqa"} <= set(declared)


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch's kernel computes: causal, as its window says. It takes heads that share keys if it is told so."""
    assert window_size == (-1, 0) and (enable_gqa or query.shape[1] == key.shape[1])
    return flash_attn_varlen_func(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, causal=True)


def varlen_attn_without_gqa(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """The same as torch 2.11 declares it."""
    return varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
    """What the kernel of flash-attn computes, sequence by sequence: causal, aligned at the ends."""
    assert causal and max_seqlen_q >= cu_seqlens_q.diff().max() and max_seqlen_k >= cu_seqlens_k.diff().max()
    outputs = []
    for (first, last), (start, end) in zip(
        itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        keys, values = (x[start:end].repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = softmax_scale * torch.einsum("qhd,khd->hqk", q[first:last], keys)
        is_seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
        weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


def test_a_model_with_flash_attention_computes_the_same_through_its_packed_kernel(monkeypatch):
    """All of the path but the kernel itself, which only a GPU has."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    model = small(Qwen2Config, Qwen2ForCausalLM)
    batch = join_prompt_and_response_ids([[5, 6 + index] for index in range(6)], RESPONSES, padding_id=0)
    rows = [list(range(6))]
    plain = model(batch["input_ids"]).logits
    expected = scores_and_gradient(model, batch, rows)
    model.config._attn_implementation_internal = "flash_attention_2"  # as if it had been loaded with it
    assert share_prefixes(model) and shares_prefixes(model)
    assert model.config._attn_implementation == NAMES["flash_attention_2"]
    scores, gradient = scores_and_gradient(model, batch, rows)
    torch.testing.assert_close(scores, expected[0], atol=4e-6, rtol=2e-6)
    assert (gradient - expected[1]).norm() < 4e-6 * expected[1].norm()
    torch.testing.assert_close(model(batch["input_ids"]).logits, plain)  # without a tree


def test_gathered_rows_get_the_sum_of_their_gradients():
    values = torch.arange(6.0).view(3, 2).requires_grad_()
    rows = gather_rows(values, torch.tensor([[2, 0], [2, 2]]))
    assert rows.tolist() == [[[4.0, 5.0], [0.0, 1.0]], [[4.0, 5.0], [4.0, 5.0]]]
    rows.sum().backward()
    assert values.grad.tolist() == [[1.0, 1.0], [0.0, 0.0], [3.0, 3.0]]


def test_gradients_of_shared_rows_are_summed_in_float32():
    """In bfloat16 256 + 1 is 256: a sum over many rows would stand still."""
    values = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(values, torch.zeros(1024, dtype=torch.long)).sum().backward()
    assert values.grad.item() == 1024


def small(config_class, model_class, **overrides):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return model_class(config_class(**sizes, **heads, **overrides))


def test_a_model_with_another_attention_stays_as_it_is():
    for overrides in ({"sliding_window": 4}, {"sliding_window": None, "attention_dropout": 0.1}):
        model = small(MistralConfig, MistralForCausalLM, **overrides)
        assert not share_prefixes(model)
        assert not shares_prefixes(model)
    assert why_not_shared(small(MistralConfig, MistralForCausalLM, sliding_window=4)) == (
        "its attention has a sliding window"
    )
    dropping = small(MistralConfig, MistralForCausalLM, sliding_window=None, attention_dropout=0.1)
    assert why_not_shared(dropping) == "it has dropout"
    for values, reason in (
        ({"layer_types": ["chunked_attention"]}, "it has layers of chunked_attention"),
        ({"attn_logit_softcapping": 50.0}, "its attention scores are capped"),
        (
            {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
            "its values are not as wide as its keys",
        ),
    ):
        other = small(Qwen2Config, Qwen2ForCausalLM)
        vars(other.config).update(values)
        assert why_not_shared(other) == reason and not share_prefixes(other)
    assert not share_prefixes(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)))
    without = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)
    assert share_prefixes(GPT2LMHeadModel(without))
    swallowing = small(NemotronConfig, NemotronForCausalLM)
    assert not why_not_shared(swallowing)  # its layers hand no keywords on to their attention
    assert not share_prefixes(swallowing) and swallowing.config._attn_implementation == "sdpa"
    eager = small(Qwen2Config, Qwen2ForCausalLM)
    eager.set_attn_implementation("eager")
    assert not share_prefixes(eager)
    plain = small(Qwen2Config, Qwen2ForCausalLM)
    assert share_prefixes(plain)
    assert share_prefixes(plain)  # twice is once
    assert plain.config._attn_implementation == NAME_PREFIX + "sdpa"


def test_a_pass_without_a_tree_is_the_models_own(tiny_model, sharing_model):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    for mask in (None, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])):
        assert torch.equal(tiny_model(ids, attention_mask=mask).logits, sharing_model(ids, attention_mask=mask).logits)


def test_how_a_model_attends_is_not_saved_with_it(sharing_model, tmp_path):
    sharing_model.save_pretrained(tmp_path)
    assert NAME_PREFIX not in (tmp_path / "config.json").read_text()


@pytest.mark.skipif(not can_compile("cpu"), reason="no C++ compiler, or no headers of Python, on this machine")
def test_compiled_blocks_compute_the_same():
    model = small(Qwen2Config, Qwen2ForCausalLM)
    share_prefixes(model)
    names = list(model.state_dict())
    batches = [
        join_prompt_and_response_ids([[5, 6 + index] for index in range(6)], [row[:size] for row in RESPONSES], 0)
        for size in (2, 5)
    ]
    expected = [scores_and_gradient(model, batch, [list(range(6))]) for batch in batches]
    compile_blocks(model)
    assert list(model.state_dict()) == names
    for batch, (scores, gradient) in zip(batches, expected, strict=True):
        found = scores_and_gradient(model, batch, [list(range(6))])
        torch.testing.assert_close(found[0], scores, atol=4e-6, rtol=2e-6)
        assert (found[1] - gradient).norm() < 4e-6 * gradient.norm()
