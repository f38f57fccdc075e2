"""The GRPO loop: equal gradients however computed, a reward that rises, real rollouts, mistakes in one line."""

import io
import json
import math
import os
import re
import shutil
import signal
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import REPOSITORY, FakeEvaluator, grpo_arguments, read_lines, replace_engine, train_rows
from transformers import AutoModelForCausalLM

import GRPO_train
from GRPO_helper import LOSSES, normalize_within_groups
from GRPO_train import accumulate_gradients, score_old_log_probs, update_policy
from plainrl import run_folder
from plainrl.cli import load_config, run_main
from plainrl.config import GRPOConfig
from plainrl.corrections import ENGINE_CORRECTIONS
from plainrl.data import load_questions
from plainrl.diagnosis import diagnose, find_remarks
from plainrl.engine import SyncError, check_policy_sync, load_policy_into_vllm_instance, sample_responses
from plainrl.grading.rewards import Grade, grade_responses
from plainrl.objective import summarize_update
from plainrl.policy import compute_clipped_gradient, score_responses
from plainrl.precision import add_working_copy, working_copy
from plainrl.records import Example, Response, Rollout, UserError
from plainrl.rollouts import make_rollouts

LOSS_TYPES = ["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip", "cispo"]
LENGTH_NORMALIZATIONS = ["masked_mean", "masked_normalize", "token_mean"]


def tiny_config(**overrides):
    values = {
        "compute_dtype": "float32",
        "rollout_batch_size": 8,
        "train_batch_size": 8,
        "group_size": 4,
        "gradient_accumulation_steps": 1,
        "sampling_max_tokens": 16,
        "max_sync_error": 1e9,  # most responses here are made up, and so are their log-probs
    }
    return GRPOConfig(**(values | overrides))


def ragged_rollouts(model, with_old_log_probs=True):
    """Eight rollouts of lengths 2 to 9, two with advantage zero, one truncated, old log-probs a little off."""
    generator = torch.Generator().manual_seed(0)
    advantages = [0.5, -1.0, 0.0, 1.5, -0.5, 0.0, 0.8, -1.2]
    rollouts = []
    for index, advantage in enumerate(advantages):
        ids = torch.randint(10, 500, (20 + index % 3,), generator=generator).tolist()
        prompt, tokens = ids[: 11 + index % 3], ids[11 + index % 3 :][: 2 + index]
        response = Response(prompt, "", tokens, [-6.0] * len(tokens), "length" if index == 3 else "stop")
        reward = float(advantage > 0)
        rewards = {"reward": reward, "format_reward": 1.0, "answer_reward": reward}
        rollouts.append(Rollout(Example("q", "p", "1", None, "s"), response, rewards, advantage))
    if with_old_log_probs:
        scores = score_responses(model, [rollout.response for rollout in rollouts], 0, 8)
        for rollout, score in zip(rollouts, scores, strict=True):
            noise = 0.3 * torch.randn(len(score["log_probs"]), generator=generator)
            rollout.old_log_probs = score["log_probs"] + noise
    return rollouts


def gradient_of(model, rollouts, config):
    model.zero_grad()
    sums = accumulate_gradients(model, rollouts, 0, config)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), sums


