"""Decide which rows share a forward and backward pass.

The division into microbatches changes speed and memory, but no gradient. Every mean is over the whole optimizer step.
"""

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
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield each microbatch: the indices of its rows, and their tensors on the policy's device.

    The tensors are `input_ids`, `labels` and `response_mask`, as `SFT_helper.tokenize_prompt_and_output` returns them.
    With them goes `prefix_tree`: that of the rows, or None if the policy does not share prefixes. While the policy
    computes, a thread prepares the next microbatch.

    Args:
        policy: the policy, on its device. If it shares prefixes, a shared prefix counts once.
        prompt_ids, response_ids, max_rows, max_tokens: as in `plan_microbatches`.
        padding_id: token id that fills rows up.
    """
    shares = shares_prefixes(policy)

    def prepare(indices: list[int]) -> dict[str, Any]:
        tensors: dict[str, Any] = join_prompt_and_response_ids(
            [prompt_ids[index] for index in indices], [response_ids[index] for index in indices], padding_id
        )
        tree = build_prefix_tree(tensors["input_ids"], tensors["response_mask"]) if shares else None
        return tensors | {"prefix_tree": tree}

    plan = plan_microbatches(prompt_ids, response_ids, max_rows, max_tokens, shares)
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
) -> list[list[int]]:
    """Divide rows into microbatches. A new one begins if the next row would exceed one of the two limits.

    Rows with the same prompt stand next to each other, and so do rows of similar length. The plan depends on the rows
    alone.

    Args:
        prompt_ids, response_ids: token ids of each row.
        max_rows: most rows of a microbatch.
        max_tokens: most tokens of a microbatch. 0 means no limit. A single row may have more.
        counts_prefixes_once: whether a prefix that rows share counts once, as in a prefix tree. Else every row counts
            as much as the longest, to which it is padded.

    Returns:
        The indices of the rows, microbatch by microbatch.

    >>> plan_microbatches([[1, 2], [3, 4], [1, 2]], [[5], [6], [7]], max_rows=3, max_tokens=4)
    [[0, 2], [1]]
    """
    rows = [prompt + response for prompt, response in zip(prompt_ids, response_ids, strict=True)]
    longest: dict[tuple[int, ...], int] = {}
    for prompt, row in zip(prompt_ids, rows, strict=True):
        longest[tuple(prompt)] = max(len(row), longest.get(tuple(prompt), 0))
    plan: list[list[int]] = []
    num_tokens = longest_row = 0
    previous: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: (longest[tuple(prompt_ids[i])], prompt_ids[i], len(rows[i]))):
        row, longest_row = rows[index], max(longest_row, len(rows[index]))
        if counts_prefixes_once:
            num_tokens += len(row) - common_length(previous, row)
        else:
            num_tokens = longest_row * (len(plan[-1]) + 1) if plan else 0
        if not plan or len(plan[-1]) == max_rows or 0 < max_tokens < num_tokens:
            plan.append([])
            num_tokens = longest_row = len(row)
        plan[-1].append(index)
        previous = row
    return plan
