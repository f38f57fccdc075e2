"""What holds for every loss of LOSSES and every one of LENGTH_NORMALIZATIONS, checked over the two tables.

A new line in a table is tested as it stands: `pytest tests/test_losses.py`. What is particular to a loss, its values
worked by hand, is in test_GRPO_helper.py.
"""

import math
import re
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.overrides import TorchFunctionMode

from GRPO_helper import (
    LENGTH_NORMALIZATIONS,
    LOSSES,
    Loss,
    LossInputs,
    StepSize,
    compute_policy_gradient_loss,
    grpo_clip,
    grpo_microbatch_train_step,
    reduce_metadata,
    reinforce_with_baseline,
)

NUM_ROWS, NUM_TOKENS = 8, 6
DIVISIONS = [list(torch.arange(NUM_ROWS).chunk(number)) for number in (1, 2, 4, 8)]
UNEQUAL_DIVISION = [torch.tensor([5, 2]), torch.tensor([7, 0, 1, 6, 3]), torch.tensor([4])]


def random_inputs(dtype=torch.float64, spread=0.3):
    """A step's rows: advantages of both signs, rewards 0 and 1, ratios about 1 that differ by token and by row."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    old = -draw(NUM_ROWS, NUM_TOKENS).abs()
    mask = torch.rand(NUM_ROWS, NUM_TOKENS, generator=generator) > 0.3
    mask[:, 0] = True
    return LossInputs(
        log_probs=old + spread * (draw(NUM_ROWS, NUM_TOKENS) + draw(NUM_ROWS, 1)),
        mask=mask,
        advantages=draw(NUM_ROWS, 1),
        raw_rewards=draw(NUM_ROWS, 1).sign().clamp(min=0),
        old_log_probs=old,
        cliprange=0.2,
        ratio_cap=1.5,
    )


def size_of(inputs):
    return StepSize(len(inputs.mask), int(inputs.mask.sum()), NUM_TOKENS + 3)


def tensors_of(inputs):
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return {name: value for name, value in values.items() if torch.is_tensor(value)}


def take_rows(inputs, rows):
    return replace(inputs, **{name: value[rows] for name, value in tensors_of(inputs).items()})


def loss_and_gradient(loss_type, normalization, inputs, division=None, size=None):
    """The step's loss and its gradient by the log-probs, in the microbatches of a division."""
    log_probs = inputs.log_probs.clone().requires_grad_()
    inputs, total = replace(inputs, log_probs=log_probs), 0.0
    for rows in division or [torch.arange(len(log_probs))]:
        part = take_rows(inputs, rows)
        losses, _ = LOSSES[loss_type](part)
        loss = LENGTH_NORMALIZATIONS[normalization](losses, part.mask, size or size_of(inputs))
        loss.backward()
        total += loss.detach()
    return total, log_probs.grad


def microbatch_step(loss_type, inputs, num_steps=1):
    """`grpo_microbatch_train_step` on these inputs: loss, gradient, metadata."""
    log_probs = inputs.log_probs.clone().requires_grad_()
    loss, metadata = grpo_microbatch_train_step(log_probs, inputs.mask, num_steps, loss_type, **given_to(inputs))
    return loss, log_probs.grad, metadata


def given_to(inputs):
    """What the assignment's functions are given beside log-probs and mask."""
    return {
        "raw_rewards": inputs.raw_rewards,
        "advantages": inputs.advantages,
        "old_log_probs": inputs.old_log_probs,
        "cliprange": inputs.cliprange,
        "ratio_cap": inputs.ratio_cap,
    }


def assert_close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


# --- what is checked of a loss --------------------------------------------------------------------------------------


def check_finite(loss_type):
    """Loss and gradient are finite numbers in the loop's float32, also with ratios from e^-9 to e^9."""
    for spread in (0.0, 0.3, 3.0):
        for normalization in LENGTH_NORMALIZATIONS:
            loss, gradient = loss_and_gradient(loss_type, normalization, random_inputs(torch.float32, spread))
            assert loss.isfinite() and gradient.isfinite().all()
            assert gradient.any()