def naive_gradient(model, rollouts, config):
    """The step's loss written from its equation, every row in one plain forward pass of its own, nothing skipped."""
    model.zero_grad()
    total = torch.zeros(())
    kept = [r for r in rollouts if not (config.mask_truncated_responses and r.is_truncated)]
    num_tokens = sum(len(r.response.token_ids) for r in kept)
    for r in kept:
        ids = torch.tensor([r.response.prompt_ids + r.response.token_ids])
        log_probs = model(ids).logits.log_softmax(-1)[0, len(r.response.prompt_ids) - 1 : -1]
        log_probs = log_probs.gather(-1, torch.tensor(r.response.token_ids)[:, None])[:, 0]
        ratio = (log_probs - r.old_log_probs).exp()
        losses = {
            "no_baseline": -r.rewards["reward"] * log_probs,
            "reinforce_with_baseline": -r.advantage * log_probs,
            "grpo_clip": -torch.minimum(ratio * r.advantage, ratio.clamp(0.8, 1.2) * r.advantage),
            "grpo_no_clip": -ratio * r.advantage,
            "cispo": -ratio.detach().clamp(max=1.1) * r.advantage * log_probs,
        }[config.loss_type]
        total = (
            total
            + {
                "masked_mean": losses.mean() / len(rollouts),
                "masked_normalize": losses.sum() / config.sampling_max_tokens / len(rollouts),
                "token_mean": losses.sum() / num_tokens,
            }[config.length_normalization]
        )
    total.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), total.item()


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("length_normalization", LENGTH_NORMALIZATIONS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_gradient_of_a_step_is_the_same_however_it_is_computed(
    tiny_model, loss_type, length_normalization, mask_truncated
):
    """Skipped zero-advantage rows, 1 to 8 microbatches, any order of rows: always that of the naive loop."""
    rollouts = ragged_rollouts(tiny_model)
    options = {
        "loss_type": loss_type,
        "length_normalization": length_normalization,
        "mask_truncated_responses": mask_truncated,
        "ratio_cap": 1.1,
        "epochs_per_rollout_batch": 2 if "old_log_probs" in LOSSES[loss_type].needs else 1,  # off-policy: with a ratio
    }
    expected, expected_loss = naive_gradient(tiny_model, rollouts, tiny_config(**options))
    for steps in (1, 2, 4, 8):
        config = tiny_config(gradient_accumulation_steps=steps, **options)
        for batch in (rollouts, rollouts[::-1]):
            gradient, sums = gradient_of(tiny_model, batch, config)
            assert (gradient - expected).norm() < 2e-6 * expected.norm()  # measured: up to 1.6e-6
            assert sums["loss"] == pytest.approx(expected_loss, abs=1e-5)
    zero = "reward" if loss_type == "no_baseline" else "advantage"
    num_zero = sum((r.rewards["reward"] if zero == "reward" else r.advantage) == 0 for r in rollouts)
    assert sums["num_trained_rows"] == 8 - num_zero - mask_truncated


def test_on_policy_the_ratio_is_exactly_one(tiny_model):
    rollouts = ragged_rollouts(tiny_model, with_old_log_probs=False)
    gradient, sums = gradient_of(tiny_model, rollouts, tiny_config(loss_type="grpo_clip"))
    assert sums["train/ratio_max"] == 1.0
    assert sums["train/ratio_mean"] == sums["num_tokens"]
    assert sums["train/clip_fraction_low"] == sums["train/clip_fraction_high"] == 0
    reinforce, _ = gradient_of(tiny_model, rollouts, tiny_config(loss_type="reinforce_with_baseline"))
    torch.testing.assert_close(gradient, reinforce, atol=1e-6, rtol=1e-5)
    trained = [rollout.response for rollout in rollouts if rollout.advantage]
    entropies = torch.cat([score["token_entropy"] for score in score_responses(tiny_model, trained, 0, 8)])
    metrics = summarize_update(sums | {"gap_sum": 3.0, "num_gap_tokens": 2.0, "gap_max": 2.5})
    assert metrics["train/token_entropy"] == pytest.approx(entropies.mean().item(), rel=1e-5)
    assert (metrics["rollout/log_prob_gap_mean"], metrics["rollout/log_prob_gap_max"]) == (1.5, 2.5)


def test_a_step_with_nothing_to_learn_has_gradient_zero(tiny_model):
    rollouts = ragged_rollouts(tiny_model)
    for rollout in rollouts:
        rollout.advantage = 0.0
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-3, weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in tiny_model.parameters()]
    [metrics] = update_policy(tiny_model, optimizer, rollouts, 0, 1, tiny_config())
    assert metrics["train/grad_norm"] == 0
    assert metrics["train/token_entropy"] is None
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_model.parameters(), strict=True))


@pytest.mark.parametrize(("epochs", "batch", "num_steps"), [(1, 8, 1), (2, 8, 2), (1, 4, 2), (2, 4, 4)])
def test_epochs_and_batches(tiny_model, epochs, batch, num_steps):
    config = tiny_config(epochs_per_rollout_batch=epochs, train_batch_size=batch, loss_type="grpo_clip")
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-4)
    rows = update_policy(tiny_model, optimizer, ragged_rollouts(tiny_model), 0, 1, config)
    assert len(rows) == num_steps
    assert sum(row["train/num_trained_rows"] for row in rows) == 6 * epochs
    assert all(0 <= row["train/clip_fraction_low"] <= 1 for row in rows)
    assert [row["rollout/log_prob_gap_mean"] is not None for row in rows] == [True] + [False] * (num_steps - 1)


def test_a_loss_that_is_nan_leaves_the_policy_alone(tiny_model):
    rollouts = ragged_rollouts(tiny_model)
    rollouts[0].advantage = float("nan")
    before = [parameter.detach().clone() for parameter in tiny_model.parameters()]
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-3)
    with pytest.raises(UserError, match="step 7: loss nan"):
        update_policy(tiny_model, optimizer, rollouts, 0, 7, tiny_config())
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_model.parameters(), strict=True))


def flat_gradient(model, rollouts, config):
    """The gradient as the loop clips it (never, here), and the loss scale it was computed with."""
    model.zero_grad()
    add_working_copy(model, config.compute_dtype)
    accumulate = partial(accumulate_gradients, model, rollouts, 0, config)
    sums, _, loss_scale = compute_clipped_gradient(model, accumulate, config)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), loss_scale, sums


def test_the_gradient_is_clipped_to_its_largest_norm(tiny_model):
    rollouts = ragged_rollouts(tiny_model)
    plain, *_ = flat_gradient(tiny_model, rollouts, tiny_config(max_grad_norm=1e9))
    limit = plain.norm().item() / 4
    clipped, *_ = flat_gradient(tiny_model, rollouts, tiny_config(max_grad_norm=limit))
    torch.testing.assert_close(clipped, plain / 4, atol=1e-7, rtol=1e-4)


