"""The memory that training takes, estimated before loading."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import Qwen2Config

from experiments.benchmark.random_model import QWEN_SHAPE
from plainrl.cli import load_config
from plainrl.config import GRPOConfig, TrainConfig
from plainrl.devices import SMALL_GPU_BYTES, choose_preset
from plainrl.help import SCHEMAS
from plainrl.memory import (
    check_engine_share,
    check_memory,
    estimate_engine_memory,
    estimate_peaks,
    estimate_training_memory,
)
from plainrl.policy import load_policy
from plainrl.records import UserError

TRAINED = [schema for schema in SCHEMAS if issubclass(schema, TrainConfig)]
RESULTS = Path(__file__).parent.parent / "results" / "gpu" / "training_step.jsonl"


def gpu_config(**settings):
    of_both = {"policy_device": "cuda:0", "evaluator_device": "cuda:0", "gpu_memory_utilization": 0.35}
    one_gpu = {"gradient_accumulation_steps": 1, "microbatch_tokens": 4096, "max_context_tokens": 4096}
    return GRPOConfig(**(of_both | one_gpu | settings))


def load_preset(schema, name):
    return load_config(schema, RESULTS.parents[2] / SCHEMAS[schema][1], [f"preset={name}"])


def test_the_parts_are_those_worked_out_by_hand():
    """1,000 x 8 embeddings, tied; a block has 4 x 64 (+ 3 x 8 biases) of attention, 3 x 128, and norms."""
    shape = {"vocab_size": 1000, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    model = Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    num_parameters = 8000 + 2 * (4 * 64 + 3 * 8 + 3 * 128 + 2 * 8) + 8
    limits = {"microbatch_tokens": 1024, "max_context_tokens": 1024, "sampling_max_tokens": 512}
    limits |= {"evaluator_device": "cpu"}
    found = estimate_training_memory(model, gpu_config(**limits))
    longer = estimate_training_memory(model, gpu_config(**limits | {"max_context_tokens": 4096}))
    assert longer["activations"] == 4 * found["activations"], "a single row may be longer than a microbatch's limit"
    gib = {name: size * 2**30 for name, size in found.items()}
    assert gib["weights"] == gib["gradients"] == 4 * num_parameters and gib["moments"] == 8 * num_parameters
    assert gib["16-bit copies"] == 2 * num_parameters
    assert gib["activations"] == 1024 * 2 * (8 * 16 + 48 * 8)
    assert gib["logits"] == 1024 * 1000 * 4 + 12 * 2**26
    assert set(found) == {"weights", "gradients", "moments", "16-bit copies", "activations", "logits"}
    two = estimate_training_memory(model, gpu_config(**limits), num_shards=2)  # a block has 680 parameters
    assert all(two[name] == found[name] / 2 for name in ("weights", "gradients", "moments"))
    assert two["gathered"] * 2**30 == 4 * (8000 + 8 + 2 * 680) and "16-bit copies" not in two
    half = estimate_training_memory(model, gpu_config(**limits, optimizer="rmsprop"))
    assert half["moments"] == found["moments"] / 2
    wide = gpu_config(**limits, float32_output_layer=True)
    logits = estimate_training_memory(model, wide)["logits"] * 2**30
    assert logits == 1024 * 1000 * 8 + 8 * 1000 * 8 + 12 * 2**26


def test_adapters_alone_have_gradients_and_moments():
    """Worked out by hand. Matrices 8,000 + 2 x 640, vectors 2 x (24 + 16) + 8; rank 4 x 272 of in and out a block."""
    shape = {"vocab_size": 1000, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    model = Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    num_added = 2 * 4 * (4 * (8 + 8) + 3 * (8 + 16))
    assert num_added == 1088
    found = estimate_training_memory(model, gpu_config(lora_rank=4, evaluator_device="cpu"))
    gib = {name: size * 2**30 for name, size in found.items()}
    assert gib["weights"] == 2 * (8000 + 2 * 640 + 2 * (24 + 16) + 8) + 4 * num_added
    assert gib["gradients"] == 4 * num_added and gib["moments"] == 8 * num_added
    assert gib["merged layer"] == 6 * 8 * 16 and "16-bit copies" not in gib
    exact = estimate_training_memory(model, gpu_config(lora_rank=4, evaluator_device="cpu", compute_dtype="float32"))
    assert exact["weights"] * 2**30 == 4 * (8000 + 2 * 640 + 2 * (24 + 16) + 8 + num_added)
    assert exact["merged layer"] * 2**30 == 4 * 8 * 16


def phases_of(config):
    """DPO's pairs have no questions: nothing is sampled."""
    return {"training", "sampling"} if config.needs_engine else {"training"}


