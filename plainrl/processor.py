"""What this machine's processor is, and whether it computes fast in 16 bits. It imports nothing large."""

from functools import cache
from pathlib import Path

AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})  # oneDNN's 16-bit matmuls on the CPU need these
CPUINFO = Path("/proc/cpuinfo")


def fast_dtype(device: str) -> str:
    """Return the dtype that `auto` stands for on a device.

    On a processor without AVX-512 torch has no fast matmul in 16 bits. On one of them an SFT step took 20 times as long
    in bfloat16 as in float32. Most laptops have such a processor.

    Args:
        device: `cpu`, or a CUDA device.

    Returns:
        `bfloat16`, or `float32` on a processor without AVX-512.
    """
    return "bfloat16" if device != "cpu" or computes_fast_in_16_bits() else "float32"


def computes_fast_in_16_bits() -> bool:
    """Return whether the processor has what 16-bit matmuls need. Where Linux does not say, it is taken to have it."""
    flags = _first_processor().get("flags")
    return flags is None or set(flags.split()) >= AVX512


def processor_name() -> str | None:
    """Return the processor's name, or None where Linux does not say."""
    return _first_processor().get("model name")


@cache
def _first_processor() -> dict[str, str]:
    try:
        lines = CPUINFO.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
