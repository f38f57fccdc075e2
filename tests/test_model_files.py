"""A model's files: found, or the message says how to get them; whole and fitting, or refused in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import run_script, tiny_arguments
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    DbrxConfig,
    Gemma3Config,
    LlamaConfig,
    Qwen2Config,
    T5Config,
    ViTConfig,
)

from plainrl import model_files
from plainrl.config import RunConfig
from plainrl.devices import run_command
from plainrl.model_files import find_dropout, resolve_model, set_dropout, why_unsupported
from plainrl.policy import load_policy
from plainrl.records import UserError

WEIGHTS = "model.safetensors"


def test_unknown_model_says_how_to_download(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"run `{run_command('hf download Qwen/Nothing-0B')}`")):
        resolve_model("Qwen/Nothing-0B")
    with pytest.raises(UserError, match="no config.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(UserError, match="neither a folder nor a downloaded hub model"):
        resolve_model("no such folder/at/all")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file/plainrl/.* set XDG_CACHE_HOME to a folder with free disk space"):
        resolve_model("smollm2-135m")


def test_a_cache_folder_of_before_the_project_was_renamed_is_still_found(tmp_path, monkeypatch):
    """The new name comes first, once there is a folder of that name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("reasoning-from-scratch", "plainrl"):
        folder = tmp_path / name / "smollm2-135m"
        folder.mkdir(parents=True)
        assert resolve_model("smollm2-135m") == str(folder)


def change_json(name, **values):
    """A damage: other values in a JSON file; None removes a key."""

    def change(folder):
        found = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        kept = {key: value for key, value in (found | values).items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return change


def change_tensors(change):
    """A damage: other tensors. `change` gets their dictionary, and may return another."""

    def change_file(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors) or tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return change_file


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name, share):
    """A damage: the first part of the first file of such a name, as an interrupted copy leaves it."""

    def change(folder):
        path = min(folder.glob(name))
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return change


def remove(name):
    return lambda folder: min(folder.glob(name)).unlink()


