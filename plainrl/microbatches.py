"""Decide which rows share a forward and backward pass.

The division into microbatches changes speed and memory, but no gradient. Every mean is over the whole optimizer step.
Several ranks take turns: in each round every rank computes one microbatch, and the largest sets the round's time.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from plainrl.distributed import add_to, deal_microbatches, num_ranks
from plainrl.prefix_tree import build_prefix_tree, common_length, shares_prefixes
from SFT_helper import join_prompt_and_response_ids


class Microbatch(NamedTuple):
    """Rows that share a forward and backward pass."""

    indices: list[int]  # of the rows
    tensors: dict[str, Any]  # on the policy's device
    weight: float  # of loss and sums: 1, or 0 if it is here only to make the ranks' numbers of passes equal
    num_tokens: int  # that are computed
    most_tokens: int  # in the largest microbatch of the round, for which all ranks wait


class Planned(NamedTuple):
    """The rows of a microbatch, and the tokens that it computes."""

    indices: list[int]
    num_tokens: int


def microbatches(
    policy: PreTrainedModel,
    prompt_ids: Sequence[list[int]],
    response_ids: Sequence[list[int]],
    padding_id: int,
    max_rows: int,
    max_tokens: int = 0,
    rows_together: int = 1,
) -> Iterator[Microbatch]:
    """Yield each microbatch of this rank.

    Its tensors are `input_ids`, `labels` and `response_mask`, as `SFT_helper.tokenize_prompt_and_output` returns them.
    With them goes `prefix_tree`: that of the rows, or None if the policy does not share prefixes. While the policy
    computes, a thread prepares the next microbatch.

    Args:
        policy: the policy, on its device. If it shares prefixes, a shared prefix counts once.
        prompt_ids, response_ids, max_rows, max_tokens, rows_together: as in `plan_microbatches`.
        padding_id: token id that fills rows up.
    """
    shares = shares_prefixes(policy)

    def prepare(indices: list[int]) -> dict[str, Any]:
        tensors: dict[str, Any] = join_prompt_and_response_ids(
            [prompt_ids[index] for index in indices], [response_ids[index] for index in indices], padding_id
        )
        tree = build_prefix_tree(tensors["input_ids"], tensors["response_mask"]) if shares else None
        return tensors | {"prefix_tree": tree}

    planned = plan_microbatches(prompt_ids, response_ids, max_rows, max_tokens, shares, num_ranks(), rows_together)
    most = [max(part.num_tokens for part in planned[i : i + num_ranks()]) for i in range(0, len(planned), num_ranks())]
    plan = deal_microbatches(planned)
    with ThreadPoolExecutor(1) as thread:
        upcoming = [thread.submit(prepare, part.indices) for part, _ in plan[:1]]
        for number, (part, weight) in enumerate(plan):
            parts = upcoming.pop().result()
            upcoming = [thread.submit(prepare, following.indices) for following, _ in plan[number + 1 : number + 2]]
            tensors = {name: value if value is None else value.to(policy.device) for name, value in parts.items()}
            yield Microbatch(part.indices, tensors, weight, part.num_tokens, most[number])


def plan_microbatches(
    prompt_ids: Sequence[list[int]],
    response_ids: Sequence[list[int]],
    max_rows: int,
    max_tokens: int = 0,
    counts_prefixes_once: bool = True,
    multiple_of: int = 1,
    rows_together: int = 1,
) -> list[Planned]:
    """Divide rows into microbatches. A new one begins if the next row would exceed one of the two limits.

    Rows with the same prompt stand next to each other, and so do rows of similar length. The plan depends on the rows
    alone.

    Args:
        prompt_ids, response_ids: token ids of each row.
        max_rows: most rows of a microbatch.
        max_tokens: most tokens of a microbatch. 0 means no limit. A single row, or those of a unit, may have more.
        counts_prefixes_once: whether a prefix that rows share counts once, as in a prefix tree. Else every row counts
            as much as the longest, to which it is padded.
        multiple_of: number of ranks. Above 1, the limit on tokens is lowered until the number of microbatches is a
            multiple of it, and they are ordered by size. Where that is not enough, the largest are halved. If there
            are fewer rows than ranks, each row is a microbatch.
        rows_together: so many rows that follow each other form a unit, as the two of a preference pair, which is never
            divided. They have the same prompt, and keep their order.

    Returns:
        The rows of each microbatch, and the tokens that it computes.

    >>> plan_microbatches([[1, 2], [3, 4], [1, 2]], [[5], [6], [7]], max_rows=3, max_tokens=4)
    [Planned(indices=[0, 2], num_tokens=4), Planned(indices=[1], num_tokens=3)]
    """
    rows = [prompt + response for prompt, response in zip(prompt_ids, response_ids, strict=True)]
    order = _order_rows(prompt_ids, rows, rows_together)
    lengths = [len(rows[index]) for index in order]
    pairs = zip([*order[:1], *order[:-1]], order, strict=True)
    shared = [common_length(rows[before], rows[index]) for before, index in pairs]

    length_sums, shared_sums = ([0, *accumulate(values)] for values in (lengths, shared))

    def num_tokens_of(first: int, end: int) -> int:
        """Return the tokens that a microbatch of the rows first to end - 1 of the order computes."""
        if counts_prefixes_once:
            return length_sums[end] - length_sums[first] - (shared_sums[end] - shared_sums[first + 1])
        return max(lengths[first:end]) * (end - first)

    def pack(limit: int) -> list[tuple[int, int]]:
        """Return first row and end of each microbatch of at most so many tokens."""
        parts: list[tuple[int, int]] = []
        for place in range(0, len(order), rows_together):
            end, first = place + rows_together, parts[-1][0] if parts else place
            if not parts or end - first > max_rows or 0 < limit < num_tokens_of(first, end):
                parts.append((place, end))
            else:
                parts[-1] = (first, end)
        return parts

    parts = pack(max_tokens)
    parts = _fit(parts, pack, num_tokens_of, multiple_of, rows_together) if multiple_of > 1 else parts
    return [Planned(order[first:end], num_tokens_of(first, end)) for first, end in parts]


def add_metrics(sums: dict[str, Any], found: Mapping[str, Any], part: Microbatch) -> None:
    """Add to `sums` what was found in a microbatch: numbers, or tensors of one. Of names in `_max` keep the largest.

    The sums are float64 and stay on their device. With several ranks the tokens are counted, too:
    those that this rank computed, and those of the largest microbatch of each round, for which it waited.
    """
    if num_ranks() > 1:
        found = {**found, "num_computed_tokens": part.num_tokens}
        sums["num_awaited_tokens"] = sums.get("num_awaited_tokens", 0.0) + part.most_tokens
    if part.weight:
        for name, value in found.items():
            add_to(sums, name, value.double() if isinstance(value, Tensor) else float(value))


def rank_efficiency(sums: Mapping[str, float]) -> dict[str, float]:
    """Return `train/rank_efficiency` of an optimizer step, from what `add_metrics` added up. One process has none.

    It is the tokens that the ranks computed, divided by those that they computed or waited for.
    """
    is_alone = "num_awaited_tokens" not in sums
    return {} if is_alone else {"train/rank_efficiency": sums["num_computed_tokens"] / sums["num_awaited_tokens"]}


def _order_rows(prompt_ids: Sequence[list[int]], rows: Sequence[list[int]], rows_together: int) -> list[int]:
    """Return the rows in the order in which they are packed: by the longest of their prompt, by prompt, by length."""
    longest: dict[tuple[int, ...], int] = {}
    for prompt, row in zip(prompt_ids, rows, strict=True):
        longest[tuple(prompt)] = max(len(row), longest.get(tuple(prompt), 0))

    def key(unit: list[int]) -> tuple[int, list[int], int]:
        prompt = prompt_ids[unit[0]]
        return longest[tuple(prompt)], prompt, max(len(rows[index]) for index in unit)

    units = [list(range(start, start + rows_together)) for start in range(0, len(rows), rows_together)]
    return [index for unit in sorted(units, key=key) for index in unit]


def _fit(
    parts: list[tuple[int, int]], pack: Any, num_tokens_of: Any, multiple_of: int, rows_together: int
) -> list[tuple[int, int]]:
    """Return microbatches whose number is a multiple of `multiple_of`, the largest first; see `plan_microbatches`."""
    num_wanted = -(-len(parts) // multiple_of) * multiple_of
    low, high = 1, sum(num_tokens_of(first, end) for first, end in parts)
    while low < high:  # the smallest limit that needs no more microbatches than that
        middle = (low + high) // 2
        low, high = (low, middle) if len(pack(middle)) <= num_wanted else (middle + 1, high)
    if len(fitted := pack(low)) <= num_wanted:
        parts = fitted
    while len(parts) % multiple_of:
        divisible = [part for part in parts if part[1] - part[0] > rows_together]
        if not divisible:
            break
        first, end = max(divisible, key=lambda part: num_tokens_of(*part))
        middle = first + (end - first) // rows_together // 2 * rows_together
        parts = [part for part in parts if part != (first, end)] + [(first, middle), (middle, end)]
    return sorted(parts, key=lambda part: -num_tokens_of(*part))
