"""The SFT mathematics against constants worked by hand, tight to 1e-6 where arithmetic allows."""

import math

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from SFT_helper import (
    LENGTH_NORMALIZATIONS,
    SFTStepSize,
    compute_entropy,
    encode_prompt,
    get_response_log_probs,
    join_prompt_and_response_ids,
    masked_normalize,
    pad_token_id,
    sft_loss,
    sft_microbatch_train_step,
    tokenize_prompt_and_output,
)


class FakeTokenizer:
    """Characters as tokens, with a configurable BOS, EOS and PAD, as tokenizers of several families behave."""

    __class__ = PreTrainedTokenizerBase  # what isinstance asks for

    def __init__(self, bos_token_id=None, eos_token_id=2, pad_token_id=None, adds_bos=False, adds_eos=False):
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.adds_bos, self.adds_eos = adds_bos, adds_eos

    def encode(self, text, add_special_tokens=True):
        ids = [self.bos_token_id] if text.startswith("<s>") else []
        ids += [ord(character) for character in text.removeprefix("<s>")]
        if add_special_tokens:
            ids = [self.bos_token_id] * self.adds_bos + ids + [self.eos_token_id] * self.adds_eos
        return ids


def test_tokenize_joins_shifts_and_masks():
    batch = tokenize_prompt_and_output(["ab", "c"], ["d", "efg"], FakeTokenizer())
    a, b, c, d, e, f, g = map(ord, "abcdefg")
    assert batch["input_ids"].tolist() == [[a, b, d], [c, e, f]]
    assert batch["labels"].tolist() == [[b, d, 2], [e, f, g]]
    assert batch["response_mask"].tolist() == [[False, True, False], [True, True, True]]


def test_mask_covers_exactly_the_output_tokens(tokenizer):
    prompts, outputs = ["What is 1 + 2?", "x"], [" 1 + 2 = 3. </think> <answer> 3 </answer>", " y"]
    batch = tokenize_prompt_and_output(prompts, outputs, tokenizer)
    for row, output in enumerate(outputs):
        masked = batch["labels"][row][batch["response_mask"][row]].tolist()
        assert masked == tokenizer.encode(output, add_special_tokens=False)
        assert tokenizer.decode(masked) == output


def test_the_text_of_a_special_token_is_that_token(tokenizer):
    """In questions and responses of data alike, as everywhere in Transformers."""
    ids = encode_prompt("a<eos>b", tokenizer)
    assert ids == [*encode_prompt("a", tokenizer), tokenizer.eos_token_id, *encode_prompt("b", tokenizer)]


def test_prompt_has_exactly_one_bos_and_no_eos():
    adding = FakeTokenizer(bos_token_id=1, adds_bos=True, adds_eos=True)
    assert encode_prompt("a", adding) == [1, ord("a")]
    assert encode_prompt("<s>a", adding) == [1, ord("a")]
    assert encode_prompt("a", FakeTokenizer(bos_token_id=1)) == [ord("a")]
    assert encode_prompt("a", FakeTokenizer()) == [ord("a")]


def test_padding_falls_back_to_eos():
    assert pad_token_id(FakeTokenizer(pad_token_id=0)) == 0
    assert pad_token_id(FakeTokenizer(eos_token_id=7)) == 7
    with pytest.raises(ValueError, match="pad_token"):
        pad_token_id(FakeTokenizer(eos_token_id=None))