def check_results(loss_type):
    """A loss for each token with gradient, in the inputs' dtype; metadata for each token without."""
    for dtype in (torch.float32, torch.float64):
        inputs = random_inputs(dtype)
        losses, metadata = LOSSES[loss_type](replace(inputs, log_probs=inputs.log_probs.clone().requires_grad_()))
        assert losses.shape == inputs.mask.shape and losses.dtype == dtype and losses.requires_grad
        for name, values in metadata.items():
            assert values.shape == inputs.mask.shape, name
            assert not values.requires_grad, name


def check_zero_rows(loss_type):
    """A row whose `zero_with` is zero has loss and gradient exactly zero, so that it may be left out."""
    field = LOSSES[loss_type].zero_with
    if field is None:
        return  # training leaves no row out
    inputs, is_zero = random_inputs(), torch.arange(NUM_ROWS) % 3 == 1
    inputs = replace(inputs, **{field: getattr(inputs, field).masked_fill(is_zero[:, None], 0.0)})
    losses, _ = LOSSES[loss_type](inputs)
    assert (losses[inputs.mask & is_zero[:, None]] == 0).all()
    for normalization in LENGTH_NORMALIZATIONS:
        loss, gradient = loss_and_gradient(loss_type, normalization, inputs)
        assert (gradient[is_zero] == 0).all() and gradient.any()
        others = take_rows(inputs, ~is_zero)
        loss_of_others, gradient_of_others = loss_and_gradient(loss_type, normalization, others, size=size_of(inputs))
        assert_close(loss_of_others, loss)
        assert_close(gradient_of_others, gradient[~is_zero])


def check_microbatches(loss_type):
    """1, 2, 4, 8 microbatches, unequal ones, rows in another order: the same loss, gradient and metadata."""
    inputs = random_inputs()
    for normalization in LENGTH_NORMALIZATIONS:
        expected = loss_and_gradient(loss_type, normalization, inputs)
        for division in [*DIVISIONS, UNEQUAL_DIVISION]:
            found = loss_and_gradient(loss_type, normalization, inputs, division)
            assert_close(found[0], expected[0])
            assert_close(found[1], expected[1])
    loss, gradient, metadata = microbatch_step(loss_type, inputs)
    for division in DIVISIONS:
        parts = [microbatch_step(loss_type, take_rows(inputs, rows), len(division)) for rows in division]
        assert_close(sum(part[0] for part in parts), loss)
        assert_close(torch.cat([part[1] for part in parts]), gradient)
        num_tokens = torch.stack([part[2]["num_tokens"] for part in parts])
        assert num_tokens.sum() == metadata["num_tokens"]
        for name in metadata.keys() - {"num_tokens"}:
            values = torch.stack([part[2][name] for part in parts])
            found = values.amax() if name.endswith("_max") else (values * num_tokens).sum() / num_tokens.sum()
            assert_close(found, metadata[name])


def check_ratio_of_one(loss_type):
    """Where the policy is still the one that sampled, the gradient is REINFORCE's with the same advantages.

    A loss that has no advantages: with the same rewards.
    """
    field = next((name for name in ("advantages", "raw_rewards") if name in LOSSES[loss_type].needs), None)
    if field is None:
        return
    inputs = random_inputs()
    inputs = replace(inputs, old_log_probs=inputs.log_probs.clone())
    for normalization, normalize in LENGTH_NORMALIZATIONS.items():
        _, gradient = loss_and_gradient(loss_type, normalization, inputs)
        log_probs = inputs.log_probs.clone().requires_grad_()
        normalize(-getattr(inputs, field) * log_probs, inputs.mask, size_of(inputs)).backward()
        assert_close(gradient, log_probs.grad)