@pytest.mark.parametrize("schema", TRAINED)
def test_the_preset_for_small_cards_fits_24_gb_in_both_phases(schema):
    """With a quarter to spare. A card sold as 24 GB has 22.4 GiB at least. All weights trained do not fit."""
    config = load_preset(schema, "small-gpu")
    total = 24e9 / 2**30
    peaks = estimate_peaks(QWEN_SHAPE, config, total)
    assert set(peaks) == phases_of(config)
    assert all(sum(parts.values()) < 0.75 * total for parts in peaks.values())
    if config.needs_engine:
        assert peaks["sampling"]["engine"] > 3.1 + 4  # vLLM's own weights, and room for keys and values
    full = estimate_peaks(QWEN_SHAPE, config.model_copy(update={"lora_rank": 0}), total)
    assert all(sum(parts.values()) > total for parts in full.values())


def test_the_estimate_is_near_what_an_h200_measured():
    """From 5 % less to 15 % more. Too much is the safe side. The H200 still kept residuals in float32."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    updates = [row for row in rows if row.get("part") == "GRPO update"]
    assert len(updates) == 2
    for row in updates:
        keys = {key: row[key] for key in ("microbatch_tokens", "gradient_checkpointing")}
        estimate = sum(estimate_training_memory(QWEN_SHAPE, gpu_config(**keys, evaluator_device="cpu")).values())
        assert 0.95 * row["peak_gib"] < estimate < 1.15 * row["peak_gib"], keys


@pytest.mark.parametrize(
    ("total", "settings", "outcome"),
    [
        (80, {}, "fits"),
        (44, {}, "warning: cuda:0 has 44.0 GiB, and training takes about"),
        (48, {"gradient_checkpointing": True, "microbatch_tokens": 8192}, "fits"),
        (22, {"gradient_checkpointing": True}, UserError),  # 23 GiB of weights, gradients and moments
        (23.7, {"gradient_checkpointing": True}, UserError),  # 26 with the copy in 16 bits
        (40, {"gpu_memory_utilization": 0.85, "gradient_checkpointing": True}, UserError),
    ],
)
def test_a_card_that_is_too_small_is_found_before_loading(monkeypatch, capsys, total, settings, outcome):
    card = SimpleNamespace(total_memory=total * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: card)
    if outcome is UserError:
        with pytest.raises(
            UserError, match=r"cuda:0 has .* GiB, and .* microbatch_tokens .*gradient_checkpointing=true"
        ):
            check_memory(QWEN_SHAPE, gpu_config(**settings))
    else:
        check_memory(QWEN_SHAPE, gpu_config(**settings))
        printed = capsys.readouterr().out
        assert printed == "" if outcome == "fits" else printed.startswith(outcome)


@pytest.mark.parametrize("schema", TRAINED)
def test_one_gpu_fits_the_smallest_card_that_auto_takes_it_for(schema):
    """In both phases, by estimate. Such a card holds what the engine needs at least, too."""
    config, total = load_preset(schema, "one-gpu"), SMALL_GPU_BYTES / 2**30
    peaks = estimate_peaks(QWEN_SHAPE, config, total)
    assert set(peaks) == phases_of(config)
    assert all(sum(parts.values()) < total for parts in peaks.values())
    check_engine_share(QWEN_SHAPE, config, total)


@pytest.mark.parametrize(
    ("settings", "num_bytes"), [({}, 2), ({"engine_dtype": "float32"}, 4), ({"engine_tensor_parallel": 2}, 1)]
)
def test_the_engines_share_holds_its_weights_and_a_context(settings, num_bytes):
    """1,000 x 8 embeddings, tied; blocks of 680. A token has 2 x 2 blocks x 1 head x 4 numbers of keys and values."""
    shape = {"vocab_size": 1000, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    model = Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    num_parameters = 8000 + 2 * (680 - 2 * (4 * 8 + 4)) + 8  # keys and values have one head of two
    config = gpu_config(policy_device="cuda:1", gpu_memory_utilization=0.85, engine_dtype="bfloat16")
    config = config.model_copy(update=settings)
    found = {name: size * 2**30 for name, size in estimate_engine_memory(model, config).items()}
    assert found == {"weights": num_bytes * num_parameters, "a context": num_bytes * 16 * 4096}


def test_the_guides_table_of_cards_is_what_is_calculated(monkeypatch):
    """Each row: the preset that auto takes, and the memory of a card, of training and of sampling."""
    guide = (RESULTS.parents[2] / "docs/gpu.md").read_text()
    pattern = r"^\| (one|two) of (\d+) GB \| `([\w-]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)( on the other card)? \|$"
    rows = re.findall(pattern, guide, re.M)
    assert len(rows) == 7
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for number, size, preset, *figures, is_elsewhere in rows:
        card, num_cards = SimpleNamespace(total_memory=int(size) * 1e9), 1 + (number == "two")
        monkeypatch.setattr("torch.cuda.device_count", lambda num_cards=num_cards: num_cards)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda device, card=card: card)
        assert choose_preset()[0] == preset
        config, total = load_preset(GRPOConfig, preset), card.total_memory / 2**30
        peaks = {phase: sum(parts.values()) for phase, parts in estimate_peaks(QWEN_SHAPE, config, total).items()}
        sampling = config.gpu_memory_utilization * total if is_elsewhere else peaks["sampling"]
        assert [f"{size:.1f}" for size in (total, peaks["training"], sampling)] == figures
        assert bool(is_elsewhere) == (not config.shares_gpu) and max(peaks.values()) < total


def test_an_engine_whose_share_is_too_small_is_found_before_loading(monkeypatch):
    """On a card of its own, as in preset two-gpu, and on that of the policy. 1.54 billion weights take 2.9 GiB."""
    sizes = {"cuda:0": 3.4, "cuda:1": 80.0}
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=sizes[device] * 2**30)
    )
    config = load_preset(GRPOConfig, "two-gpu")
    with pytest.raises(
        UserError, match=r"^gpu_memory_utilization = 0.85: that is 2.9 of the 3.4 GiB of cuda:0, .* weights 2.9, a con"
    ):
        check_memory(QWEN_SHAPE, config)
    sizes["cuda:0"] = 3.8
    check_memory(QWEN_SHAPE, config)
    sizes["cuda:0"] = 80.0
    with pytest.raises(UserError, match=r"^gpu_memory_utilization = 0.03: that is 2.4 of the 80.0 GiB of cuda:0"):
        check_memory(QWEN_SHAPE, gpu_config(gpu_memory_utilization=0.03, engine_dtype="bfloat16"))


def test_memory_is_compared_before_any_weight_is_loaded(tiny_model_folder, monkeypatch):
    """For training, and by `load_policy`. Without training it is not compared, so that loading begins."""

    def fail(*_):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("plainrl.policy.make_empty_model", fail)
    monkeypatch.setattr("plainrl.policy.load_weights", fail)
    card = SimpleNamespace(total_memory=2**20)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: card)
    config = gpu_config(model=tiny_model_folder, max_context_tokens=384, sampling_max_tokens=16, evaluator_device="cpu")
    with pytest.raises(UserError, match=r"^cuda:0 has 0.0 GiB, and training takes about"):
        load_policy(config)
    with pytest.raises(AssertionError, match="weights are loaded"):
        load_policy(config, for_training=False)


def test_on_a_cpu_nothing_is_looked_at():
    check_memory(QWEN_SHAPE, gpu_config(policy_device="cpu", evaluator_device="cpu"))
