"""Attention along prefix trees: each kernel that a GPU takes, held to the same test, and all to float64.

On a CPU, plain softmax plays the two packed kernels (tests/test_prefix_tree.py). It takes the same arguments.
"""

import inspect
import sys
from functools import partial, update_wrapper
from types import SimpleNamespace

import pytest
import torch
from small_qwen import DEVICE, GPU_CHECK, ON_GPU, compare, load, make_batch, make_rows, take_rows, two_gpus
from test_prefix_tree import flash_attn_varlen_func, varlen_attn

from plainrl.devices import has_module
from plainrl.log_probs import get_masked_response_log_probs
from plainrl.precision import add_working_copy, working_copy
from plainrl.prefix_tree import build_prefix_tree, can_run_packed, prefix_tree_attention, share_prefixes

pytestmark = GPU_CHECK
KERNELS = ["sdpa", "torch's packed", "flash-attn"]
DTYPES = ["float32", "bfloat16", "float16"]
PARTS = {"one tree": [[0, 1, 2, 3, 4, 5]], "three": [[5], [3, 4], [0, 1, 2]]}


def why_not(kernel, dtype):
    """Why a packed kernel cannot run here in a dtype, or ""."""
    if kernel == "sdpa":
        return ""
    if not ON_GPU:
        return "on a CPU, float32 and bfloat16 show what a stand-in can show" if dtype == "float16" else ""
    if dtype == "float32":
        return "packed kernels take 16 bits only"
    if kernel == "flash-attn":
        return "" if has_module("flash_attn") else "the package flash-attn is not installed"
    if not can_run_packed(torch.empty(1, 1, 128, dtype=getattr(torch, dtype), device=DEVICE)):
        return "this card's compute capability is below 8.0"
    if not has_module("torch.nn.attention.varlen"):
        return f"torch {torch.__version__} has no packed kernel"
    from torch.nn.attention import varlen

    missing = {"scale", "window_size"} - set(inspect.signature(varlen.varlen_attn).parameters)
    return f"the packed kernel of torch {torch.__version__} does not take {', '.join(sorted(missing))}" * bool(missing)


@pytest.fixture
def take_kernel(monkeypatch):
    """Let prefix trees take a kernel in this test. Where the card has none, a stand-in plays it.

    Returns:
        A function of kernel and dtype. It returns the list to which each call of the packed kernel adds its arguments.
    """
    calls = []

    def watched(kernel, *args, **kwargs):
        calls.append((args, kwargs))
        return kernel(*args, **kwargs)

    def take(kernel, dtype):
        if reason := why_not(kernel, dtype):
            pytest.skip(reason)
        if kernel == "flash-attn":
            if ON_GPU:  # in the real module, which Transformers looks at, too
                module, function = sys.modules["flash_attn"], sys.modules["flash_attn"].flash_attn_varlen_func
            else:
                module, function = SimpleNamespace(), flash_attn_varlen_func
                monkeypatch.setitem(sys.modules, "flash_attn", module)
            monkeypatch.setattr(module, "flash_attn_varlen_func", partial(watched, function), raising=False)
        elif kernel == "sdpa":
            monkeypatch.setattr("plainrl.prefix_tree.can_run_packed", lambda queries: False)
        else:
            from torch.nn.attention import varlen

            monkeypatch.setattr("plainrl.prefix_tree.can_run_packed", lambda queries: True)
            kernel = varlen.varlen_attn if ON_GPU else varlen_attn
            monkeypatch.setattr(varlen, "varlen_attn", update_wrapper(partial(watched, kernel), kernel))
        return calls

    if ON_GPU and has_module("flash_attn"):
        import flash_attn  # noqa: F401  # before it is watched
    return take


def load_with(kernel, folder, dtype):
    """The model, sharing prefixes, with flash-attn if that is the kernel."""
    if kernel != "flash-attn" or ON_GPU:
        attention = "flash_attention_2" if kernel == "flash-attn" else "sdpa"
        return load(folder, attention=attention, compute_dtype=dtype)
    model = load(folder, sharing=False)
    model.config._attn_implementation_internal = "flash_attention_2"  # as if it had been loaded with it
    assert share_prefixes(model)
    add_working_copy(model, dtype)
    return model


def scores_and_gradients(policy, parts, weights):
    """Scores of all rows, and the gradients of their weighted sum, one tree after the other."""
    batch, model = make_batch(), working_copy(policy)
    found = torch.zeros(batch["labels"].shape, dtype=torch.float64)
    model.train()
    for part in parts:
        scores = get_masked_response_log_probs(model, **take_rows(batch, part, policy.device))["log_probs"]
        (scores * weights[part].to(policy.device)).sum().backward()
        found[part, : scores.shape[1]] = scores.detach().double().cpu()
    return found, [parameter.grad for parameter in policy.parameters()]


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_and_gradients_are_those_of_float64(
    qwen_folder, reference, take_kernel, kernel, dtype, parts, record_property
):
    """One tree of all rows; then three, with checkpointing. One of these is a single row, without a trunk."""
    expected, weights = reference
    calls = take_kernel(kernel, dtype)
    policy = load_with(kernel, qwen_folder, dtype)
    if len(parts) > 1:
        working_copy(policy).gradient_checkpointing_enable()
    found = scores_and_gradients(policy, parts, weights)
    compare(found, expected, dtype, record_property)
    assert bool(calls) == (kernel != "sdpa")