def check_outside_the_mask(loss_type):
    """What stands outside the mask changes neither loss, gradient nor metadata."""
    inputs = random_inputs()
    results, steps = [], []
    for filling in (0.0, -3.0, 40.0):
        filled = {
            "log_probs": torch.where(inputs.mask, inputs.log_probs, filling),
            "old_log_probs": torch.where(inputs.mask, inputs.old_log_probs, -filling / 2),
        }
        _, metadata = LOSSES[loss_type](replace(inputs, **filled))
        found = [loss_and_gradient(loss_type, name, replace(inputs, **filled)) for name in LENGTH_NORMALIZATIONS]
        results.append([*found, tuple(reduce_metadata(metadata, inputs.mask).values())])
    for poison in (0.0, math.nan, math.inf):
        filled = {
            name: torch.where(inputs.mask, getattr(inputs, name), poison) for name in ("log_probs", "old_log_probs")
        }
        loss, gradient, metadata = microbatch_step(loss_type, replace(inputs, **filled))
        steps.append([(loss, gradient), tuple(metadata.values())])
    for found, expected in [(one, results[0]) for one in results[1:]] + [(one, steps[0]) for one in steps[1:]]:
        for values, expected_values in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(values, expected_values, strict=True))
    assert all((gradient[~inputs.mask] == 0).all() for _, gradient in results[0][:-1])


def check_inputs_are_kept(loss_type):
    """No input is written to."""
    for requires_grad in (False, True):  # what is written to a leaf with gradient is an error by itself
        inputs = random_inputs()
        inputs = replace(inputs, log_probs=inputs.log_probs.requires_grad_(requires_grad))
        saved = {name: value.detach().clone() for name, value in tensors_of(inputs).items()}
        losses, _ = LOSSES[loss_type](inputs)
        kept = losses.detach().clone()
        for normalize in LENGTH_NORMALIZATIONS.values():
            normalize(losses, inputs.mask, size_of(inputs))
        compute_policy_gradient_loss(inputs.log_probs, loss_type, **given_to(inputs), response_mask=inputs.mask)
        if requires_grad:
            grpo_microbatch_train_step(inputs.log_probs, inputs.mask, 2, loss_type, **given_to(inputs))
        assert torch.equal(losses, kept)
        for name, value in saved.items():
            assert torch.equal(getattr(inputs, name), value), name


class HeldFixed(TorchFunctionMode):
    """The first time remembers what a loss detaches, or computes without gradient; from then on gives the same back."""

    def __init__(self):
        super().__init__()
        self._constants, self._is_first, self._next = [], True, 0

    def __exit__(self, *error):
        super().__exit__(*error)
        self._is_first, self._next = False, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        names = (torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__)
        is_constant = function in names or not torch.is_grad_enabled()
        result = function(*args, **(kwargs or {}))
        if not is_constant or not torch.is_tensor(result):
            return result
        if self._is_first:
            self._constants.append(result)
        self._next += 1
        return self._constants[self._next - 1]


def check_finite_differences(loss_type):
    """The gradient is that of finite differences, in which what the loss detaches is a constant.

    So it holds for a loss with a stop-gradient as well. For the others nothing is held fixed but metadata.
    """
    inputs, step = random_inputs(), 1e-5
    for normalization, normalize in LENGTH_NORMALIZATIONS.items():
        _, gradient = loss_and_gradient(loss_type, normalization, inputs)
        held = HeldFixed()

        def loss_at(log_probs, normalize=normalize, held=held):
            with held:
                losses, _ = LOSSES[loss_type](replace(inputs, log_probs=log_probs.requires_grad_()))
            return normalize(losses, inputs.mask, size_of(inputs)).item()

        loss_at(inputs.log_probs.clone())
        differences = torch.zeros_like(gradient)
        for place in range(gradient.numel()):
            above, below = inputs.log_probs.clone(), inputs.log_probs.clone()
            above.view(-1)[place] += step
            below.view(-1)[place] -= step
            differences.view(-1)[place] = (loss_at(above) - loss_at(below)) / (2 * step)
        assert_close(gradient, differences, 1e-8)


