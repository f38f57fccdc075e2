"""Run rows of tokens through a model so that every distinct prefix is computed once.

Prompts begin with the same template, and the responses of a group begin with the same prompt. Attention is causal, so
that the hidden state of a position depends on its prefix alone. Rows with the same prefix can therefore share it.
`build_prefix_tree` joins the rows into a tree of tokens. Its N nodes replace B x T padded positions:

    row 0    a b c d          nodes     a b c d e f g h
    row 1    a b c e f        position  0 1 2 3 3 4 2 3
    row 2    a b g h          trunk     a b, the nodes that all rows share

`compute_hidden_states` runs the nodes as one row, without padding. `prefix_tree_attention` lets each node see its
ancestors. Nothing else in a transformer mixes positions. A model therefore needs no change if its attention can be
replaced through Transformers' AttentionInterface. `share_prefixes` tells whether that is possible.

Symbols: B rows, T positions, N nodes, P nodes of the trunk, Q most nodes that a row adds after the trunk, H heads,
G key-value heads, D width of a head.
"""

import inspect
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from plainrl.model_files import find_dropout

NAME_PREFIX = "prefix_tree_"
STOP = "stop_at_attention"
# The model's own attention -> the one that replaces it. No new name contains "flash", because Transformers would then
# try to load a kernel by that name.
NAMES = {"sdpa": f"{NAME_PREFIX}sdpa", "flash_attention_2": f"{NAME_PREFIX}packed"}


class PrefixTree(NamedTuple):
    """A tree of tokens. Nodes are numbered in the order in which the rows add them, one row after the other."""

    token_ids: Int[Tensor, "1 nodes"]
    positions: Int[Tensor, "1 nodes"]
    num_trunk: int  # nodes 0 to P - 1 are the prefix that all rows share
    paths: Int[Tensor, "batch sequence"]  # the nodes of each row, padded with 0
    added: Int[Tensor, "batch most_added"]  # the nodes after the trunk that each row adds, padded with 0
    slots: Int[Tensor, " nodes_behind_trunk"]  # where the nodes P to N - 1 stand in added.flatten()
    # The same as sequences without padding, the trunk first, then the rows. The starts are int32 and include the end:
    # where each sequence's added nodes start, where its path starts, and the nodes of all paths.
    added_starts: Int[Tensor, " starts"]
    path_starts: Int[Tensor, " starts"]
    path_nodes: Int[Tensor, " keys"]
    # What a score is needed for, in the order of the rows: where it stands in (B, T) flattened, and its node.
    scored: Int[Tensor, " scored"]
    scored_nodes: Int[Tensor, " scored"]

    def to(self, device: torch.device | str) -> "PrefixTree":
        """Return the tree with its tensors on a device."""
        tensors = {name: part.to(device) for name, part in self._asdict().items() if isinstance(part, Tensor)}
        return self._replace(**tensors)

    @property
    def can_see(self) -> Bool[Tensor, "batch most_added sequence"]:
        """Return which nodes of its row's path an added node attends to: those up to its own position."""
        last = self.positions[0, self.added]
        return torch.arange(self.paths.shape[1], device=last.device) <= last[..., None]