def test_each_pass_takes_every_rollout_once_in_another_order(tiny_model, monkeypatch):
    rollouts, seen, original = ragged_rollouts(tiny_model), [], GRPO_train.accumulate_gradients

    def watched(policy, batch, *rest):
        seen.append([id(rollout) for rollout in batch])
        return original(policy, batch, *rest)

    monkeypatch.setattr(GRPO_train, "accumulate_gradients", watched)
    config = tiny_config(epochs_per_rollout_batch=2, train_batch_size=4, loss_type="grpo_clip")
    update_policy(tiny_model, torch.optim.SGD(tiny_model.parameters(), lr=0.0), rollouts, 0, 1, config)
    half = len(seen) // 2
    first, second = ([one for batch in part for one in batch] for part in (seen[:half], seen[half:]))
    given = [id(rollout) for rollout in rollouts]
    assert sorted(first) == sorted(second) == sorted(given) and first != second and given not in (first, second)
    orders = set()
    for step, seed in ((1, 0), (2, 0), (1, 1)):
        seen.clear()
        other = config.model_copy(update={"seed": seed})
        update_policy(tiny_model, torch.optim.SGD(tiny_model.parameters(), lr=0.0), rollouts, 0, step, other)
        orders.add(tuple(one for batch in seen for one in batch))
    assert len(orders) == 3


def test_small_gradients_do_not_vanish_in_float16(tiny_model):
    """A loss of 1e-8 of the usual size: its gradient lies below float16's smallest number, but not times 2^24."""
    rollouts = ragged_rollouts(tiny_model)
    for rollout in rollouts:
        rollout.advantage *= 1e-8
    plain, scale, sums = flat_gradient(tiny_model, rollouts, tiny_config(max_grad_norm=1e9))
    assert scale == 1
    unscaled, _, _ = flat_gradient(
        tiny_model, rollouts, tiny_config(compute_dtype="float16", loss_scale=1, max_grad_norm=1e9)
    )
    scaled, scale, scaled_sums = flat_gradient(
        tiny_model, rollouts, tiny_config(compute_dtype="float16", loss_scale=2**24, max_grad_norm=1e9)
    )
    assert scale == 2**24
    assert (unscaled - plain).norm() > 0.5 * plain.norm()
    assert (scaled - plain).norm() < 0.02 * plain.norm()  # rounding to 11 bits
    assert scaled_sums["loss"] == pytest.approx(sums["loss"], rel=0.01)


def test_a_gradient_that_overflows_float16_is_computed_again_with_half_the_scale(tiny_model, capsys):
    rollouts = ragged_rollouts(tiny_model)
    plain, _, _ = flat_gradient(tiny_model, rollouts, tiny_config(max_grad_norm=1e9))
    scaled, scale, _ = flat_gradient(
        tiny_model, rollouts, tiny_config(compute_dtype="float16", loss_scale=2**26, max_grad_norm=1e9)
    )
    assert 1 < scale < 2**26
    assert capsys.readouterr().out.count("computed again with") == math.log2(2**26 / scale)
    assert (scaled - plain).norm() < 0.02 * plain.norm()


def test_a_step_in_float16_moves_the_policy_as_in_float32(tiny_model_folder):
    moved = []
    for dtype in ("float32", "float16"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
        before = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        add_working_copy(model, dtype)
        rollouts = ragged_rollouts(model, with_old_log_probs=False)
        (row,) = update_policy(model, optimizer, rollouts, 0, 1, tiny_config(compute_dtype=dtype))
        assert row["train/loss_scale"] == (65536 if dtype == "float16" else 1)
        moved.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) - before)
    assert (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()


def test_no_scale_fixes_a_forward_pass_that_overflows(tiny_model):
    rollouts = ragged_rollouts(tiny_model)
    with torch.no_grad():
        tiny_model.model.layers[0].mlp.down_proj.weight.mul_(1e4)
    add_working_copy(tiny_model, "float16")
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-3)
    passes = []
    working_copy(tiny_model).model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(UserError, match="step 3: loss nan"):
        update_policy(tiny_model, optimizer, rollouts, 0, 3, tiny_config(compute_dtype="float16"))
    assert len(passes) == 1


def rollouts_with_advantages(questions, responses, grades, config):
    rewards = torch.tensor([grade.rewards["reward"] for grade in grades])
    advantages = normalize_within_groups(rewards, config.group_size, config.advantage_eps, True)
    return make_rollouts(questions, responses, grades, advantages.tolist(), config.group_size)