def test_tokenize_refuses_bad_input():
    with pytest.raises(ValueError, match="2 and output_strs 1"):
        tokenize_prompt_and_output(["a", "b"], ["c"], FakeTokenizer())
    with pytest.raises(ValueError, match="at least one"):
        tokenize_prompt_and_output([], [], FakeTokenizer())
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        tokenize_prompt_and_output(["a", ""], ["c", "d"], FakeTokenizer())


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(0.5), math.log(0.25), math.log(0.25), -math.inf]])
    expected = torch.tensor([math.log(4), 1.5 * math.log(2)])
    torch.testing.assert_close(compute_entropy(logits), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(compute_entropy(logits + 5.0), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_entropy_is_finite_at_extremes(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [-math.inf, 0.0, -math.inf]], dtype=dtype)
    entropy = compute_entropy(logits)
    assert entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(entropy.double(), torch.tensor([0.0, math.log(3), 0.0]).double(), atol=1e-6, rtol=0)


def test_entropy_gradient_is_finite_with_impossible_tokens():
    logits = torch.tensor([0.0, 1.0, -math.inf], requires_grad=True)
    compute_entropy(logits).backward()
    assert torch.isfinite(logits.grad).all()


class ConstantLogits(torch.nn.Module):
    """A model whose logits are given, whatever the input."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, use_cache):
        return self


def test_log_probs_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0]]])
    scores = get_response_log_probs(ConstantLogits(logits), torch.tensor([[0, 1]]), torch.tensor([[1, 1]]), True)
    expected = torch.tensor([[math.log(0.75), math.log(0.2)]])
    torch.testing.assert_close(scores["log_probs"], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(scores["token_entropy"], compute_entropy(logits))
    assert set(get_response_log_probs(ConstantLogits(logits), torch.tensor([[0, 1]]), torch.tensor([[1, 1]]))) == {
        "log_probs"
    }


@pytest.mark.parametrize("autocasts", [False, True])
def test_bfloat16_logits_are_scored_in_float32(autocasts):
    """Also under autocast, which makes products bfloat16. These would be wrong by 1e-2."""
    logits = torch.randn(1, 2, 50_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[..., 7] = -torch.inf
    labels = torch.tensor([[3, 4]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocasts):
        scores = get_response_log_probs(ConstantLogits(logits), labels, labels, return_token_entropy=True)
    expected = logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(scores["log_probs"].double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores["token_entropy"].double(), compute_entropy(logits.double()), atol=1e-4, rtol=0)


def test_masked_normalize_by_hand():
    tensor = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert masked_normalize(tensor, mask, 2.0).item() == pytest.approx(5.0, abs=1e-6)
    assert masked_normalize(tensor, mask, 2.0, dim=0).tolist() == pytest.approx([0.5, 0.0, 4.5], abs=1e-6)
    assert masked_normalize(tensor, mask, 2.0, dim=-1).tolist() == pytest.approx([2.0, 3.0], abs=1e-6)
    assert masked_normalize(tensor, mask.long(), 2.0, dim=1).tolist() == pytest.approx([2.0, 3.0], abs=1e-6)


def test_masked_normalize_refuses_bad_input():
    with pytest.raises(ValueError, match="same shape"):
        masked_normalize(torch.ones(2, 3), torch.ones(3, dtype=torch.bool), 1.0)
    with pytest.raises(ValueError, match="normalize_constant = 0"):
        masked_normalize(torch.ones(2), torch.ones(2, dtype=torch.bool), 0.0)


def test_sft_step_by_hand():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, True, False]])
    loss, metadata = sft_microbatch_train_step(log_probs, mask, gradient_accumulation_steps=4, normalize_constant=2.0)
    # rows: -(-1 - 2) / 2 = 1.5 and 5 / 2 = 2.5; mean 2; a fourth of it
    assert loss.item() == pytest.approx(0.5, abs=1e-6)
    # each masked element: -1 / (2 rows * 4 steps * constant 2)
    assert log_probs.grad.tolist() == [[-0.0625, -0.0625, 0.0], [0.0, -0.0625, 0.0]]
    assert metadata["sum_log_prob"].item() == pytest.approx(-8.0, abs=1e-6)
    assert metadata["num_response_tokens"].item() == 3
    with pytest.raises(ValueError, match="gradient_accumulation_steps = 0"):
        sft_microbatch_train_step(log_probs, mask, 0)


@pytest.mark.parametrize("poison", [0.0, 1e30, math.nan, math.inf, -math.inf])
def test_what_stands_outside_the_mask_changes_nothing(poison):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3, 7, generator=generator)
    mask = torch.rand(3, 7, generator=generator) > 0.4
    results = []
    for filling in (1.0, poison):
        log_probs = torch.where(mask, values, torch.full_like(values, filling)).requires_grad_()
        loss, _ = sft_microbatch_train_step(log_probs, mask, 2, 3.0)
        results.append((loss, log_probs.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_accumulated_gradient_equals_that_of_the_whole_batch():
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(8, 5, generator=generator) > 0.3
    gradients = []
    for num_microbatches in (1, 2, 4, 8):
        log_probs = values.clone().requires_grad_()
        for rows, row_mask in zip(log_probs.chunk(num_microbatches), mask.chunk(num_microbatches), strict=True):
            sft_microbatch_train_step(rows, row_mask, num_microbatches, 3.0)
        gradients.append(log_probs.grad)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", LENGTH_NORMALIZATIONS)
@pytest.mark.parametrize(
    "division", [[[0, 1, 2, 3, 4, 5, 6, 7]], [[5, 2], [7, 0, 1, 6, 3], [4]], [[3, 2, 1, 0], [4, 5, 6, 7]]]
)
def test_every_length_normalization_gives_shares_that_add_up(name, division):
    """Value and gradient by hand. One microbatch of one row has no response token at all."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(8, 5, generator=generator) > 0.3
    mask[4] = False
    num_tokens = int(mask.sum())
    divisor = {"sum": 3.0 * 8, "token_mean": num_tokens}[name]
    log_probs, size = values.clone().requires_grad_(), SFTStepSize(8, num_tokens, 3.0)
    shares = [LENGTH_NORMALIZATIONS[name].loss(log_probs[rows], mask[rows], size) for rows in division]
    sum(shares).backward()
    assert sum(shares).item() == pytest.approx(-(values * mask).sum().item() / divisor, abs=1e-12)
    torch.testing.assert_close(log_probs.grad, -mask.double() / divisor, atol=1e-12, rtol=0)


def test_the_sum_is_the_assignments_loss_bit_for_bit():
    log_probs, mask = torch.randn(4, 6), torch.rand(4, 6) > 0.4
    found = LENGTH_NORMALIZATIONS["sum"].loss(log_probs, mask, SFTStepSize(8, 99, 3.0))
    assert torch.equal(found, sft_loss(log_probs, mask, 3.0, num_step_rows=8))
    assert torch.equal(found, sft_microbatch_train_step(log_probs.requires_grad_(), mask, 2, 3.0)[0])


def test_helpers_leave_their_inputs_alone(tiny_model, tokenizer):
    """Every helper, called on the tensors themselves: none is written to."""
    logits, tensor = torch.randn(2, 3, 4), torch.randn(2, 3, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    batch = join_prompt_and_response_ids([[5, 6, 7], [8]], [[20, 21], [22, 23]], padding_id=0)
    inputs = {"logits": logits, "tensor": tensor, "mask": mask, **batch}
    copies = {name: value.detach().clone() for name, value in inputs.items()}
    weights = [parameter.detach().clone() for parameter in tiny_model.parameters()]
    compute_entropy(logits)
    masked_normalize(tensor, mask, 2.0, dim=1)
    sft_loss(tensor, mask, 2.0, 4)
    sft_microbatch_train_step(tensor, mask, 1)
    get_response_log_probs(ConstantLogits(logits), torch.zeros(2, 3).long(), torch.ones(2, 3).long(), True)
    get_response_log_probs(tiny_model, batch["input_ids"], batch["labels"], return_token_entropy=True)
    for name, value in inputs.items():
        assert torch.equal(value, copies[name]), name
    assert all(torch.equal(a, b) for a, b in zip(weights, tiny_model.parameters(), strict=True))
    prompts, outputs = ["a", "b"], ["c", "d"]
    tokenize_prompt_and_output(prompts, outputs, tokenizer)
    assert (prompts, outputs) == (["a", "b"], ["c", "d"])