def build_prefix_tree(
    input_ids: Int[Tensor, "batch sequence"], response_mask: Bool[Tensor, "batch sequence"]
) -> PrefixTree:
    """Join rows into a tree. A row ends at its last position under the mask, because no score is needed after it.

    Args:
        input_ids: (B, T), token ids. On a GPU, building a tree waits for it: build it on the CPU and move it.
        response_mask: (B, T), true where a score is needed.

    >>> ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 0]])
    >>> tree = build_prefix_tree(ids, torch.tensor([[False, True, True, True]] * 2 + [[False, True, True, False]]))
    >>> tree.token_ids.tolist(), tree.positions.tolist(), tree.num_trunk
    ([[1, 2, 3, 4, 5, 6]], [[0, 1, 2, 3, 3, 2]], 2)
    >>> tree.paths.tolist(), tree.added.tolist()
    ([[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5, 0]], [[2, 3], [4, 0], [5, 0]])
    """
    ends = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device) * response_mask
    lengths = ends.amax(dim=1).clamp(min=1).tolist()  # a row without a scored position keeps one
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    positions: list[int] = []
    paths: list[list[int]] = []
    sizes = [0]  # number of nodes before the first row and after each row
    for ids, length in zip(input_ids.tolist(), lengths, strict=True):
        path, node = [], -1
        for position, token in enumerate(ids[:length]):
            node = nodes.setdefault((node, token), len(nodes))
            if node == len(positions):
                positions.append(position)
            path.append(node)
        paths.append(path)
        sizes.append(len(nodes))
    num_trunk = min(common_length(paths[0], path) for path in paths[1:]) if len(paths) > 1 else 0
    added = [torch.arange(max(start, num_trunk), end) for start, end in itertools.pairwise(sizes)]
    padded = pad_sequence(added, batch_first=True, padding_value=-1)
    all_paths = pad_sequence([torch.tensor(path) for path in paths], batch_first=True)
    tensors = {
        "token_ids": torch.tensor([[token for _, token in nodes]]),
        "positions": torch.tensor([positions]),
        "paths": all_paths,
        "added": padded.clamp(min=0),
        "slots": (padded.flatten() >= 0).nonzero()[:, 0],
        "added_starts": torch.tensor([0, num_trunk, *map(len, added)]).cumsum(0, dtype=torch.int32),
        "path_starts": torch.tensor([0, num_trunk, *lengths]).cumsum(0, dtype=torch.int32),
        "path_nodes": torch.tensor([*range(num_trunk), *itertools.chain(*paths)]),
        "scored": response_mask.cpu().flatten().nonzero()[:, 0],
        "scored_nodes": all_paths[
            response_mask.cpu()[:, : all_paths.shape[1]]
        ],  # paths end with the last response token
    }
    return PrefixTree(num_trunk=num_trunk, **tensors).to(input_ids.device)


def share_prefixes(model: PreTrainedModel) -> bool:
    """Let a model attend along prefix trees if it can, and return whether it does. Otherwise leave it unchanged.

    It can if nothing speaks against it, see `why_not_shared`, and if a tree that is given to the model arrives at its
    attention. From then on, a forward pass without a tree uses sdpa.
    """
    if shares_prefixes(model):
        return True
    if why_not_shared(model):
        return False
    kernel = str(model.config.get_text_config()._attn_implementation)
    model.set_attn_implementation(STOP)
    arrives = _tree_arrives(model)
    model.set_attn_implementation(NAMES[kernel] if arrives else kernel)
    return arrives


