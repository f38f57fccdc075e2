"""The SFT run before GRPO: found, refused, run first."""

import pytest
from tiny import REPOSITORY

from plainrl.cli import load_config
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.data import load_sft_examples
from plainrl.grading.rewards import question_only_reward_fn
from plainrl.records import UserError
from plainrl.warm_start import apply_warm_start
from SFT_train import tokenize_examples


def tiny_config(**overrides):
    return GRPOConfig(**({"compute_dtype": "float32", "max_sync_error": 1e9} | overrides))


def test_a_warm_start_is_found_by_its_path(tmp_path, capsys):
    (tmp_path / "warm" / "final").mkdir(parents=True)
    (tmp_path / "warm" / "config.yaml").write_text("model: smollm2-135m\nprompt: r1_zero\nreward: r1_zero\n")
    config = apply_warm_start(tiny_config(warm_start="warm", runs_dir=str(tmp_path)))
    assert config.model == str(tmp_path / "warm" / "final")
    assert "warm start: " in capsys.readouterr().out
    with pytest.raises(UserError, match="was trained with model = smollm2-135m, not mine; remove it"):
        apply_warm_start(tiny_config(warm_start="warm", runs_dir=str(tmp_path), model="mine"))
    with (tmp_path / "warm" / "config.yaml").open("a") as file:
        file.write("arithmetic_terms: [2, 5]\n")
    with pytest.raises(UserError, match=r"was trained with arithmetic_terms = \[2, 5\], not \[2, 4\]; remove it"):
        apply_warm_start(tiny_config(warm_start="warm", runs_dir=str(tmp_path)))


def test_a_warm_start_that_is_not_there_is_run_first(tmp_path, monkeypatch):
    commands = []

    class FakeProcess:
        def __init__(self, command):
            commands.append(command)

        def wait(self):
            return len(commands) - 1

    monkeypatch.setattr("subprocess.Popen", FakeProcess)
    config = tiny_config(warm_start="warm-start", runs_dir=str(tmp_path), model="mine")
    assert apply_warm_start(config).model == str(tmp_path / "warm-start" / "final")
    assert {"preset=warm-start", "model=mine", "prompt=r1_zero", f"runs_dir={tmp_path}"} <= set(commands[0])
    with pytest.raises(UserError, match="SFT_train.py ended with status 1"):
        apply_warm_start(config)


def test_question_only_has_a_warm_start_of_its_own(tokenizer, tmp_path, monkeypatch):
    """The child's settings resolve to the preset's own; its traces are right under its reward and end in EOS."""
    arguments = ["prompt=question_only", "reward=question_only", "warm_start=warm-start-question-only"]
    config = load_config(GRPOConfig, REPOSITORY / "grpo_train.yaml", ["preset=laptop", *arguments])
    assert config.warnings() == []
    commands = []

    class FakeProcess:
        def __init__(self, command):
            commands.append(command)

        def wait(self):
            return 0

    monkeypatch.setattr("subprocess.Popen", FakeProcess)
    config = config.model_copy(update={"runs_dir": str(tmp_path)})
    assert apply_warm_start(config).model == str(tmp_path / "warm-start-question-only" / "final")
    sft_config = load_config(SFTConfig, REPOSITORY / "config.yaml", commands[0][2:])
    assert sft_config.warnings() == []
    preset = load_config(SFTConfig, REPOSITORY / "config.yaml", ["preset=warm-start-question-only"])
    given = {"run_name": "warm-start-question-only", "runs_dir": str(tmp_path)}
    assert sft_config == preset.model_copy(update=given)
    examples = load_sft_examples(sft_config)[:200]
    assert all(example.prompt == example.question for example in examples)
    assert all(question_only_reward_fn(example.response, example.ground_truth)["reward"] == 1 for example in examples)
    rows = tokenize_examples(examples, tokenizer, sft_config)
    assert all(row.response_ids[-1] == tokenizer.eos_token_id for row in rows)