def learn_to_say_a_token(model, sign):
    """30 GRPO steps with a sampler of its own: the reward is the share of token 17 among 4 sampled tokens."""
    config = tiny_config(rollout_batch_size=32, train_batch_size=32, group_size=8, learning_rate=3e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    prompt, rewards = [5, 6, 7], []
    # a policy of few tokens: with 512 equally likely ones the rewarded token would hardly ever be tried
    allowed = torch.full((512,), -torch.inf)
    allowed[10:20] = 0.0
    for step in range(30):
        ids = torch.tensor([prompt] * 32)
        for _ in range(4):
            with torch.inference_mode():
                logits = model(ids).logits[:, -1] + allowed
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
        tokens = ids[:, 3:].tolist()
        responses = [Response(prompt, json.dumps(t), t, [0.0] * 4, "stop") for t in tokens]
        shares = [ids.count(17) / 4 for ids in tokens]
        grades = [Grade(dict.fromkeys(("reward", "format_reward", "answer_reward"), share)) for share in shares]
        rollouts = rollouts_with_advantages([Example("q", "p", "17", None, "s")] * 4, responses, grades, config)
        for rollout in rollouts:
            rollout.advantage *= sign
        rewards.append(sum(r.rewards["reward"] for r in rollouts) / 32)
        update_policy(model, optimizer, rollouts, 0, step, config)
    return rewards


def test_the_reward_rises_and_falls_if_the_sign_is_flipped(tiny_model):
    """The last call is the mutation: the same loop with flipped advantages must not reach the level."""
    state = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    rewards = learn_to_say_a_token(tiny_model, sign=1)
    assert sum(rewards[:3]) / 3 < 0.4
    assert sum(rewards[-3:]) / 3 > 0.8
    tiny_model.load_state_dict(state)
    flipped = learn_to_say_a_token(tiny_model, sign=-1)
    assert sum(flipped[-3:]) / 3 < 0.2


@pytest.fixture(scope="module")
def grpo_run(tiny_model_folder, tmp_path_factory, engine):
    """A whole run of GRPO_train.py, off-policy, with the real engine that all tests share; what it printed."""
    runs_dir = tmp_path_factory.mktemp("grpo")
    questions = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(12)]
    validation_data = runs_dir / "validation.jsonl"
    validation_data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    overrides = {"run_name": "a", "loss_type": "grpo_clip", "train_batch_size": 4, "validation_data": validation_data}
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        patch.setattr("policy_evaluation.init_vllm", lambda *_, **__: engine)
        GRPO_train.main(grpo_arguments(tiny_model_folder, runs_dir, **overrides))
    return runs_dir / "a", output.getvalue()


def test_grpo_run_leaves_everything_in_its_folder(grpo_run):
    folder, output = grpo_run
    assert "validation answer reward: last" in output.splitlines()[-2]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.jsonl", "training.png", "report.html", "final/config.json"} <= files
    assert {f"samples/rollouts_{step:06d}.jsonl" for step in (1, 2)} <= files
    assert {f"samples/eval_{step:06d}.jsonl" for step in (0, 1, 2)} | {"samples/eval_all_000002.jsonl"} <= files
    rows = read_lines(folder / "samples/rollouts_000001.jsonl")
    assert len(rows) == 4 and len({row["prompt"] for row in rows}) == 1


