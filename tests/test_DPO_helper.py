"""The mathematics of DPO: log 2, finite differences, means, TRL's numbers, the official assertions on stand-ins."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from make_dpo_reference_numbers import make_reference
from make_reference_numbers import describe, make_model
from transformers import GPT2Config, GPT2LMHeadModel

from supplement.DPO_helper import (
    compute_dpo_loss,
    compute_per_instance_dpo_loss,
    fill_alpaca,
    score_pair,
)

NUMBERS = json.loads(Path(__file__).with_name("dpo_reference_numbers.json").read_text())
PAIR = {
    "prompt": "The quick brown fox jumps over",
    "response_chosen": "the lazy dog.",
    "response_rejected": "their crazy frog.",
}


def tiny_gpt2(tokenizer, seed):
    """The official fixtures' architecture (tiny-gpt2 and tiny-gpt2-ref), narrower, with random weights."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_head=2, n_inner=32, n_layer=2, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def models(tokenizer):
    return tiny_gpt2(tokenizer, 0), tiny_gpt2(tokenizer, 1)


@pytest.mark.parametrize("case", NUMBERS["cases"], ids=lambda case: f"beta {case['beta']}")
def test_loss_metrics_and_gradient_are_those_of_trl(case):
    """Its DPOTrainer on the same pairs and models, in float64."""
    model, reference = make_model(), make_reference()

    def score(lm):
        rows = [score_pair(lm, pair["prompt"], [pair["chosen"], pair["rejected"]]) for pair in NUMBERS["pairs"]]
        return torch.stack(rows).unbind(1)

    with torch.no_grad():
        of_reference = score(reference)
    losses, metadata = compute_dpo_loss(*score(model), *of_reference, case["beta"])
    loss = losses.mean()
    loss.backward()
    expected = case["metrics"]
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6, abs=1e-6)
    names = {"chosen": "chosen_reward", "rejected": "rejected_reward", "margins": "margin"}
    for theirs, ours in (names | {"accuracies": "reward_accuracy"}).items():
        near = 1e-6 * max(1, case["beta"])  # log-probs in float32, times beta
        assert metadata[ours].mean().item() == pytest.approx(expected[f"rewards/{theirs}"], abs=near), theirs
    gradient = describe({name: part.grad for name, part in model.named_parameters()})
    assert gradient.keys() == case["gradient"].keys()
    for name, values in gradient.items():
        assert values == pytest.approx(case["gradient"][name], rel=1e-6, abs=1e-6), name


def test_the_loss_is_log_2_where_the_policy_is_the_reference(models, tokenizer):
    loss = compute_per_instance_dpo_loss(models[0], copy.deepcopy(models[0]), tokenizer, 0.5, **PAIR)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_per_instance_loss_by_hand(models, tokenizer):
    """The assertion of the official test_dpo.py with another value: whole sequences, in which the prompt cancels."""
    model, reference = models

    def whole(lm, response):
        text = fill_alpaca(PAIR["prompt"]) + response
        ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_token_id]])
        log_probs = lm(ids).logits.log_softmax(-1)
        return sum(log_probs[0, index, token] for index, token in enumerate(ids[0, 1:].tolist()))

    chosen, rejected = (whole(model, PAIR[f"response_{name}"]) for name in ("chosen", "rejected"))
    chosen_ref, rejected_ref = (whole(reference, PAIR[f"response_{name}"]) for name in ("chosen", "rejected"))
    margin = 0.5 * ((chosen - chosen_ref) - (rejected - rejected_ref)).item()
    loss = compute_per_instance_dpo_loss(model, reference, tokenizer, 0.5, **PAIR)
    assert abs(margin) > 0.05
    assert loss.item() == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-4)


def test_only_the_policy_gets_a_gradient(models, tokenizer):
    compute_per_instance_dpo_loss(*models, tokenizer, 0.5, **PAIR).backward()
    assert all(parameter.grad is not None for parameter in models[0].parameters())
    assert all(parameter.grad is None for parameter in models[1].parameters())


