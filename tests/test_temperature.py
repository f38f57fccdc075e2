"""Sampling temperatures other than 1: the gradient is that of the distribution that was sampled, by enumeration.

A model with 4 tokens has 64 responses of 3 tokens. All expectations over responses are therefore sums.
"""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import GRPO_train
from plainrl.config import GRPOConfig
from plainrl.log_probs import get_masked_response_log_probs
from plainrl.policy import score_responses
from plainrl.prefix_tree import share_prefixes
from plainrl.records import Example, Response, Rollout
from SFT_helper import join_prompt_and_response_ids

TEMPERATURE, NUM_TOKENS, LENGTH = 0.6, 4, 3
PROMPT = [1, 3]
RESPONSES = [list(response) for response in itertools.product(range(NUM_TOKENS), repeat=LENGTH)]
REWARDS = torch.tensor([float((2 * a + b * c) % 5 in (0, 3)) for a, b, c in RESPONSES], dtype=torch.float64)


@pytest.fixture
def policy():
    """A random policy that is far from uniform, in float64."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).double()


def gradient_of(objective, policy):
    policy.zero_grad()
    objective.backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def cosine(a, b):
    return (a.double() @ b.double() / (a.norm() * b.norm())).item()


def plain_log_probs(policy, temperature):
    """log pi(y) of every response, by the model's own logits and torch's softmax alone."""
    rows = torch.tensor([PROMPT + response for response in RESPONSES])
    logits = policy(rows[:, :-1]).logits[:, len(PROMPT) - 1 :]
    log_probs = (logits / temperature).log_softmax(-1).gather(-1, rows[:, len(PROMPT) :, None])[..., 0]
    return log_probs.sum(-1)


def true_gradient(policy):
    """The gradient of the expected reward of responses sampled at the temperature: sum_y pi_T(y) R(y)."""
    probabilities = plain_log_probs(policy, TEMPERATURE).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    return gradient_of((probabilities * REWARDS).sum(), policy), probabilities.detach()


@pytest.mark.parametrize("shares", [False, True])
def test_reinforce_at_a_temperature_follows_the_expected_reward(policy, shares):
    """E[R grad log pi_T] is its gradient if log pi_T is that of the temperature. With another one it is not."""
    expected, probabilities = true_gradient(policy)
    if shares:
        assert share_prefixes(policy)
    batch = join_prompt_and_response_ids([PROMPT] * len(RESPONSES), RESPONSES, padding_id=0)
    found = {}
    for temperature in (TEMPERATURE, 1.0):
        log_probs = get_masked_response_log_probs(policy, **batch, temperature=temperature)["log_probs"]
        found[temperature] = gradient_of((probabilities * REWARDS * log_probs.sum(-1)).sum(), policy)
    # Through a tree, gradients in float64 are exact to 1e-7 alone.
    assert (found[TEMPERATURE] - expected).norm() < (1e-6 if shares else 1e-12) * expected.norm()
    assert cosine(found[1.0], expected) < 0.8


def made_up_rollouts(weights):
    """Each response once, with its weight as its reward."""
    return [
        Rollout(
            Example("q", "p", "1", None, "s"),
            Response(PROMPT, "", response, [0.0] * LENGTH, "stop"),
            dict.fromkeys(("reward", "format_reward", "answer_reward"), weight),
            advantage=weight,
        )
        for response, weight in zip(RESPONSES, weights.tolist(), strict=True)
    ]


def config_of(**values):
    of_all = {"rollout_batch_size": 64, "train_batch_size": 64, "gradient_accumulation_steps": 4, "group_size": 8}
    return GRPOConfig(
        loss_type="no_baseline",
        sampling_max_tokens=LENGTH,
        sampling_min_tokens=0,
        compute_dtype="float32",
        **(of_all | values),
    )


def test_a_grpo_step_at_a_temperature_follows_the_expected_reward(policy):
    """Each response counts as often as it would be sampled."""
    expected, probabilities = true_gradient(policy)
    found = {}
    for temperature in (TEMPERATURE, 1.0):
        policy.zero_grad()
        config = config_of(sampling_temperature=temperature)
        GRPO_train.accumulate_gradients(policy, made_up_rollouts(probabilities * REWARDS), 0, config)
        found[temperature] = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    # The loss is the mean over 64 rows of the mean over 3 tokens, with a minus sign.
    assert (-found[TEMPERATURE] * 64 * LENGTH - expected).norm() < 1e-5 * expected.norm()
    assert cosine(-found[1.0], expected) < 0.8


def test_old_log_probs_are_those_at_the_temperature(policy):
    rollouts = made_up_rollouts(REWARDS)
    GRPO_train.score_old_log_probs(
        policy, rollouts, 0, config_of(sampling_temperature=TEMPERATURE, train_batch_size=32)
    )
    found = torch.stack([rollout.old_log_probs.sum() for rollout in rollouts])
    expected = plain_log_probs(policy, TEMPERATURE).detach().float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_scores_are_those_of_the_tempered_distribution(policy):
    """Log-probs and entropies. At temperature 1 they are bit for bit what they are without one."""
    responses = [Response(PROMPT, "", response, [], "stop") for response in RESPONSES]
    scores = score_responses(policy, responses, padding_id=0, batch_size=7, temperature=TEMPERATURE)
    found = torch.stack([score["log_probs"].sum() for score in scores]).double()
    torch.testing.assert_close(found, plain_log_probs(policy, TEMPERATURE).detach(), atol=1e-5, rtol=0)
    first = (policy(torch.tensor([PROMPT])).logits[0, -1] / TEMPERATURE).softmax(-1)
    assert scores[0]["token_entropy"][0].item() == pytest.approx(-(first * first.log()).sum().item(), abs=1e-6)
    plain = score_responses(policy, responses, padding_id=0, batch_size=7)
    at_one = score_responses(policy, responses, padding_id=0, batch_size=7, temperature=1.0)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(plain, at_one, strict=True) for name in a)
