"""Decide which rows share a forward and backward pass.

The division into microbatches changes speed and memory, but no gradient. Every mean is over the whole optimizer step.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedModel

from plainrl.prefix_tree import build_prefix_tree, common_length, shares_prefixes
from SFT_helper import join_prompt_and_response_ids


def microbatches(
    policy: PreTrainedModel,
    prompt_ids: Sequence[list[int]],
    response_ids: Sequence[list[int]],
    padding_id: int,
    max_rows: int,
    max_tokens: int = 0,
    rows_together: int = 1,
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield each microbatch: the indices of its rows, and their tensors on the policy's device.

    The tensors are `input_ids`, `labels` and `response_mask`, as `SFT_helper.tokenize_prompt_and_output` returns them.
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

    plan = plan_microbatches(prompt_ids, response_ids, max_rows, max_tokens, shares, rows_together)
    with ThreadPoolExecutor(1) as thread:
        upcoming = [thread.submit(prepare, indices) for indices in plan[:1]]
        for number, indices in enumerate(plan, start=1):
            parts = upcoming.pop().result()
            upcoming = [thread.submit(prepare, following) for following in plan[number : number + 1]]
            yield indices, {name: part if part is None else part.to(policy.device) for name, part in parts.items()}


def plan_microbatches(
    prompt_ids: Sequence[list[int]],
    response_ids: Sequence[list[int]],
    max_rows: int,
    max_tokens: int = 0,
    counts_prefixes_once: bool = True,
    rows_together: int = 1,
) -> list[list[int]]:
    """Divide rows into microbatches. A new one begins if the next row would exceed one of the two limits.

    Rows with the same prompt stand next to each other, and so do rows of similar length. The plan depends on the rows
    alone.

    Args:
        prompt_ids, response_ids: token ids of each row.
        max_rows: most rows of a microbatch.
        max_tokens: most tokens of a microbatch. 0 means no limit. A single row, or those of a unit, may have more.
        counts_prefixes_once: whether a prefix that rows share counts once, as in a prefix tree. Else every row counts
            as much as the longest, to which it is padded.
        rows_together: so many rows that follow each other form a unit, as the two of a preference pair, which is never
            divided. They have the same prompt, and keep their order.

    Returns:
        The indices of the rows, microbatch by microbatch.

    >>> plan_microbatches([[1, 2], [3, 4], [1, 2]], [[5], [6], [7]], max_rows=3, max_tokens=4)
    [[0, 2], [1]]
    """
    rows = [prompt + response for prompt, response in zip(prompt_ids, response_ids, strict=True)]
    longest: dict[tuple[int, ...], int] = {}
    for prompt, row in zip(prompt_ids, rows, strict=True):
        longest[tuple(prompt)] = max(len(row), longest.get(tuple(prompt), 0))

    def place(unit: list[int]) -> tuple[int, list[int], int]:
        prompt = prompt_ids[unit[0]]
        return longest[tuple(prompt)], prompt, max(len(rows[index]) for index in unit)

    def count_tokens(unit: list[int], previous: list[int]) -> int:
        pairs = itertools.pairwise([previous, *(rows[index] for index in unit)])
        return sum(len(row) - common_length(before, row) for before, row in pairs)

    units = [list(range(start, start + rows_together)) for start in range(0, len(rows), rows_together)]
    plan: list[list[int]] = []
    num_tokens = longest_row = 0
    previous: list[int] = []
    for unit in sorted(units, key=place):
        longest_of_unit = max(len(rows[index]) for index in unit)
        longest_row = max(longest_row, longest_of_unit)
        if counts_prefixes_once:
            num_tokens += count_tokens(unit, previous)
        else:
            num_tokens = longest_row * (len(plan[-1]) + len(unit)) if plan else 0
        if not plan or len(plan[-1]) + len(unit) > max_rows or 0 < max_tokens < num_tokens:
            plan.append([])
            num_tokens = count_tokens(unit, []) if counts_prefixes_once else longest_of_unit * len(unit)
            longest_row = longest_of_unit
        plan[-1] += unit
        previous = rows[unit[-1]]
    return plan
