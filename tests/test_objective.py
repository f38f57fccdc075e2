"""The objective against numbers from elsewhere, and what holds for every combination that the configuration accepts.

tests/make_reference_numbers.py makes reference_numbers.json, and says where its numbers come from.
"""

import itertools
import json
import math
import re
from pathlib import Path

import make_reference_numbers as reference
import pytest
import torch

from GRPO_helper import (
    ADVANTAGE_SCALES,
    LENGTH_NORMALIZATIONS,
    LOSSES,
    Loss,
    LossInputs,
    normalize_within_groups,
)
from GRPO_train import accumulate_gradients, rows_to_train_on, update_policy
from plainrl.config import GRPOConfig
from plainrl.corrections import ENGINE_CORRECTIONS, KL_ESTIMATORS, RATIO_LEVELS, engine_weights
from plainrl.objective import check_token_losses, compute_advantages, compute_token_losses, summarize_update
from plainrl.policy import prepare_training
from plainrl.records import Example, Response, Rollout, UserError

OF_SCORES = (("log_probs", "log_probs"), ("token_entropy", "entropy"))  # by our name, and by the file's
STORED = json.loads(Path(__file__).with_name("reference_numbers.json").read_text())
EPS = reference.EPS


def make_config(**overrides):
    """A configuration of ours from the keys of a stored case."""
    values = {
        "rollout_batch_size": reference.NUM_ROWS,
        "train_batch_size": reference.NUM_ROWS,
        "group_size": reference.GROUP_SIZE,
        "gradient_accumulation_steps": 1,
        "sampling_max_tokens": reference.LONGEST,
        "sampling_min_tokens": 0,
        "advantage_eps": EPS,
        "max_sync_error": 1e9,  # the engine of the stored rollouts is made up
        "learning_rate": 1e-3,
        "compute_dtype": "float32",
    }
    if overrides.pop("off_policy", False):
        values["epochs_per_rollout_batch"] = 2
    return GRPOConfig(**(values | overrides))


def make_rollouts(numbers, config):
    """Stored rollouts as ours, with advantages in float64, and what the loss needs of other policies."""
    rewards = torch.tensor([row["reward"] for row in numbers], dtype=torch.float64)
    advantages = compute_advantages(rewards, config)
    rollouts = []
    for row, advantage in zip(numbers, advantages.tolist(), strict=True):
        engine = reference.engine_log_probs(row, config.is_off_policy)
        response = Response(row["prompt_ids"], "", row["token_ids"], engine, row["finish_reason"])
        rewards_of_row = dict.fromkeys(("reward", "format_reward", "answer_reward"), row["reward"])
        rollout = Rollout(Example("q", "p", "1", None, "s"), response, rewards_of_row, advantage)
        rollout.old_log_probs = torch.tensor(row["old"], dtype=torch.float64)
        rollout.reference_log_probs = torch.tensor(row["reference"], dtype=torch.float64)
        rollouts.append(rollout)
    return rollouts


def padded(rows):
    return reference.padded(rows).requires_grad_()


def loss_and_gradients(rollouts, numbers, config, division=None):
    """The step's loss and its gradients by log-probs and entropies, as rows, in the microbatches of a division."""
    return of_each_normalization(rollouts, numbers, config, [config.length_normalization], division)[0]


def of_each_normalization(rollouts, numbers, config, normalizations, division=None):
    """The same for each of several length normalizations, which take the same token losses."""
    scores = {name: padded([row[key] for row in numbers]) for name, key in OF_SCORES}
    lengths = torch.tensor([len(row["token_ids"]) for row in numbers])
    mask = torch.arange(reference.LONGEST) < lengths[:, None]
    kept, size = rows_to_train_on(rollouts, config)
    kept = {id(row) for row in kept}
    found = [[0.0, *(torch.zeros_like(value) for value in scores.values())] for _ in normalizations]
    for rows in division or [torch.arange(len(rollouts))]:
        rows = [int(row) for row in rows if id(rollouts[row]) in kept]
        if not rows:
            continue
        part, chosen = [rollouts[row] for row in rows], {name: value[rows] for name, value in scores.items()}
        losses, _ = compute_token_losses(part, chosen, mask[rows], config)
        for name, sums in zip(normalizations, found, strict=True):
            loss = LENGTH_NORMALIZATIONS[name](losses, mask[rows], size)
            gradients = torch.autograd.grad(loss, [*scores.values()], retain_graph=True, materialize_grads=True)
            sums[:] = [total + share for total, share in zip(sums, (loss.item(), *gradients), strict=True)]
    return found