def check_needs(loss_type):
    """`needs` is what the loss uses, no more and no less; what is missing is named."""
    inputs, needs = random_inputs(), LOSSES[loss_type].needs
    if needs:
        message = re.escape(f"loss_type = {loss_type} needs {' and '.join(needs)}: pass ")
        with pytest.raises(ValueError, match=message):
            compute_policy_gradient_loss(inputs.log_probs, loss_type)
    needed = {name: value for name, value in given_to(inputs).items() if name in needs}
    assert set(needed) == set(needs)
    for name in needs:
        with pytest.raises(ValueError, match=re.escape(f"loss_type = {loss_type} needs {name}: pass it")):
            compute_policy_gradient_loss(inputs.log_probs, loss_type, **(needed | {name: None}))
    only_needed = LossInputs(inputs.log_probs, inputs.mask, **needed)
    losses, _ = LOSSES[loss_type](only_needed)
    by_name, _ = compute_policy_gradient_loss(
        inputs.log_probs, loss_type, **given_to(inputs), response_mask=inputs.mask
    )
    assert torch.equal(losses, by_name)
    expected = loss_and_gradient(loss_type, "masked_mean", only_needed)
    for name, value in needed.items():
        found = loss_and_gradient(loss_type, "masked_mean", replace(only_needed, **{name: 0.5 * value}))
        assert not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"{name} is not used"


def check_options(loss_type):
    """`options` are what the loss uses if they are set, no more and no less."""
    inputs = random_inputs()
    expected, _ = LOSSES[loss_type](inputs)
    used = set()
    for name, value in {"cliprange_high": 0.5, "cliprange_dual": 1.05}.items():
        if not torch.equal(LOSSES[loss_type](replace(inputs, **{name: value}))[0], expected):
            used.add(name)
    assert used == set(LOSSES[loss_type].options)


def check_shapes(loss_type):
    """Advantages as (B,) would be spread over the tokens of a square batch without a complaint."""
    square = torch.zeros(3, 3)
    values = {"advantages": torch.ones(3), "raw_rewards": torch.ones(3), "old_log_probs": square, "cliprange": 0.2}
    with pytest.raises(TypeCheckError):  # raised by the annotations, which the tests check (see conftest.py)
        compute_policy_gradient_loss(square, loss_type, **values)
    for name in ("advantages", "raw_rewards"):  # and without that check
        message = re.escape(f"{name} is (3,): give one number per row, as (3, 1)")
        with pytest.raises(ValueError, match=message):
            unchecked = {"log_probs": square, "advantages": None, "raw_rewards": None} | {name: values[name]}
            LossInputs.__post_init__(SimpleNamespace(**unchecked))


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
CHECK_NAMES = [check.__name__.removeprefix("check_") for check in CHECKS]


@pytest.mark.parametrize("check", CHECKS, ids=CHECK_NAMES)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss(loss_type, check):
    check(loss_type)


# --- losses that are not in the table: those of a user, and wrong ones ----------------------------------------------


def cispo(inputs):
    """MiniMax 2025 (CISPO): - sg(min(rho, 1 + eps)) A log pi. Every token keeps its gradient."""
    ratio = torch.exp(inputs.log_probs - inputs.old_log_probs)
    return -ratio.clamp(max=1 + inputs.cliprange).detach() * inputs.advantages * inputs.log_probs, {}


def cispo_without_grad(inputs):
    """The same, with its stop-gradient written as a block."""
    with torch.no_grad():
        weight = torch.exp(inputs.log_probs - inputs.old_log_probs).clamp(max=1 + inputs.cliprange)
    return -weight * inputs.advantages * inputs.log_probs, {"weight": weight}


