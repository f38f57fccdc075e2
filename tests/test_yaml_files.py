"""YAML means the same in a file and on the command line; what could mean something else is refused with its line."""

import pytest
import yaml
from tiny import REPOSITORY

from plainrl.cli import load_config, read_yaml
from plainrl.config import SFTConfig
from plainrl.records import UserError
from plainrl.yaml_files import YamlError, load_yaml


def in_file(tmp_path, text):
    """The configuration of a file with one line, and of nothing else."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"{text}\npresets: {{laptop: {{}}}}\n")
    return load_config(SFTConfig, path, ["preset=laptop"])


def on_command_line(tmp_path, key, text):
    path = tmp_path / "empty.yaml"
    path.write_text("presets: {laptop: {}}\n")
    return load_config(SFTConfig, path, ["preset=laptop", f"{key}={text}"])


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "010", 10),
        ("seed", "08", 8),
        ("seed", "1_000", 1000),
        ("seed", "+5", 5),
        ("seed", "1:30", None),
        ("seed", "0x10", None),
        ("seed", "0o17", None),
        ("seed", "2024-01-01", None),
        ("seed", "yes", None),
        ("seed", "true", None),
        ("seed", "", None),
        ("seed", "1e3", 1000),
        ("seed", "1.0e+3", 1000),
        ("seed", ".inf", None),
        ("seed", "~", None),
        ("learning_rate", "1e-5", 1e-5),
        ("learning_rate", "1.0E-5", 1e-5),
        ("learning_rate", ".5", 0.5),
        ("learning_rate", "1.", 1.0),
        ("learning_rate", "1:30.5", None),
        ("learning_rate", "on", None),
        ("learning_rate", "1e999", None),
        ("examples_seed", "null", "null"),
        ("examples_seed", "", "null"),
        ("keep_best", "yes", True),
        ("keep_best", "off", False),
        ("keep_best", "TRUE", True),
        ("keep_best", "0", False),
        ("keep_best", "2", None),
        ("wandb_mode", "off", None),
        ("num_eval_examples", "all", "all"),
        ("num_eval_examples", "016", 16),
        ("adam_betas", "[0.9, 1e-1]", (0.9, 0.1)),
        ("arithmetic_terms", "[02, 010]", (2, 10)),
        ("run_name", "010", "010"),
        ("run_name", "1e-5", "1e-5"),
        ("run_name", "null", "null"),
        ("run_name", "2024-01-01", "2024-01-01"),
        ("run_name", "", ""),
        ("model", "off", "off"),
        ("stop_string", "1:30", "1:30"),
    ],
)
def test_a_value_means_the_same_in_a_file_and_on_the_command_line(tmp_path, key, text, value):
    """None: it is refused in both places."""
    if value is not None:
        expected = None if value == "null" and key == "examples_seed" else value
        for config in (in_file(tmp_path, f"{key}: {text}"), on_command_line(tmp_path, key, text)):
            assert (getattr(config, key), type(getattr(config, key))) == (expected, type(expected))
        return
    with pytest.raises(UserError) as of_file:
        in_file(tmp_path, f"{key}: {text}")
    with pytest.raises(UserError) as of_line:
        on_command_line(tmp_path, key, text)
    assert str(of_file.value) == str(of_line.value).replace("command line", str(tmp_path / "mine.yaml"))
    assert "\n" not in str(of_file.value)


ALIASES = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 10))
MERGES = "".join(f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 9)}]}}\n" for i in range(1, 10))
CHAIN = "".join(f"b{i}: &b{i} [*b{i - 1}]\n" for i in range(1, 3000))


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("seed: 1\nmodel: a\nseed: 2\n", 3, "seed stands here and in line 1; keep one"),
        (
            "presets:\n  laptop:\n    seed: 1\n  gpu: {}\n  laptop: {}\n",
            5,
            "laptop stands here and in line 2; keep one",
        ),
        ('{"seed": 1, seed: 2}', 1, "seed stands here and in line 1"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n  y: 1\n  y: 2\n", 5, "y stands here and in line 4"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a\n", 4, "<< stands here and in line 3"),
        ("? [a]\n: 1\n", 1, "a list or a block is no key"),
        ("seed: 1\n? {a: 1}\n: 1\n", 2, "a list or a block is no key"),
        ("a: 1\n---\nb: 2\n", 2, "not YAML: found another document"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", 2, "the tag !!python/object/apply:os.system is not read"),
        ("a: !!bool maybe\n", 1, "the tag !!bool is not read"),
        ("a: !!timestamp x\n", 1, "the tag !!timestamp is not read"),
        ("a: ! 5\n", 1, "the tag ! is not read"),
        ("a:\n\tb: 1\n", 2, r"not YAML: found character '\t' that cannot start any token"),
        ("a: 1\nb: x\0y\n", 2, "character 0x0; remove it"),
        ("a: 1\nb: \x1b[0m\n", 2, "character 0x1b; remove it"),
        ('a: 1\nb: "\\U00110000"\n', 2, "not YAML: chr() arg not in range"),
        ("a: *b\n", 1, "not YAML: found undefined alias 'b'"),
        ("a: &a [1, *a]\n", 1, "*a stands inside what it names"),
        ("a: &a\n  <<: *a\n", 2, "*a stands inside what it names"),
        ("a: &a {b: &b {c: *a}}\n", 1, "*a stands inside what it names"),
        ("a: 1\nb: " + "[" * 100_000, 2, "nested more than 20 deep"),
        ("{a: " * 50, 1, "nested more than 20 deep"),
        ("b0: &b0 [x, x, x, x, x, x, x, x, x]\n" + ALIASES, 5, "more than 10,000 values"),
        ("b0: &b0 {x: 1}\n" + MERGES, 5, "more than 10,000 values"),
        ("b0: &b0 [x]\n" + CHAIN, 139, "more than 10,000 values"),
        ("- 1\n" * 20_000, 10_000, "more than 10,000 values"),
        ("<<: 5\n", 1, "not YAML: expected a mapping or list of mappings for merging"),
        ("a: 'x\n", 2, "not YAML: found unexpected end of stream"),
        ("%FOO\n", 2, "not YAML"),
    ],
)
def test_what_is_refused_names_line_and_problem(text, line, problem):
    with pytest.raises(YamlError) as caught:
        load_yaml(text)
    assert caught.value.line == line
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 1\nmodel: b\n".encode("utf-16"), "line 1: not UTF-8 text; save the file as UTF-8"),
        ("seed: 1\nmodel: ä\n".encode("latin-1"), "line 2: not UTF-8 text"),
        ("seed: 1\nseed: 2\n".encode("utf-8-sig"), "line 2: seed stands here and in line 1; keep one"),
        (b"\0" * 100, "line 1: character 0x0; remove it"),
        (b"", "line 1: expected `key: value` lines, found nothing"),
        (b"# only a comment\n", "line 1: expected `key: value` lines, found nothing"),
        (b"seed\n", "line 1: expected `key: value` lines, found str"),
        (b"- seed\n", "line 1: expected `key: value` lines, found list"),
    ],
)
def test_a_file_that_is_no_settings_names_file_and_line(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}, {message}")


def test_keys_are_text_and_a_byte_order_mark_is_none_of_them(tmp_path):
    assert load_yaml("\ufeffseed: 1\n1: 2\nnull: 3\non: 4\n010: 5\n") == {
        **{"seed": 1, "1": 2, "null": 3, "on": 4, "010": 5}
    }
    path = tmp_path / "mine.yaml"
    path.write_text("1: 2\nnull: 3\npresets: {laptop: {}}\n")
    with pytest.raises(UserError, match=rf"^unknown key 1 \({path}\): --help .*; unknown key null \({path}\)"):
        load_config(SFTConfig, path, ["preset=laptop"])


def test_an_override_of_a_merged_key_is_no_doubled_key():
    text = "a: &a {x: 1, y: 1}\nb: &b\n  <<: *a\n  y: 2\nc:\n  <<: [*b, *a]\n  z: 3\nd: {<<: *b, x: 5}\n"
    assert load_yaml(text) == {
        "a": {"x": 1, "y": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1, "y": 2, "z": 3},
        "d": {"x": 5, "y": 2},
    }


def test_an_alias_is_the_value_that_it_names_also_as_a_key():
    assert load_yaml("a: &x 5\nrun_name: *x\n*x : 6\nb: *x\nc: &y [1]\nd: *y\n", ["run_name"]) == {
        **{"a": 5, "run_name": "5", "5": 6, "b": 5, "c": [1], "d": [1]}
    }


YAML_FILES = [*REPOSITORY.glob("*.yaml"), *REPOSITORY.glob("experiments/**/*.yaml")]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_our_own_files_say_what_yaml_1_1_says(path):
    """But for numbers like 1e-5, which YAML 1.1 takes for text."""

    def as_numbers(value):
        if isinstance(value, dict):
            return {key: as_numbers(part) for key, part in value.items()}
        return float(value) if isinstance(value, str) and "e-" in value and value[0].isdigit() else value

    assert len(YAML_FILES) >= 13
    assert read_yaml(path) == as_numbers(yaml.safe_load(path.read_text()))


def test_what_a_run_writes_is_read_back_as_it_was(tmp_path):
    """Whatever the text: PyYAML writes config.yaml, and quotes only what YAML 1.1 would misread."""
    path = tmp_path / "config.yaml"
    for text in (
        "1e-5",
        "010",
        "off",
        "null",
        "~",
        "1:30",
        "0o17",
        "a: b",
        "- a",
        "#a",
        "ä",
        "\t",
        "<<",
        "",
        "1_0",
        "'",
    ):
        config = SFTConfig(run_name=text.replace("/", ""), model=text, stop_string=text, learning_rate=3e-7)
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        assert SFTConfig.model_validate(read_yaml(path)) == config
