"""`--help` by group, one key explained, and the page that is generated from the same."""

import subprocess
import sys

import pytest
from tiny import REPOSITORY

from plainrl.cli import load_config, read_yaml
from plainrl.config import GRPOConfig, SFTConfig
from plainrl.devices import run_command
from plainrl.help import GROUPS, SCHEMAS, configuration_page, explain, help_text, keys_by_group
from plainrl.records import UserError

GRPO_YAML = REPOSITORY / "grpo_train.yaml"


def test_every_key_stands_in_exactly_one_group():
    grouped = [key for keys in GROUPS.values() for key in keys]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {key for schema in SCHEMAS for key in schema.model_fields}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_help_has_every_key_and_the_algorithms_own_first(schema):
    text = help_text(schema, SCHEMAS[schema][1], SCHEMAS[schema][0])
    keys = [line.strip().partition("=")[0] for line in text.splitlines() if line.startswith("  ") and line[2] != " "]
    assert sorted(keys) == sorted(schema.model_fields)
    assert keys[0] in ("num_sft_examples", "n_grpo_steps", "n_ei_steps", "beta", "tasks")
    assert all(len(line) <= 120 for line in text.splitlines())
    assert text.startswith(f"usage: {run_command('python')} {SCHEMAS[schema][0]} [key=value ...]")


def test_one_key_is_explained_with_its_values_in_the_presets():
    text = explain(GRPOConfig, GRPO_YAML, "learning_rate", read_yaml(GRPO_YAML))
    assert "learning_rate   (batch and optimizer)" in text
    assert "default   1.0e-05" in text and "preset laptop   2.0e-05" in text
    with pytest.raises(UserError, match="--help learning_rat: no such key; did you mean learning_rate?"):
        explain(GRPOConfig, GRPO_YAML, "learning_rat", {})


def test_keys_of_no_group_come_first():
    class Extended(SFTConfig):
        number_of_turns: int = 1

    assert next(iter(keys_by_group(Extended).items())) == ("other", ["number_of_turns"])


def test_help_ends_the_script(capsys):
    for arguments, shown in (
        (["--help"], "usage: "),
        (["-h", "seed"], "seed   (run)"),
        (["--help", "seed=1"], "seed "),
    ):
        with pytest.raises(SystemExit) as caught:
            load_config(GRPOConfig, GRPO_YAML, arguments)
        assert caught.value.code == 0
        assert capsys.readouterr().out.startswith(shown)


def test_a_key_with_two_meanings_has_both_on_the_page():
    (line,) = [line for line in configuration_page().splitlines() if line.startswith("| `length_normalization` |")]
    assert line.startswith("| `length_normalization` | `sum` (SFT_train.py), `masked_mean` (GRPO_train.py) | how token")
    assert line.count("(SFT_train.py)") == line.count("(GRPO_train.py)") == 2
    assert "optimizer step (SFT_train.py), how token" in line


def test_the_configuration_page_is_what_the_schema_says():
    """`uv run python -m plainrl.help > docs/configuration.md` writes it again."""
    assert (REPOSITORY / "docs/configuration.md").read_text() == configuration_page()


def test_help_names_the_command_that_was_started():
    result = subprocess.run(
        [sys.executable, "-m", "experiments.expert_iteration", "--help"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
    )
    assert result.stdout.startswith(f"usage: {run_command('python')} -m experiments.expert_iteration [key=value ...]")


def test_presets_that_are_no_blocks_are_one_line():
    for presets in (5, [1], {"laptop": [1]}, {"laptop": None}):
        with pytest.raises(
            UserError, match=f"^{GRPO_YAML}: presets must hold one block of `key: value` lines per name$"
        ):
            explain(GRPOConfig, GRPO_YAML, "seed", {"presets": presets})
