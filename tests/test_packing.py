"""SFT on all tokens and on packed rows: loss_on, packing, fill_prompts."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny import REPOSITORY, tiny_arguments, write_lines

import SFT_train
from plainrl.cli import load_config
from plainrl.config import SFTConfig
from plainrl.data import load_sft_examples
from plainrl.records import UserError
from supplement.DPO_helper import fill_alpaca
from supplement.instruction_data import PackedDataset

RECORDS = [{"prompt": f"Say {index} twice.", "response": f"{index} {index}"} for index in range(9)]
SETTINGS = {
    "prompt": "alpaca",
    "fill_prompts": True,
    "loss_on": "all",
    "packing": "fixed",
    "seq_length": 24,
    "length_normalization": "token_mean",
    "stop_string": "",
    "num_sft_examples": "all",
}


@pytest.fixture
def path(tmp_path):
    return write_lines(tmp_path / "instructions.jsonl", RECORDS)


def config_of(path, **overrides):
    arguments = tiny_arguments("", "", **(SETTINGS | {"train_data": path} | overrides))
    return load_config(SFTConfig, REPOSITORY / "config.yaml", arguments)


def rows_of(path, tokenizer, **overrides):
    config = config_of(path, **overrides)
    return SFT_train.tokenize_examples(load_sft_examples(config), tokenizer, config)


def test_packed_rows_are_those_of_the_packed_data_set(path, tokenizer, capsys):
    """SFT_train.py and the supplement's PackedDataset have the same rows, unshuffled."""
    rows, dataset = rows_of(path, tokenizer), PackedDataset(tokenizer, path, 24, shuffle=False)
    assert len(rows) == len(dataset) > 3
    for row, expected in zip(rows, (dataset[index] for index in range(len(dataset))), strict=True):
        assert row.prompt_ids == expected["input_ids"][:1].tolist()
        assert row.response_ids == expected["labels"].tolist()
    assert rows[1].example.source == f"packed row 2 of {path}"
    num_tokens = sum(len(tokenizer.encode(fill_alpaca(r["prompt"]) + r["response"])) + 1 for r in RECORDS)
    assert f"packing: 9 examples of {num_tokens} tokens in {len(rows)} rows of 24" in capsys.readouterr().out


def test_the_loss_on_packed_rows_is_the_cross_entropy(path, tokenizer, tiny_model):
    """Of every label: loss and gradient as the handout computes them."""
    config = config_of(path)
    rows = SFT_train.tokenize_examples(load_sft_examples(config), tokenizer, config)[:4]
    batch = torch.tensor([row.prompt_ids + row.response_ids for row in rows])
    expected = F.cross_entropy(tiny_model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
    expected.backward()
    gradient = torch.cat([part.grad.flatten() for part in tiny_model.parameters()])
    tiny_model.zero_grad()
    metrics = SFT_train.accumulate_gradients(tiny_model, rows, 0, config)
    assert metrics["train/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["train/num_response_tokens"] == 4 * 24
    own = torch.cat([part.grad.flatten() for part in tiny_model.parameters()])
    assert (own - gradient).norm() < 1e-5 * gradient.norm()


def test_the_loss_on_all_tokens_leaves_out_the_first_alone(path, tokenizer):
    rows, plain = (rows_of(path, tokenizer, packing="none", loss_on=kind) for kind in ("all", "response"))
    for row, other in zip(rows, plain, strict=True):
        assert len(row.prompt_ids) == 1 < len(other.prompt_ids)
        assert row.prompt_ids + row.response_ids == other.prompt_ids + other.response_ids
        assert tokenizer.decode(other.prompt_ids) == fill_alpaca(row.example.question)


def test_each_packed_document_ends_in_eos(tmp_path, tokenizer):
    """Also where its response ends in the stop string, which unpacked is ending enough."""
    records = [record | {"response": "3 </answer>"} for record in RECORDS]
    where = write_lines(tmp_path / "stopped.jsonl", records)
    packed = rows_of(where, tokenizer, stop_string="</answer>", seq_length=1)
    ids = [packed[0].prompt_ids[0], *(row.response_ids[0] for row in packed)]
    assert tokenizer.decode(ids).count("3 </answer><eos>") == 9
    alone = rows_of(where, tokenizer, stop_string="</answer>", packing="none", loss_on="response")
    assert all(row.response_ids[-1] != tokenizer.eos_token_id for row in alone)


def test_without_fill_prompts_a_prompt_is_written_out_already(path, tokenizer):
    (row, *_) = rows_of(path, tokenizer, fill_prompts=False, packing="none", loss_on="response")
    assert tokenizer.decode(row.prompt_ids) == "Say 0 twice."


def test_settings_that_do_not_fit_are_refused(path, tokenizer, tmp_path):
    with pytest.raises(UserError, match="packing = fixed with loss_on = response: .* use loss_on = all"):
        config_of(path, loss_on="response")
    with pytest.raises(UserError, match="seq_length = 384 is not below max_context_tokens = 384"):
        config_of(path, seq_length=384)
    with pytest.raises(UserError, match=r"seq_length = 300: all examples have \d+ tokens; lower it"):
        rows_of(write_lines(tmp_path / "one.jsonl", RECORDS[:1]), tokenizer, seq_length=300)


def test_a_row_length_without_packing_is_said(path):
    assert "seq_length = 24 has no effect with packing = none" in config_of(path, packing="none").warnings()