def name_of(case):
    config = {key: value for key, value in case["config"].items() if key != "off_policy"}
    return f"{case['source']}-{'-'.join(str(value) for value in config.values())}"


@pytest.mark.parametrize("case", STORED["losses"], ids=name_of)
def test_loss_and_gradient_are_those_of_the_reference(case):
    config = make_config(**case["config"])
    numbers = STORED["rollouts"]
    loss, gradient, of_entropy = loss_and_gradients(make_rollouts(numbers, config), numbers, config)
    assert loss == pytest.approx(case["loss"], abs=1e-9)
    assert gradient.any()
    for found, expected in ((gradient, case["gradient"]), (of_entropy, case["entropy_gradient"])):
        torch.testing.assert_close(found, padded(expected).detach(), atol=1e-9, rtol=0)


def test_the_stored_cases_cover_every_table():
    assert STORED["versions"]["trl"] == "1.16.0"
    for source, missing in (("equations", set()), ("TRL", {"no_baseline", "reinforce_with_baseline", "grpo_no_clip"})):
        cases = [make_config(**case["config"]) for case in STORED["losses"] if case["source"] == source]
        assert {config.loss_type for config in cases} == LOSSES.keys() - missing
        assert {config.ratio_level for config in cases} == RATIO_LEVELS.keys()
        assert {config.length_normalization for config in cases} == LENGTH_NORMALIZATIONS.keys()
        only_ours = {"sequence_mean_mask"} if missing else set()
        assert {config.engine_correction for config in cases} == ENGINE_CORRECTIONS.keys() - only_ours
        estimators = {config.kl_estimator for config in cases if config.kl_coefficient}
        assert estimators == ({"k3"} if missing else KL_ESTIMATORS.keys())
        for key in ("cliprange_high", "cliprange_dual", "entropy_coefficient"):
            assert any(getattr(config, key) for config in cases), key
        scales = {case["scale"] for case in STORED["advantages"] if case["source"] == source}
        assert scales == ADVANTAGE_SCALES.keys() - ({"mean"} if missing else set())


def test_the_stored_numbers_are_those_that_the_script_makes():
    for stored, made in zip(STORED["rollouts"], reference.make_rollouts(), strict=True):
        assert stored.keys() == made.keys()
        for key, value in made.items():
            assert stored[key] == pytest.approx(value, abs=1e-12), key
    lists = [*reference.OF_EQUATIONS, *reference.OF_TRL, *reference.OF_STEPS]
    expected = [{"length_normalization": "masked_mean", **config} for config in lists]
    assert [case["config"] for case in (*STORED["losses"], *STORED["steps"])] == expected


# The tokens that a limit is for: those of an advantage of this sign (0: any).
SIGNS = {"clip_fraction_low": -1, "clip_fraction_high": 1, "clip_fraction_dual": -1}
SIGNS |= {"ratio_capped_fraction": 0, "engine_corrected_fraction": 0}