def gspo(inputs):
    """Zheng et al. 2025 (GSPO): one ratio for the whole response, the geometric mean of its tokens' ratios."""
    log_ratio = torch.where(inputs.mask, inputs.log_probs - inputs.old_log_probs, 0.0).sum(dim=-1, keepdim=True)
    ratio = torch.exp(log_ratio / inputs.mask.sum(dim=-1, keepdim=True)).expand_as(inputs.log_probs)
    clipped = ratio.clamp(1 - inputs.cliprange, 1 + inputs.cliprange)
    losses = -torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
    return losses, {"ratio_mean": ratio.detach(), "ratio_max": ratio.detach()}


def grpo_clip_of_dapo(inputs):
    """Both options of `grpo_clip`."""
    return grpo_clip(replace(inputs, cliprange_high=0.28, cliprange_dual=1.3))


NEEDS = ("advantages", "old_log_probs", "cliprange")
NEW_LOSSES = {
    "grpo_clip_of_dapo": Loss(grpo_clip_of_dapo, NEEDS, "advantages"),
    "own_cispo": Loss(cispo, NEEDS, "advantages"),
    "cispo_without_grad": Loss(cispo_without_grad, NEEDS, "advantages"),
    "gspo": Loss(gspo, NEEDS, "advantages"),
    "any row": Loss(lambda inputs: (-(inputs.advantages + 0.1) * inputs.log_probs.exp(), {}), ("advantages",)),
}


@pytest.mark.parametrize("check", CHECKS, ids=CHECK_NAMES)
@pytest.mark.parametrize("loss_type", ["own_cispo", "cispo_without_grad", "gspo", "grpo_clip_of_dapo"])
def test_a_new_loss_is_tested_by_the_same_checks(loss_type, check, monkeypatch):
    """A stop-gradient, a ratio of whole sequences, and limits that are off by default: all checks hold for them."""
    monkeypatch.setitem(LOSSES, loss_type, NEW_LOSSES[loss_type])
    check(loss_type)


def with_gradient_doubled(inputs):
    doubled = inputs.log_probs * 1.0
    if doubled.requires_grad:
        doubled.register_hook(lambda gradient: 2 * gradient)
    return -inputs.advantages * doubled, {}


def without_stop_gradient(inputs):
    ratio = torch.exp(inputs.log_probs - inputs.old_log_probs)
    return -ratio.clamp(max=1 + inputs.cliprange) * inputs.advantages * inputs.log_probs, {}


def with_the_advantages_of_the_microbatch(inputs):
    return -(inputs.advantages - inputs.advantages.mean()) * inputs.log_probs, {}


def with_padding(inputs):
    ratio = torch.exp((inputs.log_probs - inputs.old_log_probs).mean(dim=-1, keepdim=True))
    return -ratio * inputs.advantages * torch.ones_like(inputs.log_probs), {}


def with_a_write(inputs):
    return -inputs.advantages.sub_(0.0).mul_(2.0).div_(2.0).add_(1e-3) * inputs.log_probs, {}


def with_a_bonus(inputs):
    return -(inputs.advantages + 1e-6) * inputs.log_probs, {}