def as_bin(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def as_shards(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="100KB")


def of_type(folder):
    torch.save([1, 2], folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def table_of(num_rows):
    """A damage: an embedding table of so many rows. The tokenizer has 448 tokens."""

    def change(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(num_rows)
        model.save_pretrained(folder)

    return change


def set_weight(value):
    def change(tensors):
        tensors["model.norm.weight"][3] = value

    return change_tensors(change)


def without(*parts):
    return change_tensors(lambda t: {name: t[name] for name in t if not any(part in name for part in parts)})


def with_tokens(*names):
    """A damage: further tokens, with the next ids, in the tokenizer."""

    def change(folder):
        values = json.loads((folder / "tokenizer.json").read_text())
        first = len(values["model"]["vocab"])
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        values["added_tokens"] += [{"id": first + i, "content": name} | flags for i, name in enumerate(names)]
        (folder / "tokenizer.json").write_text(json.dumps(values))

    return change


CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
TEXT_OF_LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
DAMAGES = {
    # 7. Weights that are not all there.
    "a tensor": ([without("model.norm.weight")], r"1 missing tensors \(model.norm.weight\); copy or download"),
    "a layer": ([without("layers.1.")], r"9 missing tensors \(model.layers.1.input_layernorm.weight, .*, \.\.\.\)"),
    "other names": ([change_tensors(lambda t: {f"x.{n}": t[n] for n in t})], "21 missing tensors"),
    "a head": ([change_json(CONFIG, tie_word_embeddings=False)], r"1 missing tensors \(lm_head.weight\)"),
    "a head that should be tied": (
        [change_tensors(lambda t: t | {"lm_head.weight": torch.ones(512, 64)})],
        "tie_word_embeddings = true in config.json, but the files hold an output layer of its own; set it to false",
    ),
    "layers too many": ([change_json(CONFIG, num_hidden_layers=3)], r"9 missing tensors \(model.layers.2"),
    "layers too few": (
        [change_json(CONFIG, num_hidden_layers=1)],
        r"9 tensors that the model of config.json does not have \(model.layers.1.*; use the config.json of these",
    ),
    "a reward head": (
        [change_tensors(lambda t: t | {"score.weight": torch.ones(1, 64)})],
        r"1 tensors that the model of config.json does not have \(score.weight\)",
    ),
    "another width": (
        [change_json(CONFIG, intermediate_size=96)],
        r"6 tensors of another size than config.json says \(model.layers.0.mlp.down_proj.weight has \[64, 128\], "
        r"not \[64, 96\], .*\); use the config.json of these weights",
    ),
    "another vocabulary": ([change_json(CONFIG, vocab_size=600)], r"1 tensors of another size .*not \[600, 64\]"),
    "NaN": ([set_weight(float("nan"))], r"1 tensors with infinite numbers or NaN \(model.norm.weight\); take"),
    "infinity": ([set_weight(float("-inf"))], r"1 tensors with infinite numbers or NaN \(model.norm.weight\)"),
    # 7. Files of weights that are damaged.
    "no file": ([remove(WEIGHTS)], "the model could not be loaded .*no file named model.safetensors"),
    "an empty file": ([write(WEIGHTS, b"")], "model.safetensors is damaged"),
    "half a file": ([cut(WEIGHTS, 0.5)], "model.safetensors is damaged: .*not fully covered"),
    "half a header": ([cut(WEIGHTS, 0.001)], "model.safetensors is damaged"),
    "a pointer": ([write(WEIGHTS, TEXT_OF_LFS)], "model.safetensors is damaged"),
    "half a pickle": ([as_bin, cut("pytorch_model.bin", 0.5)], "pytorch_model.bin is damaged"),
    "an empty pickle": ([as_bin, write("pytorch_model.bin", b"")], "pytorch_model.bin is damaged"),
    "text for a pickle": ([as_bin, write("pytorch_model.bin", "hello")], "pytorch_model.bin is damaged"),
    "another pickle": ([of_type], "the model could not be loaded"),
    "a shard": (
        [as_shards, remove("model-00002*")],
        "model.safetensors.index.json names model-00002-of-00005.safetensors, which is not there",
    ),
    "half a shard": ([as_shards, cut("model-00001*", 0.5)], "model-00001-of-00005.safetensors is damaged"),
    "half an index": ([as_shards, cut("*.index.json", 0.5)], "model.safetensors.index.json is damaged"),
    "an index of nothing": ([as_shards, write(f"{WEIGHTS}.index.json", "[]")], "index.json is damaged"),
    # 8. Tokenizer and embeddings.
    "tokens beyond the table": (
        [table_of(440)],
        r"8 tokens of its tokenizer have no row in the embedding table of 440 rows \('.*' = 440, .*\.\.\.\); use",
    ),
    "a PAD beyond the table": (
        [table_of(448), with_tokens("<pad>"), change_json(TOKENIZER, pad_token="<pad>")],
        r"1 tokens of its tokenizer have no row .* \('<pad>' = 448\)",
    ),
    "an EOS beyond the table": (
        [table_of(448), with_tokens("<x>", "<end>"), change_json(TOKENIZER, eos_token="<end>")],
        r"2 tokens of its tokenizer have no row .* \('<x>' = 448, '<end>' = 449\)",
    ),
    "no EOS": ([change_json(TOKENIZER, eos_token=None)], "its tokenizer has no EOS token, .* set eos_token in"),
    "no settings of the tokenizer": ([remove(TOKENIZER)], "its tokenizer has no EOS token"),
    "EOS of the model": ([change_json(CONFIG, eos_token_id=5000)], "eos_token_id = 5000 in config.json is no row"),
    "an EOS of several": (
        [change_json(GENERATION, eos_token_id=[0, 700])],
        r"eos_token_id = \[0, 700\] in generation_config.json is no row of the embedding table of 512 rows; the "
        "tokenizer's is 0",
    ),
    "EOS as text": ([change_json(GENERATION, eos_token_id="a")], "eos_token_id = a in generation_config.json"),
    "PAD of the model": ([change_json(CONFIG, pad_token_id=600)], "the model could not be loaded .*Padding_idx"),
    "no tokenizer": ([remove("tokenizer.json")], "the tokenizer could not be loaded .*it needs config, weights and"),
    "half a tokenizer": ([cut("tokenizer.json", 0.5)], "the tokenizer could not be loaded"),
    "a list for a tokenizer": ([write("tokenizer.json", "[]")], "the tokenizer could not be loaded"),
    "half of its settings": ([cut(TOKENIZER, 0.5)], "the tokenizer could not be loaded"),
    "a number for EOS": ([change_json(TOKENIZER, eos_token=3)], "the tokenizer could not be loaded .*eos_token"),
    # config.json and generation_config.json
    "half a config": ([cut(CONFIG, 0.5)], "config.json could not be loaded .*not a valid JSON file"),
    "a list for a config": ([write(CONFIG, "[]")], "config.json could not be loaded"),
    "bytes for a config": ([write(CONFIG, b"\xff\xfe\x00")], "config.json could not be loaded"),
    "no type": ([change_json(CONFIG, model_type=None)], "config.json could not be loaded .*model_type"),
    "an unknown type": ([change_json(CONFIG, model_type="foo")], "config.json could not be loaded .*`foo`"),
    "a text for a size": ([change_json(CONFIG, hidden_size="wide")], "config.json could not be loaded .*hidden_size"),
    "heads that do not divide": ([change_json(CONFIG, num_attention_heads=3)], "config.json could not be loaded"),
    "a number for names": ([change_json(CONFIG, architectures=3)], "config.json could not be loaded"),
    "an unknown activation": ([change_json(CONFIG, hidden_act="nope")], "the model could not be loaded .*nope"),
    "code of its own": (
        [change_json(CONFIG, model_type="own", auto_map={"AutoConfig": "own.Config"})],
        "config.json could not be loaded .*custom code",
    ),
    "another checkpoint": (
        [change_json(CONFIG, architectures=["LlamaForSequenceClassification"])],
        r"its weights are those of LlamaForSequenceClassification, not of a causal language model \(LlamaForCausalLM\)",
    ),
    "quantized": (
        [change_json(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4})],
        "its weights are quantized, and quantized weights cannot be trained; use another model",
    ),
    "an adapter": ([write("adapter_config.json", "{}")], r"it is an adapter \(adapter_config.json\)"),
    "half a generation config": ([write(GENERATION, '{"top')], "generation_config.json could not be loaded .*repair"),
    "a list as one": ([write(GENERATION, "[1]")], "generation_config.json could not be loaded .*repair or remove it"),
    "values that do not load": ([change_json(GENERATION, max_new_tokens=-1)], "generation_config.json could not be"),
}


def load(folder):
    return load_policy(RunConfig(model=str(folder), max_context_tokens=256, sampling_max_tokens=8))


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused_in_one_line(name, folder):
    changes, message = DAMAGES[name]
    for change in changes:
        change(folder)
    with pytest.raises(UserError, match=f"^model = {re.escape(str(folder))}: .*{message}") as error:
        load(folder)
    assert "\n" not in str(error.value)


def damaged_run(background):
    """A script with a model that lacks a layer."""
    folder = background.new_folder("damaged")
    model = Path(shutil.copytree(background.tiny_model, folder / "model"))
    without("layers.1.")(model)
    return folder, run_script("SFT_train.py", *tiny_arguments(model, folder / "runs"), start=background.start)


@pytest.mark.background(job=damaged_run)
def test_a_script_ends_with_that_line(background):
    folder, result = background.result(damaged_run)
    assert result.returncode == 2
    assert "9 missing tensors (model.layers.1." in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list((folder / "runs").iterdir())


SOUND = {
    "shards": ([as_shards], ""),
    "a pickle": ([as_bin], ""),
    "a base model's name": ([change_json(CONFIG, architectures=["LlamaModel"])], ""),
    "no name": ([change_json(CONFIG, architectures=None)], ""),
    "a padded table": ([table_of(640)], ""),
    "an EOS of several": ([change_json(GENERATION, eos_token_id=[0, 5])], ""),
    "PAD -1, as in old files": ([change_json(CONFIG, pad_token_id=-1)], ""),
    "a PAD of its own": ([table_of(449), with_tokens("<pad>"), change_json(TOKENIZER, pad_token="<pad>")], ""),
    "flags that cannot be saved": (
        [change_json(GENERATION, do_sample=False, temperature=0.6, top_p=0.9, eos_token_id=[0, 5])],
        "do_sample = False, temperature = 0.6, top_p = 0.9",
    ),
    "a flag without sampling": ([change_json(GENERATION, top_k=20)], "top_k = 20"),
    "flags of beams": ([change_json(GENERATION, num_beams=1, length_penalty=2.0)], "num_beams = 1, length_penalty"),
    "a flag in config.json, as in old files": (
        [remove(GENERATION), change_json(CONFIG, temperature=0.3)],
        "temperature = 0.3",
    ),
    "a negative PAD": ([change_json(GENERATION, pad_token_id=-1)], "pad_token_id = -1"),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_model_is_loaded_and_can_be_saved(name, folder, tmp_path, capsys):
    """Flags of sampling are left out where they cannot be saved, and said to be. The ids of EOS stay."""
    changes, flags = SOUND[name]
    expected = AutoModelForCausalLM.from_pretrained(folder)
    for change in changes:
        change(folder)
    policy, _ = load(folder)
    printed = capsys.readouterr().out
    assert flags in printed and ("could not be saved as it is" in printed) == bool(flags)
    for parameter, original in zip(policy.parameters(), expected.parameters(), strict=True):
        num_rows = min(len(parameter), len(original))
        assert torch.equal(parameter[:num_rows], original[:num_rows])
    policy.save_pretrained(tmp_path / "saved")
    eos = json.loads((tmp_path / "saved" / GENERATION).read_text())["eos_token_id"]
    assert eos == ([0, 5] if "several" in name or "cannot" in name else 0)


def test_kinds_of_models_that_are_no_causal_language_models():
    for config in (T5Config(), BartConfig(), ViTConfig()):
        assert why_unsupported(config) == f"{config.model_type} is no causal language model"
    assert "reads images or sound" in why_unsupported(Gemma3Config())
    assert "BertForMaskedLM, not of a causal" in why_unsupported(BertConfig(architectures=["BertForMaskedLM"]))
    assert why_unsupported(Qwen2Config(architectures=["Qwen2ForCausalLM"])) == ""
    assert "Qwen2ForTokenClassification" in why_unsupported(Qwen2Config(architectures=["Qwen2ForTokenClassification"]))


def test_dropout_is_found_and_set_under_any_name():
    """Also in a part of the configuration. Rates of zero and of heads for other tasks are left out."""
    assert find_dropout(LlamaConfig()) == {}
    config = DbrxConfig(resid_pdrop=0.2, attn_config={"attn_pdrop": 0.3})
    assert find_dropout(config) == {"resid_pdrop": 0.2, "attn_pdrop": 0.3}
    set_dropout(config, dict.fromkeys(find_dropout(config), 0.0))
    assert (find_dropout(config), config.resid_pdrop, config.attn_config.attn_pdrop) == ({}, 0, 0)
    assert find_dropout(BertConfig(classifier_dropout=0.5)) == {
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }


def test_a_gguf_file_is_parsed_once_for_a_conversion(monkeypatch):
    import gguf

    parsed = []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: parsed.append(path) or object())
    reader = gguf.GGUFReader
    with model_files._each_gguf_file_read_once():
        assert gguf.GGUFReader("a") is gguf.GGUFReader("a") is not gguf.GGUFReader("b")
        assert parsed == ["a", "b"]
    assert gguf.GGUFReader is reader