def why_not_shared(model: PreTrainedModel) -> str:
    """Return what in its configuration keeps a model from attending along prefix trees, or "" if nothing does.

    The model must look its attention up by name, and this attention must be the plain one. It is causal over the whole
    context, adds nothing to its scores and clamps none, has values as wide as its keys, and uses a kernel of `NAMES`.
    Nor may the model have dropout: rows that share a prefix would share its random numbers.
    """
    config = cast(Any, model.config.get_text_config())
    kernel = config._attn_implementation
    layer_kinds = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    key_width = getattr(config, "qk_nope_head_dim", 0) + getattr(config, "qk_rope_head_dim", 0)  # latent attention
    reasons = {
        "its attention has a sliding window": getattr(config, "sliding_window", None) is not None,
        f"it has layers of {', '.join(layer_kinds)}": layer_kinds,
        "its attention scores are capped": getattr(config, "attn_logit_softcapping", None),
        "it has dropout": find_dropout(config),
        "its values are not as wide as its keys": getattr(config, "v_head_dim", key_width) != key_width,
        "its attention cannot be replaced": not model._supports_attention_backend,
        f"its attention implementation is {kernel}": kernel not in NAMES,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


class _Reached(Exception):  # noqa: N818 (no error)
    """Ends a forward pass at its first attention layer."""


def _stop_at_attention(*_: Any, prefix_tree: PrefixTree | None = None, **__: Any) -> tuple[Tensor, None]:
    raise _Reached(prefix_tree is not None)


def _tree_arrives(model: PreTrainedModel) -> bool:
    """Return whether a tree given to a model, whose attention is STOP, arrives there. The pass ends there, soon."""
    row = torch.zeros(1, 1, dtype=torch.long)
    tree = build_prefix_tree(row, row == 0).to(model.device)
    try:
        with torch.no_grad():
            compute_hidden_states(model, tree)
    except _Reached as reached:
        return bool(reached.args[0])
    return False


def shares_prefixes(model: PreTrainedModel) -> bool:
    """Return whether `share_prefixes` has prepared a model."""
    return str(model.config.get_text_config()._attn_implementation).startswith(NAME_PREFIX)


def compute_hidden_states(model: PreTrainedModel, tree: PrefixTree) -> Float[Tensor, "nodes width"]:
    """Return the last hidden state of every node, from one forward pass without padding."""
    outputs = model.base_model(
        input_ids=tree.token_ids,
        position_ids=tree.positions,
        attention_mask=tree.can_see[:, None],  # Transformers passes a mask of four dimensions on unchanged
        use_cache=False,
        prefix_tree=tree,
    )
    return outputs.last_hidden_state[0]


@torch.compiler.disable  # not compiled with the blocks, because its shapes differ from tree to tree
def prefix_tree_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "..."],
    key: Float[Tensor, "..."],
    value: Float[Tensor, "..."],
    attention_mask: Tensor | None,
    *,
    with_flash_attn: bool,
    scaling: float | None = None,
    prefix_tree: PrefixTree | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "..."], Tensor | None]:
    """Let each node attend to its ancestors and itself. Transformers' AttentionInterface calls this function.

    Args:
        module: the attention layer. Only a forward pass without a tree uses it.
        query: (1, H, N, D).
        key, value: (1, G, N, D).
        attention_mask: `can_see`, as (B, 1, Q, T).
        with_flash_attn: whether the kernel of the package flash-attn is used. Else torch's own is, where it can.
        scaling: factor of the scores. None: 1 / sqrt(D).
        prefix_tree: the tree, or None for a pass over whole rows.

    Returns:
        (1, N, H, D) in the value's dtype, and None in place of attention weights.
    """
    if prefix_tree is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert attention_mask is not None
    queries, keys, values = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if with_flash_attn or can_run_packed(queries):
        return _attend_packed(queries, keys, values, prefix_tree, factor, with_flash_attn)[None], None
    num_trunk = prefix_tree.num_trunk
    is_before = torch.ones(1, num_trunk, num_trunk, dtype=torch.bool, device=query.device).tril()
    trunk = _attend(queries[None, :num_trunk], keys[None, :num_trunk], values[None, :num_trunk], is_before, factor)
    added = _attend(
        gather_rows(queries, prefix_tree.added),
        gather_rows(keys, prefix_tree.paths),
        gather_rows(values, prefix_tree.paths),
        attention_mask[:, 0],
        factor,
    )
    return torch.cat([trunk[0], added.flatten(0, 1).index_select(0, prefix_tree.slots)])[None], None


