"""What this machine could do at most, in floating point operations per second: the denominator of MFU."""

from __future__ import annotations

import time

import torch

from mmlm.train.control import number_of
from mmlm.train.devices import named

SIDE = 1024
"""Of the square matrices that are multiplied to measure a CPU: 2 GFLOP, and friendly to its tiles."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one rank's device: `MMLM_PEAK_TFLOPS`, the data sheet of a GPU, or else measured.

    Raises ConfigError when the variable is no number.
    """
    if given := number_of("MMLM_PEAK_TFLOPS", positive=True):
        return given * 1e12
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        if found := named(torch.cuda.get_device_name(device), memory):
            return found.peak
    return measured(device, dtype)


def measured(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """The best of some multiplications of square matrices, with the threads that this process has."""
    a = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * SIDE**3 / best