def test_stored_gradients_lie_on_both_sides_of_each_limit():
    """Of the tokens that a limit is for some lie beyond it, and some within. Beyond a clip the stored gradient is 0."""
    sides, numbers = {}, STORED["rollouts"]
    mask = torch.arange(reference.LONGEST) < torch.tensor([len(row["token_ids"]) for row in numbers])[:, None]
    scores = {key: padded([row[name] for row in numbers]) for key, name in OF_SCORES}
    for case in STORED["losses"]:
        config = make_config(**case["config"])
        rollouts = make_rollouts(numbers, config)
        metadata = compute_token_losses(rollouts, scores, mask, config)[1]
        has_terms = config.kl_coefficient or config.entropy_coefficient
        for name in SIGNS.keys() & metadata.keys():
            of_sign = [SIGNS[name] * row.advantage >= 0 for row in rollouts]
            concerned = mask & torch.tensor(of_sign)[:, None]
            kind = config.engine_correction if name.startswith("engine") else config.ratio_level
            found = metadata[name][concerned]
            sides.setdefault((case["source"], name, kind), set()).update(found.tolist())
            if name.startswith("clip") and not has_terms:
                gradient = padded(case["gradient"])[concerned]
                assert not gradient[found].any(), case["config"]
                if config.engine_correction in ("none", "token_truncate") and not config.cliprange_dual:
                    assert gradient[~found].all(), case["config"]
    of_both = {(name, level) for name in SIGNS.keys() - {"engine_corrected_fraction"} for level in RATIO_LEVELS}
    of_both |= {("engine_corrected_fraction", name) for name in ENGINE_CORRECTIONS.keys() - {"none"}}
    not_in_trl = {("clip_fraction_dual", "sequence"), ("engine_corrected_fraction", "sequence_mean_mask")}
    assert sides == {("equations", *key): {True, False} for key in of_both} | {
        ("TRL", *key): {True, False} for key in of_both - not_in_trl
    }


