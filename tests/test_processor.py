"""The dtype that a processor computes fast in."""

import pytest
import torch

from plainrl import processor
from plainrl.config import GRPOConfig
from plainrl.processor import computes_fast_in_16_bits, fast_dtype, processor_name

NEW = "fpu sse2 avx avx2 fma avx512f avx512dq avx512cd avx512bw avx512vl avx512_bf16 amx_tile"
OLD = "fpu sse2 avx avx2 fma"


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """Return a function that writes what Linux says of a processor with the given flags."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "CPUINFO", path)
    processor._first_processor.cache_clear()

    def write(flags: str) -> None:
        blocks = [f"processor\t: {i}\nmodel name\t: A Processor @ 2.0 GHz\nflags\t\t: {flags}\n" for i in range(2)]
        path.write_text("\n".join(blocks))

    yield write
    processor._first_processor.cache_clear()


@pytest.mark.parametrize(("flags", "dtype"), [(NEW, "bfloat16"), (OLD, "float32"), (f"{OLD} avx512f", "float32")])
def test_a_processor_without_avx512_computes_in_float32(cpuinfo, flags, dtype):
    cpuinfo(flags)
    assert fast_dtype("cpu") == dtype
    assert fast_dtype("cuda:0") == "bfloat16"
    assert processor_name() == "A Processor @ 2.0 GHz"
    config = GRPOConfig()
    assert (config.compute_dtype, config.engine_dtype) == (dtype, dtype)
    assert not config.warnings()


def test_where_linux_says_nothing_16_bits_are_taken(cpuinfo):
    assert fast_dtype("cpu") == "bfloat16" and processor_name() is None


def test_the_flags_say_what_torch_says():
    """Torch asks oneDNN, which asks the processor itself."""
    assert computes_fast_in_16_bits() == torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_a_dtype_that_is_given_stays_and_a_slow_one_is_warned_of(cpuinfo):
    cpuinfo(OLD)
    config = GRPOConfig(compute_dtype="bfloat16", policy_device="cpu")
    assert (config.compute_dtype, config.engine_dtype) == ("bfloat16", "float32")
    (warning,) = config.warnings()
    assert warning.startswith("compute_dtype = bfloat16: this processor has no AVX-512")
    on_gpu = GRPOConfig(policy_device="cuda:0", evaluator_device="cuda:0", gpu_memory_utilization=0.35)
    assert (on_gpu.compute_dtype, on_gpu.engine_dtype) == ("bfloat16", "bfloat16")
    assert not on_gpu.warnings()


def test_what_auto_became_is_what_is_saved(cpuinfo):
    """A run that is resumed on another processor goes on in its own dtype."""
    cpuinfo(OLD)
    saved = GRPOConfig().model_dump()
    assert saved["compute_dtype"] == "float32"
    processor._first_processor.cache_clear()
    cpuinfo(NEW)
    assert GRPOConfig(**saved).compute_dtype == "float32"
