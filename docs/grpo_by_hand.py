"""GRPO without a language model: `uv run python docs/grpo_by_hand.py`. Ten seconds at most, on one core.

The policy learns to add one-digit numbers by trial and reward. It is a table of logits: one row for each question from
0 + 0 to 9 + 9, one column for each answer from 0 to 18. The softmax of a row gives the probability of each answer.

Advantages, losses and the reduction come from GRPO_helper.py, as they do in GRPO_train.py. Three things are simpler: a
response is a single token, sampling reads a row of the table, and the optimizer is plain gradient descent. The six
phases have the same names in both files.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the helpers are in the folder above this file

from GRPO_helper import (
    LENGTH_NORMALIZATIONS,
    LOSSES,
    LossInputs,
    StepSize,
    compute_group_normalized_rewards,
    reduce_metadata,
)

NUM_STEPS = 40
GROUP_SIZE = 8  # responses to each question
EPOCHS_PER_ROLLOUT_BATCH = 2  # the second epoch is off-policy: there the importance ratio is not 1
LEARNING_RATE = 80.0  # large: the loss is a mean over 800 rollouts, and each row of the table meets only 8 of them
CLIPRANGE = 0.2

QUESTIONS = [(a, b) for a in range(10) for b in range(10)]
GROUND_TRUTHS = [str(a + b) for a, b in QUESTIONS]
NUM_ANSWERS = 19
NUM_ROLLOUTS = len(QUESTIONS) * GROUP_SIZE


def reward_fn(response: str, ground_truth: str) -> dict[str, float]:
    """Grade a response: 1 if it is right, else 0."""
    return {"reward": float(response == ground_truth)}


def score(logits: torch.Tensor, rows: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return log pi(answer | question) of each rollout, as (rollouts, 1): one row a response, one column a token."""
    return logits.log_softmax(dim=-1)[rows, answers][:, None]


def main() -> None:
    """Run GRPO and print the mean reward as it rises."""
    torch.manual_seed(0)
    policy = torch.zeros(len(QUESTIONS), NUM_ANSWERS, requires_grad=True)  # at first every answer is equally likely
    mask = torch.ones(NUM_ROLLOUTS, 1, dtype=torch.bool)  # every token is a response token: there is no prompt
    size = StepSize(num_rows=NUM_ROLLOUTS, num_tokens=NUM_ROLLOUTS, max_response_tokens=1)
    ratio_max = torch.ones(())

    for step in range(1, NUM_STEPS + 1):
        # 1. Sync: the engine gets a copy of the policy. Here the engine is another table.
        engine = policy.detach().clone()

        # 2. Sample: GROUP_SIZE responses to each question. Those to the same question stand next to each other.
        rows = torch.arange(len(QUESTIONS)).repeat_interleave(GROUP_SIZE)
        answers = torch.multinomial(engine.softmax(dim=-1), GROUP_SIZE, replacement=True).flatten()

        # 3. Grade and normalize: a response is good if it is better than the others of its group.
        advantages, _, metadata = compute_group_normalized_rewards(
            reward_fn,
            rollout_responses=[str(answer) for answer in answers.tolist()],
            repeated_ground_truths=[GROUND_TRUTHS[row] for row in rows.tolist()],
            group_size=GROUP_SIZE,
            advantage_eps=1e-6,
            normalize_by_std=True,
        )

        # 4. Old log-probs: scored once, before the policy moves away from what it was when it sampled.
        with torch.no_grad():
            old_log_probs = score(policy, rows, answers)

        # 5. Update: one optimizer step per epoch. In the first one the ratio is 1.
        for _ in range(EPOCHS_PER_ROLLOUT_BATCH):
            inputs = LossInputs(
                log_probs=score(policy, rows, answers),
                mask=mask,
                advantages=advantages[:, None],
                old_log_probs=old_log_probs,
                cliprange=CLIPRANGE,
            )
            token_losses, loss_metadata = LOSSES["grpo_clip"](inputs)
            loss = LENGTH_NORMALIZATIONS["masked_mean"](token_losses, mask, size)
            (gradient,) = torch.autograd.grad(loss, policy)
            with torch.no_grad():
                policy -= LEARNING_RATE * gradient  # plain gradient descent; the scripts use AdamW
            ratio_max = reduce_metadata(loss_metadata, mask)["ratio_max"]

        # 6. Log: the largest ratio is that of the last epoch.
        if step == 1 or step % (NUM_STEPS // 10) == 0:
            print(
                f"step {step:2d}   reward {metadata['reward_mean']:.3f}   largest ratio {ratio_max:.2f}"
                f"   responses that teach nothing {metadata['zero_advantage_fraction']:.0%}"
            )


if __name__ == "__main__":
    main()