def test_swapped_responses_have_the_other_sign(models, tokenizer):
    """L = log(1 + exp(-m)), so that L(m) - L(-m) = -m."""
    swapped = PAIR | {"response_chosen": PAIR["response_rejected"], "response_rejected": PAIR["response_chosen"]}
    losses = [compute_per_instance_dpo_loss(*models, tokenizer, 0.5, **pair).item() for pair in (PAIR, swapped)]
    assert math.exp(-losses[0]) + math.exp(-losses[1]) == pytest.approx(1, abs=1e-6)
    assert losses[0] != pytest.approx(losses[1], abs=1e-3)


def test_a_tokenizer_without_eos_is_refused(models, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set tokenizer.eos_token"):
        compute_per_instance_dpo_loss(*models, tokenizer, 0.5, **PAIR)


def made_up(num_pairs=5):
    torch.manual_seed(0)
    return [10 * torch.randn(num_pairs, dtype=torch.float64) for _ in range(4)]


def test_gradient_equals_finite_differences():
    policy_chosen, policy_rejected, *reference = made_up()
    inputs = (policy_chosen.requires_grad_(), policy_rejected.requires_grad_())
    assert torch.autograd.gradcheck(lambda *two: compute_dpo_loss(*two, *reference, beta=0.3)[0], inputs)


def test_gradient_by_its_equation():
    policy_chosen, policy_rejected, *reference = made_up()
    losses, metadata = compute_dpo_loss(
        policy_chosen.requires_grad_(), policy_rejected.requires_grad_(), *reference, 0.3
    )
    losses.sum().backward()
    torch.testing.assert_close(policy_chosen.grad, -0.3 * torch.sigmoid(-metadata["margin"]))
    torch.testing.assert_close(policy_rejected.grad, -policy_chosen.grad)


def test_metadata_by_hand():
    numbers = [torch.tensor(values) for values in ([-4.0, -9.0], [-6.0, -8.0], [-5.0, -12.0], [-6.0, -7.0])]
    losses, metadata = compute_dpo_loss(*numbers, beta=0.5)
    assert {name: values.tolist() for name, values in metadata.items()} == {
        "chosen_reward": [0.5, 1.5],
        "rejected_reward": [0.0, -0.5],
        "margin": [0.5, 2.0],
        "accuracy": [1.0, 0.0],  # -9 is less than -8
        "reward_accuracy": [1.0, 1.0],
    }
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.5)), math.log1p(math.exp(-2))])


def test_extreme_margins_stay_finite():
    far = torch.tensor([1e6, -1e6])
    losses, _ = compute_dpo_loss(far, -far, torch.zeros(2), torch.zeros(2), 1.0)
    assert losses.tolist() == [0.0, 2e6]


def test_the_mean_over_instances_is_the_batch(models, tokenizer):
    """Loss and gradient of the microbatch step on three pairs against the per-instance losses."""
    model, reference = models
    pairs = [PAIR, PAIR | {"prompt": "Say it"}, PAIR | {"response_rejected": "no"}]
    instances = torch.stack([compute_per_instance_dpo_loss(model, reference, tokenizer, 0.2, **pair) for pair in pairs])
    instances.mean().backward()
    expected = {name: part.grad.clone() for name, part in model.named_parameters()}
    model.zero_grad()

    def score(lm, pair):
        responses = [pair["response_chosen"], pair["response_rejected"]]
        ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in responses]
        return score_pair(lm, tokenizer.encode(fill_alpaca(pair["prompt"])), ids)

    total = 0.0
    for pair in pairs:  # three microbatches of one pair
        with torch.no_grad():
            of_reference = score(reference, pair).split(1)
        losses, _ = compute_dpo_loss(*score(model, pair).split(1), *of_reference, 0.2)
        loss = losses.mean() / 3
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(instances.mean().item(), abs=1e-6)
    for name, part in model.named_parameters():
        torch.testing.assert_close(part.grad, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_beta_must_be_a_positive_number(beta):
    with pytest.raises(ValueError, match="beta = .*: must be above 0"):
        compute_dpo_loss(*made_up(), beta)


def test_the_alpaca_template_is_the_handouts():
    """Its file ends in {response} and a newline; the response follows ours directly, and the newline is stripped."""
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nUse {braces}.\n\n### Response:\n"
    )
    assert fill_alpaca("Use {braces}.") == expected