@pytest.mark.parametrize("case", STORED["advantages"], ids=lambda case: f"{case['source']}-{case['scale']}")
def test_advantages_are_those_of_the_reference(case):
    rewards = torch.tensor([row["reward"] for row in STORED["rollouts"]], dtype=torch.float64)
    advantages = normalize_within_groups(rewards, reference.GROUP_SIZE, EPS, case["scale"])
    torch.testing.assert_close(advantages, torch.tensor(case["advantages"], dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", STORED["steps"], ids=name_of)
def test_an_optimizer_step_is_that_of_trl(case):
    """The gradient of the tiny model as the optimizer gets it, and what AdamW makes of it."""
    config = make_config(gradient_accumulation_steps=4, **case["config"])
    numbers = [
        row | {name: case[name][index] for name in ("log_probs", "old", "reference")}
        for index, row in enumerate(STORED["rollouts"])
    ]
    rollouts, model = make_rollouts(numbers, config), reference.make_model()
    accumulate_gradients(model, rollouts, 0, config)
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_described(gradient, case["gradient"])
    optimizer, before = prepare_training(model, config), {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    assert_described({name: part - before[name] for name, part in model.named_parameters()}, case["change"])


def assert_described(tensors, expected):
    """Norms and products with fixed directions are within 1e-6 of the whole's norm. Measured: up to 2e-7."""
    found = reference.describe(tensors)
    assert found.keys() == expected.keys()
    whole = math.sqrt(sum(values[0] ** 2 for values in expected.values()))
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-6 * whole, rel=0), name


def test_enough_steps_are_compared():
    assert len(STORED["steps"]) >= 12
    assert {case["num_microbatches"] for case in STORED["steps"]} == {1, 2}


# --- every combination ------------------------------------------------------------------------------------------------

TERMS = [{}, *({"kl_coefficient": 0.1, "kl_estimator": name} for name in KL_ESTIMATORS), {"entropy_coefficient": 0.1}]
NUMBERS_OF_MICROBATCHES = (1, 2, 4, 8, "uneven")


@pytest.mark.parametrize("ratio_level", RATIO_LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_combination_has_one_gradient_or_is_refused(loss_type, ratio_level):
    """1, 2, 4, 8 or uneven microbatches in a random order of rows: the gradient is that of the batch as it stands.

    The rows of a step are the stored ones once for each advantage scale, so that every step has all scales. One row has
    an advantage of zero, and another a single token.
    """
    generator = torch.Generator().manual_seed(0)
    for correction, term, policy in itertools.product(ENGINE_CORRECTIONS, TERMS, ({"off_policy": True}, {})):
        settings = {"loss_type": loss_type, "ratio_level": ratio_level, "engine_correction": correction}
        settings |= {"sampling_min_tokens": 1, "engine_correction_cap": 1.2} | term | policy
        if ratio_level == "sequence" and "old_log_probs" not in LOSSES[loss_type].needs:
            with pytest.raises(ValueError, match=f"= sequence with loss_type = {loss_type}, which has no ratio"):
                make_config(**settings)
            continue
        # The scale decides on the advantages alone, and the length normalization on the divisors alone.
        configs = [
            make_config(**settings, use_std_normalization=scale, length_normalization=normalization)
            for scale, normalization in itertools.product(ADVANTAGE_SCALES, LENGTH_NORMALIZATIONS)
        ]
        numbers = STORED["rollouts"] * len(ADVANTAGE_SCALES)
        rollouts = [
            row for one in configs[:: len(LENGTH_NORMALIZATIONS)] for row in make_rollouts(STORED["rollouts"], one)
        ]
        rollouts[1].advantage = 0.0  # skipped, but with a term
        config = configs[0]
        assert len(rows_to_train_on(rollouts, config)[0]) == len(rollouts) - (0 if term else skipped(rollouts, config))
        expected = of_each_normalization(rollouts, numbers, config, LENGTH_NORMALIZATIONS)
        assert all(values[1].any() for values in expected)
        for number in NUMBERS_OF_MICROBATCHES:
            division = random_division(len(rollouts), number, generator)
            found = of_each_normalization(rollouts, numbers, config, LENGTH_NORMALIZATIONS, division)
            for values, expected_values in zip(found, expected, strict=True):
                for value, expected_value in zip(values, expected_values, strict=True):
                    assert (torch.as_tensor(value) - expected_value).abs().max() < 1e-12


def random_division(num_rows, number, generator):
    """The rows of each microbatch, in a random order."""

    def draw(num):
        return torch.randperm(num, generator=generator)

    order = draw(num_rows)
    if number != "uneven":
        return list(order.chunk(number))
    return list(order.tensor_split((draw(num_rows - 1)[:3] + 1).sort().values))


def skipped(rollouts, config):
    zero = LOSSES[config.loss_type].zero_with
    return sum((row.advantage if zero == "advantages" else row.rewards["reward"]) == 0 for row in rollouts)


def test_with_a_term_every_row_is_trained_on(tmp_path):
    rollouts = make_rollouts(STORED["rollouts"], make_config())
    for rollout in rollouts:
        rollout.advantage = 0.0
    assert rows_to_train_on(rollouts, make_config())[0] == []
    for term in TERMS[1:]:
        config = make_config(**term)
        assert len(rows_to_train_on(rollouts, config)[0]) == 8
        _, gradient, of_entropy = loss_and_gradients(rollouts, STORED["rollouts"], config)
        assert (gradient if config.kl_coefficient else of_entropy).any()


MISTAKES = [
    (
        {"ratio_level": "sequence"},
        "ratio_level = sequence with loss_type = reinforce_with_baseline, which has no ratio",
    ),
    ({"cliprange_dual": 0.9}, "cliprange_dual = 0.9 would clip where the policy has not moved: use more than 1"),
    (
        {"engine_correction": "token_mask", "sampling_top_p": 0.9},
        "engine_correction = token_mask compares log-probs of the same distribution: use sampling_top_p = 1 (now 0.9)",
    ),
    (
        {"engine_correction": "token_mask", "sampling_min_tokens": 7},
        "and sampling_min_tokens (now 7) below sampling_max_tokens",
    ),
    (
        {"use_std_normalization": "mean", "overlong_cache_tokens": 2},
        "use_std_normalization = mean needs rewards of 0 or more, and overlong_cache_tokens = 2 lowers them",
    ),
    ({"engine_correction_cap": 1.0}, "greater than 1"),
    ({"ratio_cap": 0.5}, "greater than or equal to 1"),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES)
def test_combinations_without_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_config(**settings)


GSPO = {"loss_type": "grpo_clip", "ratio_level": "sequence", "train_batch_size": reference.GROUP_SIZE}  # off-policy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "cispo", "cliprange_high": 0.3}, "cliprange_high = 0.3 has no effect with loss_type = cispo"),
        ({"ratio_cap": 3.0}, "ratio_cap = 3.0 has no effect with loss_type = reinforce_with_baseline"),
        ({"loss_type": "grpo_clip", "cliprange_dual": 3.0}, "cliprange_dual has no effect with one optimizer step"),
        ({"loss_type": "cispo"}, "ratio_cap has no effect with one optimizer step per rollout batch"),
        ({"loss_type": "grpo_clip", "ratio_level": "sequence"}, "ratio_level has no effect with one optimizer step"),
        ({"kl_estimator": "k2"}, "kl_estimator = k2 has no effect without kl_coefficient"),
        ({"kl_estimator": "k1", "kl_coefficient": 0.1}, "kl_estimator = k1 has no gradient that pulls to"),
        ({"engine_correction_cap": 3.0}, "engine_correction_cap = 3.0 has no effect with engine_correction = none"),
        (GSPO, "cliprange = 0.2 clips no mean over a response: use 3e-4 or so"),
        (GSPO | {"loss_type": "cispo"}, "ratio_cap = 5 caps no mean over a response"),
        (GSPO | {"length_normalization": "token_mean"}, "weighs a response by its length; GSPO weighs all alike"),
        ({"loss_type": "no_baseline", "dynamic_sampling": True}, "throws away groups that are all right"),
        ({"loss_type": "no_baseline", "use_std_normalization": False}, "use_std_normalization = False has no effect"),
        ({"use_std_normalization": "mean", "advantage_eps": 1e-4}, "advantage_eps = 0.0001 has no effect with use_std"),
        ({"mask_truncated_responses": True, "overlong_cache_tokens": 4}, "raises the advantages of its group"),
    ],
)
def test_settings_without_effect_are_named(settings, message):
    assert any(message in warning for warning in make_config(**settings).warnings())
    assert not make_config().warnings()


def test_an_own_loss_is_told_that_groups_of_one_have_no_advantages(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def loss(inputs):\n    return -inputs.raw_rewards * inputs.log_probs, {}\n")
    config = make_config(loss_type=f"{path}:loss", group_size=1)
    assert config.warnings() == [f"group_size = 1: every advantage is 0, and loss_type = {path}:loss sees raw_rewards"]
    assert not config.model_copy(update={"group_size": 2}).warnings()


# --- no ratio gives inf or NaN ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if "old_log_probs" in LOSSES[name].needs])
@pytest.mark.parametrize("ratio_level", RATIO_LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_ratio_is_infinite(loss_type, ratio_level, dtype):
    """Log-ratios up to 1e4, equal within a response; beyond 20 the ratio is exp(20), and has no gradient."""
    of_responses = [0.1, 19.0, 21.0, 89.0, 1e4, -19.0, -21.0, -1e4]
    log_probs = torch.tensor(of_responses * 2, dtype=dtype)[:, None].repeat(1, 2).requires_grad_()
    mask = torch.ones(16, 2, dtype=torch.bool)
    inputs = LossInputs(
        log_probs,
        mask,
        advantages=torch.tensor([[1.0]] * 8 + [[-1.0]] * 8, dtype=dtype),
        old_log_probs=RATIO_LEVELS[ratio_level](log_probs, torch.zeros_like(log_probs).detach(), mask),
        cliprange=0.2,
        ratio_cap=5.0,
    )
    losses, metadata = LOSSES[loss_type](inputs)
    losses.sum().backward()
    assert losses.isfinite().all() and log_probs.grad.isfinite().all()
    assert metadata["ratio_max"].max() == torch.tensor(20.0, dtype=dtype).exp()
    if loss_type == "grpo_no_clip":
        expected = [math.exp(0.1), math.exp(19), 0, 0, 0, math.exp(-19), 0, 0]
        for token in (0, 1):
            assert log_probs.grad[8:, token].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("correction", [name for name, function in ENGINE_CORRECTIONS.items() if function])
def test_no_weight_is_infinite(correction):
    old = torch.tensor([[0.0, 500.0, -500.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    weights, is_changed = engine_weights(ENGINE_CORRECTIONS[correction], old, torch.zeros(2, 4), mask, 2.0)
    assert weights.isfinite().all() and not is_changed[~mask].any()
    assert weights[1, 0] == 1


def test_weights_by_hand():
    """Two responses; the first token of each does not count, and the second response has a token less."""
    old = torch.tensor([[9.0, 0.5, -1.0], [9.0, 0.2, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = {
        name: engine_weights(function, old, torch.zeros_like(old), mask, 1.5, num_forced=1)
        for name, function in ENGINE_CORRECTIONS.items()
        if function
    }
    a, b = math.exp(0.2), math.exp(-0.5)
    weights = {
        "token_truncate": [[1, 1.5, math.exp(-1)], [1, a]],
        "token_mask": [[1, 0, 0], [1, a]],  # exp(0.5) = 1.65 and exp(-1) = 0.37 lie outside [0.67, 1.5]
        "sequence_truncate": [[b, b, b], [a, a]],
        "sequence_mask": [[b, b, b], [a, a]],
        "sequence_mean_mask": [[1, 1, 1], [1, 1]],  # exp(-0.25) = 0.78 and exp(0.2) = 1.22 lie inside
    }
    changed = {"token_truncate": 1, "token_mask": 2}
    for name, rows in weights.items():
        assert found[name][0][mask].tolist() == pytest.approx([*rows[0], *rows[1]]), name
        assert found[name][1].sum() == changed.get(name, 0), name
    cut = engine_weights(ENGINE_CORRECTIONS["sequence_truncate"], old, torch.zeros_like(old), mask, 1.2, 1)
    assert cut[0][mask].tolist() == pytest.approx([b, b, b, 1.2, 1.2]) and cut[1].sum() == 2  # exp(0.2) = 1.22
    narrow = engine_weights(ENGINE_CORRECTIONS["sequence_mean_mask"], old, torch.zeros_like(old), mask, 1.25, 1)
    assert narrow[0][mask].tolist() == [0, 0, 0, 1, 1] and narrow[1].sum() == 3  # 0.78 lies outside [0.8, 1.25]


def test_the_effective_sample_size_by_hand():
    """Weights 1, 1 and 0.5: (2.5)^2 / (3 * 2.25)."""
    sums = {"loss": 0.0, "num_trained_rows": 1.0, "num_tokens": 3.0, "entropy_sum": 0.0}
    sums |= {"train/engine_weight_mean": 2.5, "train/engine_weight_square_mean": 2.25}
    metrics = summarize_update(sums | {"train/engine_corrected_fraction": 1.0})
    assert metrics["train/engine_effective_sample_size"] == pytest.approx(6.25 / 6.75)
    assert metrics["train/engine_weight_mean"] == pytest.approx(2.5 / 3)
    assert metrics["train/engine_corrected_fraction"] == pytest.approx(1 / 3)
    assert "train/engine_weight_square_mean" not in metrics
    sums |= {"train/engine_weight_mean": 0.0, "train/engine_weight_square_mean": 0.0}
    assert summarize_update(sums)["train/engine_effective_sample_size"] == 0


OF_TERMS = {
    *("train/engine_weight_mean", "train/engine_corrected_fraction", "train/engine_effective_sample_size", "train/kl"),
    *("train/clip_fraction_dual", "train/ratio_capped_fraction"),
}


def test_what_the_terms_log_is_documented():
    """Each metric has a row in docs/metrics.md, and no other run has it."""
    numbers = [row | {"log_probs": row["old"]} for row in STORED["rollouts"]]
    logged = []
    for settings in (reference.DUAL | reference.MASK | reference.KL["k3"], reference.CISPO, reference.CLIP):
        config = make_config(**settings)
        model = reference.make_model()
        rows = update_policy(model, prepare_training(model, config), make_rollouts(numbers, config), 0, 1, config)
        logged.append({name for row in rows for name in row})
    assert logged[0] | logged[1] == logged[2] | OF_TERMS and not logged[2] & OF_TERMS
    page = (Path(__file__).parent.parent / "docs/metrics.md").read_text()
    assert all(f"| `{name}` |" in page for name in OF_TERMS)


# --- KL ---------------------------------------------------------------------------------------------------------------


def test_the_mean_gradient_of_each_estimator():
    """Exactly, over a vocabulary of 4: k2 has the reverse KL's gradient, k1 none, k3 the forward KL's."""
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 4, generator=generator, dtype=torch.float64)

    def gradient_of(loss):
        leaf = logits.clone().requires_grad_()
        loss(leaf.log_softmax(-1)).backward()
        return leaf.grad

    first = other.log_softmax(-1)
    of_reverse = gradient_of(lambda log_probs: (log_probs.exp() * (log_probs - first)).sum())
    of_forward = gradient_of(lambda log_probs: (first.exp() * (first - log_probs)).sum())
    expected = {"k1": torch.zeros(4, dtype=torch.float64), "k2": of_reverse, "k3": of_forward}
    for name, estimate in KL_ESTIMATORS.items():
        found = gradient_of(lambda log_probs: (log_probs.exp().detach() * estimate(log_probs - first)).sum())  # noqa: B023
        torch.testing.assert_close(found, expected[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("difference", [-1e4, -90.0, 90.0, 1e4])
def test_k3_is_finite_however_far_the_policy_has_gone(difference):
    leaf = torch.tensor([difference]).requires_grad_()
    value = KL_ESTIMATORS["k3"](leaf)
    value.sum().backward()
    assert value.isfinite().all() and leaf.grad.item() == 0


def test_rewards_below_zero_have_no_mean_to_divide_by():
    config = make_config(use_std_normalization="mean")
    rewards = torch.tensor([1.0, 0.0, 0.0, -0.5, 1.0, 1.0, 0.0, 0.0])
    with pytest.raises(UserError, match="use_std_normalization = mean: a reward is -0.5: divide by the mean only if"):
        compute_advantages(rewards, config)
    rewards[3] = 0.0
    assert compute_advantages(rewards, config).tolist() == [3, -1, -1, -1, 1, 1, -1, -1]


# --- a loss of the user's own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda inputs: inputs.log_probs, "returned Tensor: return (losses, metadata)"),
        (lambda inputs: (inputs.log_probs.sum(-1, keepdim=True), {}), "returned the losses as (2, 1): give one value"),
        (lambda inputs: (inputs.log_probs, {"norm": torch.ones(())}), "returned norm as (): give one value per token"),
        (lambda inputs: (inputs.log_probs, {"norm": 1.0}), "returned norm as float: give one value per token, (2, 3)"),
        (lambda inputs: (inputs.log_probs, {"loss": inputs.log_probs}), "returned metadata loss: each run logs that"),
        (lambda inputs: (inputs.log_probs, {"kl": inputs.log_probs}), "returned metadata kl: each run logs that"),
    ],
)
def test_a_function_that_is_no_loss_is_refused(function, message):
    """Losses of one number per response would be broadcast by two of the three length normalizations."""
    inputs = LossInputs(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(UserError, match=re.escape(message)):
        check_token_losses(Loss(function), inputs)
