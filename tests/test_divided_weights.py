"""Which models are read in shares, and what is wrong with their files. tests/test_distributed.py reads real shares."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from plainrl import divided_weights
from plainrl.checkpoint import saved_tensors
from plainrl.divided_weights import make_empty_model, read_shares
from plainrl.model_files import read_model_config
from plainrl.records import Stopped, UserError


@pytest.fixture
def folder(tiny_model_folder, tmp_path, monkeypatch):
    """A copy of the tiny model, for a rank of two."""
    monkeypatch.setattr(divided_weights, "num_ranks", lambda: 2)
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


def empty(folder, **values):
    config = read_model_config(str(folder), "model")
    for key, value in values.items():
        setattr(config, key, value)
    return make_empty_model(str(folder), "model", config, "sdpa")


def change(folder, **tensors):
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, {"format": "pt"})


def test_a_model_that_looks_at_values_is_loaded_whole(folder, capsys):
    assert empty(folder) is not None
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    assert empty(folder, rope_parameters=dynamic) is None
    assert "model: each rank loads the whole model before it is divided" in capsys.readouterr().out


def test_flash_attention_is_not_tried_without_weights(folder, monkeypatch, capsys):
    """With a mask it asks for values, and each rank would load the whole model."""
    chosen = []
    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", lambda policy, name: chosen.append(name))
    policy = make_empty_model(str(folder), "model", read_model_config(str(folder), "model"), "flash_attention_2")
    assert policy.config._attn_implementation == "sdpa" and chosen == ["flash_attention_2"]
    assert "loads the whole model" not in capsys.readouterr().out


def test_files_that_do_not_fit_are_left_to_the_whole_model(folder):
    shutil.copy(folder / "model.safetensors", folder / "again.safetensors")
    assert empty(folder) is None  # which of the two should be read?
    (folder / "again.safetensors").write_bytes(b"no tensors")
    assert empty(folder) is None
    (folder / "again.safetensors").unlink()
    change(folder, unknown=torch.zeros(3))
    assert empty(folder) is None


def test_weights_that_are_nan_are_named(folder):
    name = "model.norm.weight"
    change(folder, **{name: load_file(folder / "model.safetensors")[name] * torch.nan})
    policy = empty(folder)
    with pytest.raises(UserError, match=rf"label: 1 tensors with infinite numbers or NaN \({name}\); take an earlier"):
        read_shares(policy, str(folder), "label", "cpu")


@pytest.mark.parametrize(
    ("cause", "raised", "message"),
    [
        (OSError("the disk is gone"), UserError, "label: the model could not be loaded .*the disk is gone"),
        (Stopped(15), Stopped, "SIGTERM"),
    ],
)
def test_what_ends_the_reading_is_no_traceback(cause, raised, message, folder, monkeypatch):
    def read_data(*_):
        raise cause

    policy = empty(folder)
    monkeypatch.setattr("torch.distributed.checkpoint.HuggingFaceStorageReader.read_data", read_data)
    with pytest.raises(raised, match=message):
        read_shares(policy, str(folder), "label", "cpu")


def test_what_is_saved_of_a_model():
    module = torch.nn.Linear(2, 3)
    module.register_buffer("kept", torch.ones(4))
    module.register_buffer("made_anew", torch.ones(5), persistent=False)
    assert list(saved_tensors(module)) == ["weight", "bias", "kept"]
