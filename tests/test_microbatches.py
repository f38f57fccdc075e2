"""Division into microbatches: both limits, what is counted, the tensors of each."""

from types import SimpleNamespace

import pytest
import torch

from plainrl.microbatches import microbatches, plan_microbatches
from plainrl.prefix_tree import build_prefix_tree, share_prefixes
from SFT_helper import join_prompt_and_response_ids

TEMPLATE = list(range(100, 140))


def plan(*arguments, **limits):
    """The rows of each microbatch."""
    return [part.indices for part in plan_microbatches(*arguments, **limits)]


def test_microbatches_keep_both_limits_and_groups_together():
    prompts = [[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 3, 4], [1, 2, 5, 6], [7] * 9]
    responses = [[10] * 3, [11] * 2, [12] * 5, [13], [14] * 6]
    assert plan(prompts, responses, max_rows=5) == [[3, 1, 0, 2, 4]]
    assert plan(prompts, responses, max_rows=2) == [[3, 1], [0, 2], [4]]
    # 5 + 2 tokens, then 2 + 3 with the prefix [1, 2] counted once; 5 more would make 17; the last has 15 by itself
    assert plan(prompts, responses, 5, max_tokens=12) == [[3, 1, 0], [2], [4]]
    assert plan(prompts, responses, 5, 12, counts_prefixes_once=False) == [[3, 1], [0], [2], [4]]
    assert plan(prompts, responses, 5, max_tokens=1) == [[3], [1], [0], [2], [4]]
    assert plan([], [], 5) == []


def test_what_a_microbatch_counts_is_what_its_tree_computes():
    """The limit is on the nodes, give or take each row's last token, from which nothing is predicted."""
    generator = torch.Generator().manual_seed(0)
    prompts = [TEMPLATE + [200 + index // 4] * 3 for index in range(24)]
    responses = [[300 + index] * int(torch.randint(1, 30, (), generator=generator)) for index in range(24)]
    planned = plan(prompts, responses, max_rows=24, max_tokens=150)
    assert sorted(index for indices in planned for index in indices) == list(range(24))
    for indices in planned:
        batch = join_prompt_and_response_ids([prompts[i] for i in indices], [responses[i] for i in indices], 0)
        tree = build_prefix_tree(batch["input_ids"], batch["response_mask"])
        assert tree.token_ids.shape[1] + len(indices) <= 150


@pytest.mark.parametrize(("shares", "expected_plan"), [(True, [[3, 1, 0], [2], [4]]), (False, [[3, 1], [0], [2], [4]])])
def test_each_microbatch_holds_its_rows(tiny_model, shares, expected_plan):
    """Prefixes count once for a policy that shares them; the tensors are those of its rows, in the plan's order."""
    prompts = [[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 3, 4], [1, 2, 5, 6], [7] * 9]
    responses = [[10] * 3, [11] * 2, [12] * 5, [13], [14] * 6]
    if shares:
        assert share_prefixes(tiny_model)
    found = list(microbatches(tiny_model, prompts, responses, padding_id=0, max_rows=5, max_tokens=12))
    assert [part.indices for part in found] == expected_plan
    for indices, tensors, weight, num_tokens, most_tokens in found:
        assert weight == 1 and num_tokens == most_tokens
        expected = join_prompt_and_response_ids([prompts[i] for i in indices], [responses[i] for i in indices], 0)
        tree = tensors.pop("prefix_tree")
        assert (tree is not None) == shares and tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]) and tensor.device == tiny_model.device
        if shares:
            is_scored = expected["response_mask"]
            assert torch.equal(tree.token_ids[0, tree.scored_nodes], expected["input_ids"][is_scored])
            assert torch.equal(expected["labels"].flatten()[tree.scored], expected["labels"][is_scored])


def test_trees_are_built_before_their_tensors_move(monkeypatch):
    """On a GPU, building one would wait for the GPU at each token. No number can be read on the device meta at all."""
    policy = SimpleNamespace(device=torch.device("meta"))
    monkeypatch.setattr("plainrl.microbatches.shares_prefixes", lambda policy: True)
    (part,) = microbatches(policy, [[1, 2], [1, 3]], [[4], [5]], padding_id=0, max_rows=2)
    tree = part.tensors["prefix_tree"]
    assert tree.token_ids.shape == (1, 3) and tree.token_ids.device == part.tensors["labels"].device == policy.device


def test_padded_rows_count_as_much_as_the_longest():
    """Seven responses of 50 tokens and one of 4,000 to a prompt of 100: padded together they would be 32,800."""
    prompts, responses = [[1] * 100] * 8, [[5] * 50] * 7 + [[5] * 4000]
    assert plan(prompts, responses, 256, 8192, counts_prefixes_once=False) == [[0, 1, 2, 3, 4, 5, 6], [7]]
    assert plan(prompts, responses, 256, 8192) == [[0, 1, 2, 3, 4, 5, 6, 7]]