def gather_rows(values: Float[Tensor, "nodes ..."], index: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return values[index], by an embedding look-up. Its gradient is summed in float32, in a fixed order."""
    rows = F.embedding(index, values.flatten(1).to(torch.promote_types(values.dtype, torch.float32)))
    return rows.to(values.dtype).view(*index.shape, *values.shape[1:])


def _attend(
    queries: Float[Tensor, "batch added heads width"],
    keys: Float[Tensor, "batch sequence kv_heads width"],
    values: Float[Tensor, "batch sequence kv_heads width"],
    can_see: Bool[Tensor, "batch added sequence"],
    scaling: float,
) -> Float[Tensor, "batch added heads width"]:
    """Return softmax(scaling queries keys^T) values for each row, over the keys that each query can see.

    The CPU uses plain matmuls. They hold the scores in memory, but take a fifth of the time of the fused kernel's
    backward pass. Heads that share keys form one matrix.
    """
    batch, num_queries, num_heads, width = queries.shape
    num_kv_heads, num_keys = keys.shape[2], keys.shape[1]
    repeats = num_heads // num_kv_heads
    if queries.device.type != "cpu":
        queries, keys, values = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
        keys, values = (tensor.repeat_interleave(repeats, dim=1) for tensor in (keys, values))
        output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=can_see[:, None], scale=scaling)
        return output.transpose(1, 2)
    num_matrices, num_lines = batch * num_kv_heads, repeats * num_queries
    grouped = queries.view(batch, num_queries, num_kv_heads, repeats, width).permute(0, 2, 3, 1, 4)
    bias = torch.zeros_like(can_see, dtype=queries.dtype).masked_fill(~can_see, -torch.inf)
    bias = bias[:, None, None].expand(*grouped.shape[:4], num_keys).reshape(num_matrices, num_lines, num_keys)
    grouped = grouped.reshape(num_matrices, num_lines, width)
    keys, values = (tensor.transpose(1, 2).reshape(num_matrices, num_keys, width) for tensor in (keys, values))
    weights = torch.baddbmm(bias, grouped, keys.transpose(1, 2), alpha=scaling).softmax(dim=-1)
    output = torch.bmm(weights, values).view(batch, num_kv_heads, repeats, num_queries, width)
    return output.permute(0, 3, 1, 2, 4).reshape(batch, num_queries, num_heads, width)


def can_run_packed(queries: Tensor) -> bool:
    """Return whether torch's kernel for sequences of unequal length takes these queries.

    It is flash-attention: in 16 bits, on a GPU of compute capability 8.0 or more, for heads of at most 256.
    """
    return (
        queries.is_cuda
        and queries.dtype in (torch.bfloat16, torch.float16)
        and queries.shape[-1] <= 256
        and queries.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(queries.device) >= (8, 0)
    )


def _attend_packed(
    queries: Float[Tensor, "nodes heads width"],
    keys: Float[Tensor, "nodes kv_heads width"],
    values: Float[Tensor, "nodes kv_heads width"],
    tree: PrefixTree,
    scaling: float,
    with_flash_attn: bool,
) -> Float[Tensor, "nodes heads width"]:
    """Return the same as `_attend`, by a kernel for sequences of unequal length, without padding.

    The trunk is a sequence, and so is each row. Its queries are the nodes that it adds, in the order of the nodes. Its
    keys are its whole path. Both kernels align their causal mask with a sequence's last query and key, as needed here.
    """
    keys, values = (gather_rows(tensor, tree.path_nodes) for tensor in (keys, values))
    sizes = (tree.added_starts, tree.path_starts, max(tree.num_trunk, tree.added.shape[1]), tree.paths.shape[1])
    if with_flash_attn:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        return flash_attn_varlen_func(queries, keys, values, *sizes, softmax_scale=scaling, causal=True)
    from torch.nn.attention import varlen

    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:
        options["enable_gqa"] = True  # heads share keys inside the kernel
    else:  # torch 2.11: each head gets a copy of the keys that it shares
        keys, values = (tensor.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1) for tensor in (keys, values))
    return cast(Tensor, varlen.varlen_attn(queries, keys, values, *sizes, **options))


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


for _kernel, _name in NAMES.items():
    AttentionInterface.register(_name, partial(prefix_tree_attention, with_flash_attn=_kernel == "flash_attention_2"))
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
AttentionInterface.register(STOP, _stop_at_attention)
AttentionMaskInterface.register(STOP, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
