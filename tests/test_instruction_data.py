"""Packed instruction data: the assertions of the official test_data.py on a stand-in, and nothing lost or doubled."""

import gzip
import json
import math
from collections import Counter

import pytest
import torch
from adapters import get_packed_sft_dataset, run_iterate_batches
from tiny import write_lines
from transformers import PreTrainedTokenizerFast

from plainrl.records import UserError
from SFT_helper import pack_documents
from supplement.DPO_helper import fill_alpaca
from supplement.instruction_data import PackedDataset, iterate_batches

RECORDS = [{"prompt": f"Say {index} times {index}.", "response": f"{index * index}, I say."} for index in range(12)]
BOS, EOS = "<bos>", "<eos>"


@pytest.fixture(scope="module")
def with_bos(tiny_model_folder):
    """A tokenizer that begins each text with BOS, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model_folder, bos_token=BOS)
    template = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer.encode("")[0] == tokenizer.bos_token_id
    return tokenizer


@pytest.fixture
def path(tmp_path):
    return write_lines(tmp_path / "instructions.jsonl", RECORDS)


def as_lists(dataset):
    return [{name: values.tolist() for name, values in dataset[index].items()} for index in range(len(dataset))]


def test_the_official_assertions(path, with_bos):
    """What test_packed_sft_dataset compares: unshuffled rows are the joined documents, shuffled ones are others."""
    text = "".join(f"{BOS}{fill_alpaca(r['prompt'])}{r['response']}{EOS}" for r in RECORDS)
    expected = with_bos.encode(text, add_special_tokens=False)
    dataset = get_packed_sft_dataset(tokenizer=with_bos, dataset_path=path, seq_length=32, shuffle=False)
    assert len(dataset) == (len(expected) - 1) // 32
    rows = as_lists(dataset)
    for index, row in enumerate(rows):
        assert row["input_ids"] == expected[32 * index : 32 * index + 32]
        assert row["labels"] == expected[32 * index + 1 : 32 * index + 33]
    shuffled = get_packed_sft_dataset(tokenizer=with_bos, dataset_path=path, seq_length=32, shuffle=True)
    assert as_lists(shuffled) != rows


def test_the_official_assertions_on_batches(path, with_bos):
    dataset = get_packed_sft_dataset(tokenizer=with_bos, dataset_path=path, seq_length=32, shuffle=True)
    batches = run_iterate_batches(dataset=dataset, batch_size=8, shuffle=True)
    assert len(batches) == math.ceil(len(dataset) / 8) > 2
    sizes = []
    for batch in batches:
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["input_ids"].shape == batch["labels"].shape == (len(batch["labels"]), 32)
        sizes.append(len(batch["labels"]))
    assert sizes == [8] * (len(dataset) // 8) + [len(dataset) % 8]


def test_documents_are_shuffled_whole(path, with_bos):
    """Every document is there once, and none is cut in two by another."""
    dataset = PackedDataset(with_bos, path, 1, shuffle=True)
    first = dataset[0]["input_ids"].tolist()
    text = with_bos.decode([*first, *(dataset[index]["labels"].item() for index in range(len(dataset)))])
    documents = [f"{BOS}{fill_alpaca(r['prompt'])}{r['response']}" for r in RECORDS]
    assert Counter(text.removesuffix(EOS).split(EOS)) == Counter(documents)
    assert text.removesuffix(EOS).split(EOS) != documents


def test_a_tokenizer_without_bos_joins_by_eos_alone(path, tokenizer):
    dataset = PackedDataset(tokenizer, path, 1, shuffle=False)
    ids = [dataset[0]["input_ids"].item(), *(dataset[index]["labels"].item() for index in range(len(dataset)))]
    assert tokenizer.decode(ids) == "".join(f"{fill_alpaca(r['prompt'])}{r['response']}{EOS}" for r in RECORDS)


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_rows_by_hand(num_tokens, num_rows):
    """The handout: tokens 0 to 10 in rows of 4 are two rows. A row has a label for each of its inputs."""
    rows = pack_documents([list(range(num_tokens))], seq_length=4)
    assert rows == [list(range(4 * index, 4 * index + 5)) for index in range(num_rows)]


def test_every_epoch_is_each_row_once_in_another_order(path, with_bos):
    dataset = PackedDataset(with_bos, path, 16, shuffle=False)
    batches = iterate_batches(dataset, 4, shuffle=True)
    expected = [tuple(row["input_ids"]) for row in as_lists(dataset)]
    epochs = [[tuple(row) for batch in batches for row in batch["input_ids"].tolist()] for _ in range(2)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(expected) and epoch != expected
    assert epochs[0] != epochs[1]
    again = [tuple(row) for batch in iterate_batches(dataset, 4, True) for row in batch["input_ids"].tolist()]
    assert again == epochs[0]  # the seed decides
    in_order = [tuple(row) for batch in iterate_batches(dataset, 4, False) for row in batch["input_ids"].tolist()]
    assert in_order == expected


def test_gzipped_data_are_the_same(path, with_bos, tmp_path):
    packed = tmp_path / "instructions.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in RECORDS).encode()))
    assert as_lists(PackedDataset(with_bos, packed, 32, False)) == as_lists(PackedDataset(with_bos, path, 32, False))


def test_mistakes_are_named(with_bos, tmp_path):
    questions = write_lines(tmp_path / "questions.jsonl", [{"question": "q", "answer": "1 #### 1"}])
    with pytest.raises(UserError, match=r"questions\.jsonl, line 1: .* instruction data have prompt and response"):
        PackedDataset(with_bos, questions, 8, False)
    with pytest.raises(UserError, match=r"line 1: prompt or response is empty; instruction data have"):
        PackedDataset(with_bos, write_lines(tmp_path / "empty.jsonl", [{"prompt": "p", "response": ""}]), 8, False)
    with pytest.raises(UserError, match=r"has \d+ tokens, and a row takes seq_length \+ 1 = 5001; lower seq_length"):
        PackedDataset(with_bos, write_lines(tmp_path / "short.jsonl", RECORDS[:1]), 5000, False)
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"prompt": "p", "response": "r"}\n' * 99)[:-9])
    with pytest.raises(UserError, match=r"damaged\.jsonl\.gz is a damaged gzip file \(.+\); copy it again"):
        PackedDataset(with_bos, damaged, 8, False)
    with pytest.raises(ValueError, match="seq_length = 0: must be at least 1"):
        pack_documents([[1, 2]], 0)
