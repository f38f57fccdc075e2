"""Instruction data: pairs of an instruction and a response, as documents of the Alpaca template, packed into rows.

    document    BOS, if the tokenizer adds it, template with instruction and response, EOS
    row i       tokens i m to (i + 1) m - 1 of all documents joined; labels: the token after each. m: seq_length

Every token of the joined documents but the first is a label exactly once, up to the end of the last whole row.

Source: Stanford CS336 (Spring 2025), supplement of Assignment 5, section 3.2.1.
"""

import os
import random
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from plainrl.layouts import parse_record
from plainrl.records import UserError
from plainrl.sources import read_records
from SFT_helper import encode_prompt, pack_documents
from supplement.DPO_helper import fill_alpaca


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Instruction data as rows of `seq_length` tokens for language modeling."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dataset_path: str | os.PathLike[str],
        seq_length: int,
        shuffle: bool,
        seed: int = 0,
    ) -> None:
        """Read, tokenize and pack.

        Args:
            tokenizer: with an EOS token, which ends each document.
            dataset_path: a file of records {"prompt", "response"}, as plainrl/sources.py reads them: JSON lines, which
                may be gzipped, a JSON array, or Parquet.
            seq_length: m, tokens of a row.
            shuffle: whether the documents are put into a random order before they are packed.
            seed: decides that order.

        Raises:
            UserError: the file cannot be read, a record lacks a field, or there are too few tokens for one row.
        """
        path = os.fspath(dataset_path)
        documents = read_documents(path, tokenizer)
        if shuffle:
            random.Random(seed).shuffle(documents)
        self._rows = pack_documents(documents, seq_length)
        if not self._rows:
            num_tokens = sum(map(len, documents))
            raise UserError(
                f"{path} has {num_tokens} tokens, and a row takes seq_length + 1 = {seq_length + 1}; lower seq_length"
            )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids` and `labels` of a row, each (seq_length,) int64."""
        row = torch.tensor(self._rows[index])
        return {"input_ids": row[:-1], "labels": row[1:]}


def read_documents(path: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of each instruction and response of a file, as documents that end in EOS."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, which ends a document: set tokenizer.eos_token")
    documents = []
    for values, where in read_records(path):
        record = parse_record(values, where)
        if record.prompt is None or record.response is None:
            has_both = values.keys() >= {"prompt", "response"}
            problem = "prompt or response is empty" if has_both else f"fields {sorted(values)}"
            raise UserError(f"{where}: {problem}; instruction data have prompt and response")
        text = fill_alpaca(record.prompt) + record.response
        documents.append([*encode_prompt(text, tokenizer), cast(int, tokenizer.eos_token_id)])
    return documents


def iterate_batches(
    dataset: Dataset[dict[str, Tensor]], batch_size: int, shuffle: bool, seed: int = 0
) -> DataLoader[dict[str, Tensor]]:
    """Return batches of a data set. To iterate over them is one epoch, and its last batch may be smaller.

    Args:
        dataset: with examples of equal length, as `PackedDataset`.
        batch_size: examples per batch.
        shuffle: whether the examples come in a random order, another one in each epoch.
        seed: decides these orders.
    """
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, generator=generator)