def documented_metrics(script):
    """The keys that docs/metrics.md defines for SFT, GRPO or EI; those of evaluations under both of their names."""
    lines = (REPOSITORY / "docs/metrics.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    names = {row[0].strip("`") for row in rows if len(row) == 5 and script in row[3].split(", ")}
    names = {name for name in names if "_at_k" not in name}  # of several samples: tests/test_docs.py
    return names | {name.replace("eval/", "eval_all/") for name in names}


def test_every_documented_metric_is_logged_and_no_other(grpo_run):
    """Two rollout batches of two optimizer steps each: train metrics with every step, the others once per batch."""
    everything, rows = read_lines(grpo_run[0] / "metrics.jsonl"), train_rows(grpo_run[0])
    assert [row["train_step"] for row in rows] == [1, 2, 3, 4]
    documented = documented_metrics("GRPO")
    # logged on probes, where the rollouts cannot check the sync
    documented -= {"rollout/sync_multiplicative_error", "rollout/sync_max_log_prob_difference"}
    documented.remove("train/rank_efficiency")  # of several ranks: tests/test_distributed.py
    assert {name for row in everything for name in row} == documented
    of_evaluations = {name for name in documented if name.startswith("eval")}
    for prefix in ("eval/", "eval_all/"):
        for row in everything:
            if f"{prefix}reward" in row:
                assert set(row) == {"eval_step"} | {name for name in of_evaluations if name.startswith(prefix)}
    documented -= of_evaluations
    for row in rows:
        assert {name for name in documented if name.startswith("train/")} <= set(row)
    for first, last in (rows[:2], rows[2:]):
        assert set(first) | set(last) == documented
        assert "rollout/reward" not in first
        assert last["time/old_log_probs"] > 0
        assert 1 <= first["rollout/log_prob_gap_multiplicative"] < 1.001  # off-policy: over all responses


def rollouts_of(engine, tokenizer, **sampling):
    """Eight rollouts that the engine has sampled, half of them with a positive advantage."""
    from vllm import SamplingParams

    ids = tokenizer.encode("What is 1 + 2?")
    responses = sample_responses(engine, [ids] * 8, SamplingParams(max_tokens=16, **sampling), range(8))
    grades = grade_responses([response.text for response in responses], ["3"] * 8, "r1_zero")
    rollouts = make_rollouts([Example("q", "p", "3", None, "s")] * 2, responses, grades, [1.0, -1.0] * 4, 4)
    return rollouts, responses


def test_the_policy_is_not_moved_by_responses_of_another_policy(engine, tiny_model, tokenizer, monkeypatch):
    """The rollouts themselves check the weight sync, before the optimizer's first step on them."""
    monkeypatch.setattr("plainrl.rollouts.MIN_TOKENS_TO_CHECK", 32)
    load_policy_into_vllm_instance(tiny_model, engine)
    rollouts, _ = rollouts_of(engine, tokenizer)
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-3)
    config = tiny_config(max_sync_error=1.0001)
    (metrics,) = update_policy(tiny_model, optimizer, rollouts, 0, 1, config)
    assert 1 <= metrics["rollout/log_prob_gap_multiplicative"] < 1.0001
    before = [parameter.detach().clone() for parameter in tiny_model.parameters()]
    with pytest.raises(SyncError, match="max_sync_error = 1.0001"):  # now the responses are of the step before
        update_policy(tiny_model, optimizer, rollouts, 0, 2, config)
    optimizer.zero_grad()
    far = [
        replace(row, response=row.response._replace(log_probs=[-800.0] * len(row.response.token_ids)))
        for row in rollouts
    ]
    with pytest.raises(SyncError, match="inf"):  # exp of such a gap is beyond a float
        update_policy(tiny_model, optimizer, far, 0, 2, config)
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_model.parameters(), strict=True))


def test_off_policy_all_rollouts_check_the_sync(engine, tiny_model, tokenizer, monkeypatch):
    """Also those of the later batches, and where the first batch has nothing to train on."""
    monkeypatch.setattr("plainrl.rollouts.MIN_TOKENS_TO_CHECK", 32)
    load_policy_into_vllm_instance(tiny_model, engine)
    rollouts, _ = rollouts_of(engine, tokenizer)
    config = tiny_config(train_batch_size=4, loss_type="grpo_clip", max_sync_error=1.0001)
    score_old_log_probs(tiny_model, rollouts, 0, config)
    for rollout in rollouts:
        rollout.advantage = 0.0
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-3)
    first, second = update_policy(tiny_model, optimizer, rollouts, 0, 1, config)
    assert 1 <= first["rollout/log_prob_gap_multiplicative"] < 1.0001
    assert second["rollout/log_prob_gap_multiplicative"] is None
    rollouts[-1].response.log_probs[:] = [value - 1 for value in rollouts[-1].response.log_probs]
    with pytest.raises(SyncError):
        update_policy(tiny_model, optimizer, rollouts, 0, 1, config)


def test_tokens_sampled_without_eos_say_nothing_and_are_left_out(engine, tiny_model, tokenizer):
    """The engine renormalizes where EOS is forbidden: a difference to the policy that is none of the weights'."""
    with torch.no_grad():
        tiny_model.get_input_embeddings().weight[0] *= 3  # tied: makes EOS, token 0, likely
    load_policy_into_vllm_instance(tiny_model, engine)
    rollouts, _ = rollouts_of(engine, tokenizer, min_tokens=4)
    with_all = accumulate_gradients(tiny_model, rollouts, 0, tiny_config(sampling_min_tokens=0))
    without = accumulate_gradients(tiny_model, rollouts, 0, tiny_config(sampling_min_tokens=4))
    assert with_all["gap_max"] > 1e-3
    assert without["gap_max"] < 1e-4
    assert with_all["num_gap_tokens"] - without["num_gap_tokens"] == 4 * len(rollouts)


@pytest.mark.parametrize("correction", sorted(ENGINE_CORRECTIONS.keys() - {"none"}))
def test_the_engine_correction_weighs_what_the_engine_sampled(engine, tiny_model, tokenizer, correction):
    """In float32 the engine is the policy, and each weight is 1. Once the policy has moved, they tell."""
    load_policy_into_vllm_instance(tiny_model, engine)
    rollouts, _ = rollouts_of(engine, tokenizer, min_tokens=4)
    config = tiny_config(engine_correction=correction, engine_correction_cap=1.2, sampling_min_tokens=4)
    plain, _ = gradient_of(tiny_model, rollouts, tiny_config())
    weighted, sums = gradient_of(tiny_model, rollouts, config)
    assert (weighted - plain).norm() < 1e-3 * plain.norm()
    metrics = summarize_update(sums)
    assert metrics["train/engine_weight_mean"] == pytest.approx(1, abs=1e-3)
    assert metrics["train/engine_effective_sample_size"] == pytest.approx(1, abs=1e-3)
    assert metrics["train/engine_corrected_fraction"] == 0
    for row in rollouts:  # the engine gave every token a probability that is exp(0.5) times too large
        row.response.log_probs[:] = [value + 0.5 for value in row.response.log_probs]
    metrics = summarize_update(gradient_of(tiny_model, rollouts, config)[1])
    num_tokens = sum(len(row.response.token_ids) for row in rollouts)
    forced = 4 * len(rollouts) / num_tokens
    lengths = [len(row.response.token_ids) for row in rollouts]
    of_products = sum(length * math.exp(2 - length / 2) for length in lengths)  # below the cap
    by_hand = {
        "token_truncate": forced + (1 - forced) * math.exp(-0.5),
        "token_mask": forced,
        "sequence_truncate": of_products / num_tokens,
        "sequence_mask": of_products / num_tokens,
        "sequence_mean_mask": forced_rows(rollouts) / num_tokens,
    }
    assert metrics["train/engine_weight_mean"] == pytest.approx(by_hand[correction], rel=1e-3)


def forced_rows(rollouts):
    """The tokens of responses that end where they may first end."""
    return sum(4 for row in rollouts if len(row.response.token_ids) == 4)


def test_rollouts_are_trained_on_the_sampled_ids(engine, tiny_model, tokenizer):
    """Token ids that no tokenizer would produce from the text go into the update as they were sampled."""
    load_policy_into_vllm_instance(tiny_model, engine)
    rollouts, responses = rollouts_of(engine, tokenizer)
    ids = tokenizer.encode("What is 1 + 2?")
    assert any(tokenizer.encode(response.text) != response.token_ids for response in responses)
    assert [rollout.response.token_ids for rollout in rollouts] == [response.token_ids for response in responses]
    sums = accumulate_gradients(tiny_model, rollouts, 0, tiny_config())
    assert sums["num_tokens"] == sum(len(response.token_ids) for response in responses)
    assert sums["gap_max"] < 1e-4  # another tokenization would be scored far from the engine's log-probs
    check_policy_sync(tiny_model, engine, [ids], 0, num_tokens=4, max_error=1.0001)


@pytest.mark.parametrize(
    ("metrics", "advice"),
    [
        ({"rollout/all_wrong_fraction": 1.0, "rollout/truncated_fraction": 1.0}, "every response was cut"),
        ({"rollout/all_wrong_fraction": 1.0, "rollout/format_reward": 0.0}, "no response keeps the format"),
        ({"rollout/all_wrong_fraction": 1.0, "rollout/format_reward": 1.0}, "too hard, or misgraded"),
        ({"rollout/reward": 0.5, "rollout/zero_advantage_fraction": 1.0}, "every advantage is zero"),
        ({"rollout/reward": 0.5, "train/clip_fraction_high": 0.4}, "30 % of the tokens are clipped"),
        ({"rollout/reward": 0.5, "train/grad_norm": 1e4}, "gradient norm"),
        ({"rollout/reward": 0.5, "train/grad_norm": 1.0, "train/clip_fraction_high": None}, None),
        ({"rollout/reward": 0.0, "rollout/all_wrong_fraction": 0.0}, None),  # half of them +1, half of them -1
    ],
)
def test_the_diagnosis_names_what_is_off(metrics, advice):
    found = find_remarks(metrics, tiny_config())
    assert found == [] if advice is None else len(found) == 1 and advice in found[0]


def test_remarks_are_printed_with_their_step(capsys):
    diagnose(
        3,
        [{}, {"train/grad_norm": 1e4}, {"train/clip_fraction_low": 0.2, "train/clip_fraction_high": 0.2}],
        tiny_config(),
    )
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 3: the gradient norm is over 100 times")
    assert second.startswith("step 3: over 30 % of the tokens are clipped")


CONFIGURATION_MISTAKES = [
    ({"rollout_batch_size": 10}, "rollout_batch_size = 10 is not a multiple of group_size = 4"),
    ({"train_batch_size": 6}, "rollout_batch_size = 8 is not a multiple of train_batch_size = 6"),
    ({"sampling_temperature": 0}, "sampling_temperature = 0 samples the same response"),
    (
        {"sampling_temperature": 0.005},
        "sampling_temperature = 0.005 (command line): vLLM would take 0.01 instead; use that or more",
    ),
    (
        {"train_batch_size": 2, "gradient_accumulation_steps": 1},
        "train_batch_size = 2 is less than a group: use 4 or more",
    ),
    (
        {"gradient_accumulation_steps": 3},
        "train_batch_size = 6 or train_batch_size = 9 is (rollout_batch_size = 8, group_size = 4, "
        "train_batch_size = 8, gradient_accumulation_steps = 3)",
    ),
    ({"group_size": 1, "train_batch_size": 8}, "group_size = 1 has no group mean"),
    (
        {"length_normalization": "mean"},
        "length_normalization = 'mean' (command line): input should be 'masked_mean', ",
    ),
    ({"loss_type": "ppo"}, "loss_type = ppo: unknown; use no_baseline, reinforce_with_baseline, grpo_clip"),
    (
        {"ratio_level": "sequence"},
        "ratio_level = sequence with loss_type = reinforce_with_baseline, which has no ratio: use one of grpo_clip, ",
    ),
    (
        {"engine_correction": "token_mask", "sampling_top_p": 0.9},
        "engine_correction = token_mask compares log-probs of the same distribution: use sampling_top_p = 1 (now 0.9)",
    ),
    ({"sampling_max_tokens": 380}, "prompts are longer than max_context_tokens - sampling_max_tokens"),
    ({"rollout_batch_size": 40000, "train_batch_size": 40000, "gradient_accumulation_steps": 1}, "but a step takes"),
]


@pytest.mark.usefixtures("cpu_engine")
@pytest.mark.parametrize(("overrides", "message"), CONFIGURATION_MISTAKES)
def test_bad_input_is_one_line_and_status_2(overrides, message, tiny_model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["GRPO_train.py", *grpo_arguments(tiny_model_folder, tmp_path, **overrides)])
    with pytest.raises(SystemExit) as caught:
        run_main(GRPO_train.main)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_questions_without_answers_are_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "p", "response": "r"}) + "\n")
    with pytest.raises(UserError, match="1 of 1 training examples have no answer, the first at .*line 1"):
        load_questions([], tiny_config(train_data=str(path)))


def test_settings_without_effect_are_announced(capsys):
    load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", ["preset=one-gpu", "loss_type=grpo_clip"])
    assert "cliprange has no effect" in capsys.readouterr().out
    load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", ["preset=one-gpu", "cliprange=0.3"])
    assert "cliprange = 0.3 has no effect with loss_type = reinforce_with_baseline" in capsys.readouterr().out
    load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", ["preset=one-gpu", "sampling_top_p=0.9"])
    assert "responses come from the likeliest tokens alone" in capsys.readouterr().out
    load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", ["preset=one-gpu", "sampling_temperature=0.7"])
    assert "warning" not in capsys.readouterr().out
    load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", ["preset=one-gpu", "epochs_per_rollout_batch=2"])
    assert "grpo_clip corrects for it" in capsys.readouterr().out


@pytest.mark.usefixtures("cpu_engine")
def test_interrupt_waits_for_the_phase_saves_and_says_where(
    tiny_model_folder, tmp_path, monkeypatch, capsys, scripted_engine
):
    """Ctrl-C while the second rollout batch is graded: the policy of step 1 is saved."""
    original, calls = GRPO_train.make_rollouts, []

    def with_ctrl_c(*arguments, **named):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **named)

    monkeypatch.setattr(GRPO_train, "make_rollouts", with_ctrl_c)
    monkeypatch.setattr(
        sys, "argv", ["GRPO_train.py", *scripted_arguments(tiny_model_folder, tmp_path, run_name="x", n_grpo_steps=5)]
    )
    with pytest.raises(SystemExit) as caught:
        run_main(GRPO_train.main)
    assert caught.value.code == 130
    assert re.search(r"state after step 1 saved: .*step_000001", capsys.readouterr().err)
    assert (tmp_path / "x/checkpoints/step_000001/model/model.safetensors").exists()
    assert [row["train_step"] for row in train_rows(tmp_path / "x")] == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("cpu_engine")
def test_every_phase_is_held_to_its_limit(tiny_model_folder, tmp_path, monkeypatch, scripted_engine):
    limits = {}
    original = run_folder.watched

    def recorded(phase, limit_seconds, *arguments):
        limits[phase] = limit_seconds
        return original(phase, limit_seconds, *arguments)

    monkeypatch.setattr(run_folder, "watched", recorded)
    overrides = {
        "max_rollout_seconds": 101,
        "max_grade_seconds": 102,
        "max_train_seconds": 103,
        "max_save_seconds": 104,
        "max_evaluate_seconds": 105,
    }
    GRPO_train.main(scripted_arguments(tiny_model_folder, tmp_path, **overrides))
    of_training = {"sync": 101, "rollout": 101, "grade": 102, "old_log_probs": 103, "train": 103}
    assert limits == of_training | {"save": 104, "evaluate": 105}
    assert set(run_folder.PHASE_LIMITS) == set(limits)


@pytest.mark.usefixtures("cpu_engine")
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where_the_policy_is(
    tiny_model_folder, tmp_path, monkeypatch, capsys, scripted_engine
):
    monkeypatch.setattr(GRPO_train, "compute_advantages", lambda rewards, _: torch.full_like(rewards, torch.inf))
    with pytest.raises(UserError, match=r"step 1: loss "):
        GRPO_train.main(scripted_arguments(tiny_model_folder, tmp_path, run_name="x"))
    assert re.search("state after step 0 saved: .*step_000000", capsys.readouterr().err)
    assert (tmp_path / "x/checkpoints/step_000000/model/model.safetensors").exists()


@pytest.mark.usefixtures("cpu_engine")
def test_a_run_whose_engine_is_not_the_policy_keeps_its_last_whole_step(
    scripted_engine, tiny_model_folder, tmp_path, monkeypatch, capsys
):
    """The scripted log-probs are not the model's, which shows as soon as there is something to learn from them."""
    monkeypatch.setattr(GRPO_train, "compute_advantages", lambda rewards, _: torch.ones_like(rewards))
    monkeypatch.setattr("plainrl.rollouts.MIN_TOKENS_TO_CHECK", 1)
    with pytest.raises(SyncError, match="max_sync_error = 1.001"):
        GRPO_train.main(scripted_arguments(tiny_model_folder, tmp_path, run_name="x", sampling_min_tokens=0))
    assert re.search("state after step 0 saved: .*step_000000", capsys.readouterr().err)


def scripted_arguments(model, folder, **overrides):
    """The arguments of a run on a few questions from files, which are read faster than the embedded ones are made."""
    for name, first in (("questions", 1), ("validation", 100)):
        rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(first, first + 12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train_data": folder / "questions.jsonl", "validation_data": folder / "validation.jsonl"}
    return grpo_arguments(model, folder, **(files | overrides))


@pytest.fixture
def scripted_engine(monkeypatch):
    """GRPO_train without vLLM: every response is the same two tokens."""

    class ScriptedEvaluator(FakeEvaluator):
        llm = None

    def stream_responses(llm, prompt_ids, sampling_params, seeds, **_):
        yield from ((i, Response(ids, "", [17, 18], [-6.0, -6.0], "stop")) for i, ids in enumerate(prompt_ids))

    monkeypatch.setattr(GRPO_train, "Evaluator", ScriptedEvaluator)
    replace_engine(monkeypatch, stream_responses)


@pytest.mark.usefixtures("cpu_engine")
def test_a_run_ends_at_its_sampled_tokens_and_is_finished_then(scripted_engine, tiny_model_folder, tmp_path, capsys):
    """Eight responses of two tokens a step: 17 tokens are reached in the second."""
    settings = {"run_name": "x", "n_grpo_steps": 9, "max_sampled_tokens": 17}
    arguments = scripted_arguments(tiny_model_folder, tmp_path, **settings)
    GRPO_train.main(arguments)
    assert "step 2 is the last: max_sampled_tokens = 17" in capsys.readouterr().out
    rows = read_lines(tmp_path / "x/metrics.jsonl")
    assert [row["rollout/num_sampled_tokens"] for row in rows if "train_step" in row] == [16, 16]
    assert [row["eval_step"] for row in rows if "eval/answer_reward" in row] == [0, 1, 2]
    with pytest.raises(UserError, match="this run is finished"):
        GRPO_train.main([*arguments, f"resume={tmp_path / 'x'}"])


OWN_LOSS = """
import torch

def cispo(inputs):
    ratio = torch.exp(inputs.log_probs - inputs.old_log_probs).clamp(max=1 + inputs.cliprange).detach()
    losses = -ratio * (inputs.advantages + inputs.raw_rewards - 0.1) * inputs.log_probs
    return losses, {"weight_max": ratio, "surprise": -inputs.log_probs.detach()}
"""
OWN_REWARD = """
def is_even(response, ground_truth):
    return {"reward": float(response == "even")}
"""


@pytest.mark.usefixtures("cpu_engine")
@pytest.mark.parametrize("batch", [8, 4])
def test_a_loss_and_a_reward_of_the_users_own_train(
    scripted_engine, tiny_model, tiny_model_folder, tmp_path, monkeypatch, batch
):
    """One file each, named by its path. On-policy and off-policy; no row is skipped, whatever its advantage."""

    def stream_responses(llm, prompt_ids, sampling_params, seeds, **_):  # the rewards of the first group are all zero
        texts = ["odd"] * 4 + ["even", "odd"] * 2
        for index, (ids, text) in enumerate(zip(prompt_ids, texts, strict=True)):
            yield index, Response(ids, text, [17 + index, 18], [-6.0, -6.0], "stop")

    replace_engine(monkeypatch, stream_responses)
    (tmp_path / "my_losses.py").write_text(OWN_LOSS)
    (tmp_path / "my_rewards.py").write_text(OWN_REWARD)
    reward, settings = f"{tmp_path}/my_rewards.py:is_even", {"train_batch_size": batch, "sampling_min_tokens": 0}
    for loss_type in (f"{tmp_path}/my_losses.py:cispo", "reinforce_with_baseline"):
        name = loss_type.rpartition(":")[2]
        arguments = {"run_name": name, "loss_type": loss_type, "reward": reward, "max_sync_error": 1e9}
        GRPO_train.main(scripted_arguments(tiny_model_folder, tmp_path, **settings, **arguments))
        rows = train_rows(tmp_path / name)
        assert len(rows) == 2 * 8 // batch
        of_steps = [row for row in rows if "rollout/reward" in row]
        assert [row["rollout/reward"] for row in of_steps] == [0.25, 0.25]
        assert [row["rollout/zero_advantage_fraction"] for row in of_steps] == [0.5, 0.5]
        trained = sum(row["train/num_trained_rows"] for row in rows)
        assert trained == (2 * 8 if name == "cispo" else 2 * 4)
        if name == "cispo":
            assert all(row["train/surprise"] > 0 for row in rows)
            distances = [abs(row["train/weight_max"] - 1) for row in rows]
            assert distances[0] < 1e-5 and max(distances) < 0.2 + 1e-6
            assert (max(distances) < 1e-5) == (batch == 8)  # off-policy the second batch is scored by a moved policy
        weights = AutoModelForCausalLM.from_pretrained(tmp_path / name / "final").get_input_embeddings().weight
        assert weights.isfinite().all() and not torch.equal(weights, tiny_model.get_input_embeddings().weight)


@pytest.mark.usefixtures("cpu_engine")
def test_a_run_from_a_warm_start_is_resumed_by_the_command_that_began_it(
    scripted_engine, tiny_model, tiny_model_folder, tmp_path
):
    """Its configuration names the model as the user does: which folder the policy came from follows from warm_start."""
    shutil.copytree(tiny_model_folder, tmp_path / "warm/final")
    (tmp_path / "warm/config.yaml").write_text(f"model: {tiny_model_folder}\n")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "warm/final")
    arguments = scripted_arguments(tiny_model_folder, tmp_path, run_name="x", warm_start="warm")
    GRPO_train.main(arguments)  # no response is right: the policy stays where it begins
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "x/final")
    assert not policy.get_input_embeddings().weight.any()
    with pytest.raises(UserError, match="this run is finished"):
        GRPO_train.main([*arguments, f"resume={tmp_path / 'x'}"])


@pytest.mark.usefixtures("cpu_engine", "scripted_engine")
def test_the_engine_sleeps_while_the_policy_trains(tiny_model_folder, tmp_path, monkeypatch):
    """On a GPU that both share there is no room for both."""
    events, update = [], GRPO_train.update_policy

    def watched(*arguments):
        events.append("update")
        return update(*arguments)

    monkeypatch.setattr(GRPO_train.Evaluator, "sync", lambda *_, **__: events.append("sync") or {})
    monkeypatch.setattr(GRPO_train.Evaluator, "sleep", lambda self: events.append("sleep"))
    monkeypatch.setattr(GRPO_train, "update_policy", watched)
    GRPO_train.main(scripted_arguments(tiny_model_folder, tmp_path, run_name="x", eval_interval=99))
    steps = " ".join(events).split("sync")[1:]
    assert any("update" in step for step in steps)
    assert all(step.split() == ["sleep", "update"] for step in steps if "update" in step), events
