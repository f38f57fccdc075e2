"""A model is a folder, in the hub's cache, or embedded in a package; else the message says how to get it."""

import re

import pytest

from plainrl.model_files import resolve_model
from plainrl.records import UserError


def test_unknown_model_says_how_to_download(tmp_path):
    with pytest.raises(UserError, match=re.escape("run `hf download Qwen/Nothing-0B`")):
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
