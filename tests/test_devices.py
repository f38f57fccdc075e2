"""Devices, drivers, compilers and builds of vLLM that are not there are named before any long work."""

import shutil
import sys
from types import SimpleNamespace

import pytest

from plainrl.config import RunConfig
from plainrl.devices import check_devices, free_bytes
from plainrl.engine import init_vllm
from plainrl.records import UserError


@pytest.mark.usefixtures("cpu_engine")
def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match="policy_device = cuda:0: 0 CUDA devices are visible"):
        check_devices(RunConfig(policy_device="cuda:0"))
    with pytest.raises(UserError, match="uv sync --no-group cpu --group gpu"):
        init_vllm("model", "cuda:0", seed=0)
    with pytest.raises(UserError, match="order the GPUs with CUDA_VISIBLE_DEVICES"):
        init_vllm("model", "cuda:1", seed=0)
    monkeypatch.setattr("plainrl.devices._is_installed", lambda name: False)
    with pytest.raises(UserError, match="no CUDA device is visible"):
        init_vllm("model", "cuda:0", seed=0)
    with pytest.raises(UserError, match="needs the CPU build of vLLM"):
        init_vllm("model", "cpu", seed=0)


def test_a_driver_too_old_for_torch_is_named(monkeypatch):
    """The driver counts the GPUs all the same."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for devices in ({"policy_device": "cuda:0"}, {"evaluator_device": "cuda:0"}):
        with pytest.raises(UserError, match="a GPU is there, but does not run CUDA .* newer NVIDIA driver"):
            check_devices(RunConfig(**devices))


@pytest.mark.usefixtures("cpu_engine")
def test_compiling_for_the_cpu_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler")
    check_devices(RunConfig())
    with pytest.raises(UserError, match=r"^compile_policy = true: needs a compiler"):
        check_devices(RunConfig(compile_policy=True))
    with pytest.raises(UserError, match=r"^compile_policy = true and engine_eager = false: needs a compiler"):
        check_devices(RunConfig(compile_policy=True, engine_eager=False))
    monkeypatch.setenv("CXX", sys.executable)  # any program that is there
    check_devices(RunConfig(compile_policy=True))


def test_free_disk_space_is_not_known_everywhere(tmp_path, monkeypatch):
    assert free_bytes(tmp_path) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert free_bytes(tmp_path / "missing") is None
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=0, free=0))
    assert free_bytes(tmp_path) is None


def test_an_engine_on_a_gpu_needs_a_c_compiler(monkeypatch):
    """Triton compiles a helper in C at its first kernel, minutes after the start, with engine_eager too."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("plainrl.devices._is_installed", lambda name: False)
    config = RunConfig(policy_device="cuda:0", evaluator_device="cuda:0", engine_eager=True)
    programs = {"gcc": "/usr/bin/gcc"}
    monkeypatch.setattr("shutil.which", programs.get)
    monkeypatch.delenv("CC", raising=False)
    check_devices(config)
    del programs["gcc"]
    with pytest.raises(UserError, match=r"^evaluator_device = cuda:0: needs a compiler .* python3-dev"):
        check_devices(config)
    programs["clang"] = "/usr/bin/clang"
    check_devices(config)
