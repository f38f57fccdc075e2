"""Seconds, floating-point operations, and the best matmul rate of this machine."""

import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def timed(action: Callable[[], object], device: str) -> float:
    """Return the seconds that an action takes."""
    started = time.perf_counter()
    action()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def count_tflop(action: Callable[[], object]) -> float:
    """Return the floating-point operations of an action's matmuls, in units of 10^12."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops() / 1e12


def matmul_peak(device: str, compute_dtype: str) -> float:
    """Return the best rate of a square matmul in the dtype that the policy computes in, in TFLOP/s.

    The best is taken over sizes and repetitions.
    """
    best = 0.0
    for size in (1024, 2048, 4096) if device == "cpu" else (4096, 8192):
        left = torch.randn(size, size, device=device, dtype=getattr(torch, compute_dtype))
        for _ in range(4):  # the first is a warm-up, never the best
            best = max(best, 2e-12 * size**3 / timed(lambda operand=left: operand @ operand, device))
    return best