@two_gpus
def test_the_second_gpu_computes_the_same(qwen_folder, reference, record_property):
    """As in preset two-gpu, in bfloat16."""
    expected, weights = reference
    policy = load(qwen_folder, "cuda:1", compute_dtype="bfloat16")
    found = scores_and_gradients(policy, PARTS["three"], weights)
    compare(found, expected, "bfloat16", record_property)


def attend_by_hand(rows, queries, keys, values, scaling):
    """Attention of each node to its prefixes and itself, query by query. A node is a distinct prefix of the rows."""
    prefixes = dict.fromkeys(tuple(row[:end]) for row in rows for end in range(1, len(row) + 1))
    numbers = {prefix: number for number, prefix in enumerate(prefixes)}
    repeats = queries.shape[1] // keys.shape[0]
    outputs = []
    for prefix, number in numbers.items():
        seen = torch.tensor([numbers[prefix[:end]] for end in range(1, len(prefix) + 1)])
        own_keys, own_values = (tensor[:, seen].repeat_interleave(repeats, dim=0) for tensor in (keys, values))
        weights = (scaling * torch.einsum("hd,hkd->hk", queries[number], own_keys)).softmax(-1)
        outputs.append(torch.einsum("hk,hkd->hd", weights, own_values))
    return torch.stack(outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_and_its_gradients_are_those_written_out_in_float64(take_kernel, kernel, dtype, record_property):
    """The kernel alone, with heads as in Qwen2.5-Math. Errors are relative, and limited to some rounding errors."""
    take_kernel(kernel, dtype)
    prompts, responses = make_rows()
    rows = [prompt[-30:] + response[:60] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    tree = build_prefix_tree(ids, torch.arange(width) < lengths[:, None])
    generator = torch.Generator().manual_seed(4)
    shapes = [(num_heads, tree.token_ids.shape[1], 128) for num_heads in (4, 2, 2)]
    rounded = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes]

    ours = [part[None].to(DEVICE).requires_grad_() for part in rounded]
    tree = tree.to(DEVICE)
    output, _ = prefix_tree_attention(
        torch.nn.Module(),
        *ours,
        tree.can_see[:, None],
        with_flash_attn=kernel == "flash-attn",
        scaling=0.1,
        prefix_tree=tree,
    )
    exact = [part.double().requires_grad_() for part in rounded]
    expected = attend_by_hand(rows, exact[0].transpose(0, 1), exact[1], exact[2], 0.1)
    weights = torch.randn(expected.shape, generator=generator)
    (output[0] * weights.to(output)).sum().backward()
    (expected * weights.to(output.dtype)).sum().backward()
    pairs = {"output": (output[0], expected)}
    pairs |= {name: (one.grad[0], other.grad) for name, one, other in zip("qkv", ours, exact, strict=True)}
    for name, (found, right) in pairs.items():
        error = float((found.detach().double().cpu() - right).norm() / right.norm())
        record_property(f"error_{name}", error)
        assert error < 4 * torch.finfo(getattr(torch, dtype)).eps, name


@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_a_packed_kernel_gets_starts_and_lengths_as_worked_out_by_hand(take_kernel, kernel):
    """The tree in the docstring of plainrl/prefix_tree.py. Its trunk a b is the first sequence.

    Queries a b | c d | e f | g h. Keys a b | a b c d | a b c e f | a b g h. So the longest sequences have 2 and 5.
    """
    dtype = "bfloat16" if ON_GPU else "float32"
    calls = take_kernel(kernel, dtype)
    ids = torch.tensor([[1, 2, 3, 4, 0], [1, 2, 3, 5, 6], [1, 2, 7, 8, 0]])
    tree = build_prefix_tree(ids, ids > 0).to(DEVICE)
    nodes = torch.arange(8, dtype=getattr(torch, dtype), device=DEVICE)[:, None].expand(8, 128)
    # The kernels take no stride of 0 in the last dimension.
    query, key, value = (nodes.expand(num_heads, 8, 128)[None].contiguous() for num_heads in (4, 2, 2))
    prefix_tree_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        tree.can_see[:, None],
        with_flash_attn=kernel == "flash-attn",
        prefix_tree=tree,
    )
    ((queries, keys, values, added_starts, path_starts, most_added, longest_path), options) = calls[0]
    assert queries[:, 0, 0].tolist() == list(range(8)) and queries.shape == (8, 4, 128)
    assert keys[:, 0, 0].tolist() == values[:, 0, 0].tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2, 4, 5, 0, 1, 6, 7]
    assert added_starts.tolist() == [0, 2, 4, 6, 8] and path_starts.tolist() == [0, 2, 6, 11, 15]
    assert added_starts.dtype == path_starts.dtype == torch.int32 and (most_added, longest_path) == (2, 5)
    causal = {"causal": True}
    if kernel != "flash-attn":
        from torch.nn.attention import varlen

        has_gqa = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters  # not in torch 2.11
        causal = {"window_size": (-1, 0)} | ({"enable_gqa": True} if has_gqa else {})
    assert keys.shape[1] == (2 if causal.keys() & {"causal", "enable_gqa"} else 4)
    factor = "softmax_scale" if kernel == "flash-attn" else "scale"
    assert options == causal | {factor: 128**-0.5}