WRONG_LOSSES = [
    (check_finite, Loss(lambda inputs: (-inputs.advantages.log() * inputs.log_probs, {}), ("advantages",))),
    (check_results, Loss(lambda inputs: (-inputs.advantages * inputs.log_probs.sum(-1, True), {}), ("advantages",))),
    (
        check_results,
        Loss(lambda inputs: (-inputs.advantages * inputs.log_probs, {"a": inputs.log_probs}), ("advantages",)),
    ),
    (check_zero_rows, Loss(with_a_bonus, ("advantages",), "advantages")),
    (check_zero_rows, Loss(reinforce_with_baseline, ("advantages",), zero_with="raw_rewards")),
    (check_microbatches, Loss(with_the_advantages_of_the_microbatch, ("advantages",))),
    (check_ratio_of_one, Loss(without_stop_gradient, NEEDS)),
    (check_ratio_of_one, Loss(lambda inputs: (inputs.advantages * inputs.log_probs, {}), ("advantages",))),
    (check_outside_the_mask, Loss(with_padding, ("advantages", "old_log_probs"))),
    (check_inputs_are_kept, Loss(with_a_write, ("advantages",))),
    (check_finite_differences, Loss(with_gradient_doubled, ("advantages",))),
    (check_options, Loss(grpo_clip, NEEDS, options=("cliprange_high",))),
    (check_options, Loss(cispo, NEEDS, options=("cliprange_dual",))),
    (check_needs, Loss(grpo_clip, ("advantages", "old_log_probs"))),
    (check_needs, Loss(reinforce_with_baseline, ("advantages", "cliprange"))),
]


@pytest.mark.parametrize(("check", "loss"), WRONG_LOSSES)
def test_a_wrong_loss_is_found(check, loss, monkeypatch):
    """Each check finds something: the tests above would not pass whatever the loss."""
    monkeypatch.setitem(LOSSES, "wrong", loss)
    with pytest.raises((AssertionError, TypeError)):
        check("wrong")


def test_a_loss_that_may_skip_no_row_is_tested_as_well(monkeypatch):
    monkeypatch.setitem(LOSSES, "any row", NEW_LOSSES["any row"])
    for check in CHECKS:
        if check is not check_ratio_of_one:  # its gradient is not REINFORCE's
            check("any row")


# --- length normalizations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", LENGTH_NORMALIZATIONS)
def test_shares_add_up_and_rows_of_zero_loss_may_be_left_out(normalization):
    normalize, inputs = LENGTH_NORMALIZATIONS[normalization], random_inputs()
    losses, mask, size = inputs.log_probs.clone(), inputs.mask, size_of(inputs)
    losses[[1, 4]] = 0.0
    whole = normalize(losses, mask, size)
    for division in [*DIVISIONS, UNEQUAL_DIVISION, [torch.tensor([0, 2, 3, 5, 6, 7])]]:
        assert_close(sum(normalize(losses[rows], mask[rows], size) for rows in division), whole)
    assert_close(normalize(-3 * losses, mask, size), -3 * whole)  # so that loss scales and advantages pass through


@pytest.mark.parametrize("normalization", LENGTH_NORMALIZATIONS)
@pytest.mark.parametrize("poison", [0.0, 1e30, math.nan, math.inf, -math.inf])
def test_a_normalization_takes_no_notice_of_what_stands_outside_the_mask(normalization, poison):
    inputs = random_inputs()
    results = []
    for filling in (1.0, poison):
        losses = torch.where(inputs.mask, inputs.log_probs, filling).requires_grad_()
        saved = losses.detach().clone(), inputs.mask.clone()
        loss = LENGTH_NORMALIZATIONS[normalization](losses, inputs.mask, size_of(inputs))
        loss.backward()
        results.append((loss, losses.grad))
        assert torch.equal(losses.nan_to_num(), saved[0].nan_to_num()) and torch.equal(inputs.mask, saved[1])
    assert torch.equal(results[0][0], results[1][0]) and results[0][0].isfinite()
    assert torch.equal(results[0][1], results[1][1]) and results[0][1].isfinite().all()
    assert torch.equal(results[0][1] != 0, inputs.mask)


def test_cispo_counts_the_tokens_whose_weight_is_cut():
    log_probs = torch.log(torch.tensor([[1.5, 0.5, 1.1]]))
    _, metadata = compute_policy_gradient_loss(
        log_probs, "cispo", advantages=torch.ones(1, 1), old_log_probs=torch.zeros(1, 3), ratio_cap=1.2
    )
    assert metadata["ratio_capped_fraction"].tolist() == [[True, False, False]]
