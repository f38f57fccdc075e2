"""The benchmark of a training step: a tiny model on the CPU, its count of operations by hand, its made-up rows."""

import json

import pytest
from transformers import AutoModelForCausalLM

from experiments.benchmark import training_step
from experiments.benchmark.training_step import SHAPES, count_work, load_settings, main, make_inputs
from plainrl.records import UserError

TINY = [
    *("device=cpu", "shape=tiny", "num_repetitions=1", "rollout_batch_size=16", "train_batch_size=16", "group_size=4"),
    *("sft_batch_size=8", "microbatch_tokens=64", "large_microbatch_tokens=160", "template_tokens=10"),
    *("question_tokens=[3,7]", "response_tokens=[5,16,40]", "trace_tokens=[5,24,60]"),
    *("sampling_max_tokens=64", "gradient_accumulation_steps=1", "gradient_checkpointing=false"),
]


def test_each_part_is_measured_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training_step, "matmul_peak", lambda device: 0.5)  # measuring it takes seconds
    main([*TINY, f"results={tmp_path}/folder/rows.jsonl"])
    description, *rows = [json.loads(line) for line in (tmp_path / "folder/rows.jsonl").read_text().splitlines()]
    assert [(row["part"], row["microbatch_tokens"], row["gradient_checkpointing"]) for row in rows] == [
        ("GRPO update", 64, False),
        ("old log-probs", 0, False),
        ("GRPO update", 160, True),
        ("SFT step", 16384, True),  # as the preset has it
        ("SFT step", 160, True),
    ]
    assert description["device"] == "cpu" and description["matmul_tflop_per_second"] == 0.5
    assert description["response_tokens"] == [5, 16, 40] and description["preset"] == "one-gpu"
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["row_tokens"] / row["seconds"])
        assert row["mfu"] == pytest.approx(row["tflop"] / row["seconds"] / 0.5)
        assert 0 < row["nodes"] < row["row_tokens"] and row["peak_gib"] > 0
    few, old, many, *_ = rows
    assert many["microbatches"] < few["microbatches"] and many["row_tokens"] == few["row_tokens"] < old["row_tokens"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)


def test_operations_are_those_counted_by_hand():
    policy = AutoModelForCausalLM.from_config(SHAPES["tiny"])
    # Two rows of 2 prompt tokens and 1 response token: both share the 2 nodes, the first sees 1 node, the second 2.
    work = count_work(policy, [([1, 2], [3]), ([1, 2], [4])], max_rows=2, max_tokens=0)
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # 2 layers: queries and output, keys and values, the MLP
    forward = 2 * 2 * weights + 4 * 2 * 64 * (1 + 2) + 2 * 2 * 64 * 512  # weights, attention, the output layer
    assert work == (6, 2, 1, pytest.approx(3 * forward / 1e12))
    apart = count_work(policy, [([1, 2], [3]), ([1, 2], [4])], max_rows=1, max_tokens=0, is_training=False)
    assert apart == (6, 4, 2, pytest.approx((forward + 2 * 2 * weights + 4 * 2 * 64 * 3) / 1e12))


def test_rollouts_have_the_stated_lengths_and_advantages():
    config, _ = load_settings(TINY)
    rollouts, examples = make_inputs(config)
    lengths = [len(row.response.token_ids) for row in rollouts]
    assert sum(lengths) / 16 == pytest.approx(16, abs=0.5) and min(lengths) >= 5 and max(lengths) <= 40
    assert [row.advantage for row in rollouts] == [1, -1] * 4 + [0] * 8  # 60 % of 4 groups are 2
    assert all(13 <= len(row.prompt_ids) <= 17 for row in examples) and len(examples) == 8
    assert make_inputs(config) == (rollouts, examples)


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="device = cuda:1: there is no such device"):
        load_settings([*TINY[1:], "device=cuda:1"])
