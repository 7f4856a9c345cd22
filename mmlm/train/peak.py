"""What this machine could do at most, in floating point operations per second: the denominator of MFU."""

from __future__ import annotations

import time

import torch

from mmlm.train.control import number_of

SHEETS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12,
    "V100": 125e12, "T4": 65e12,
}  # fmt: skip
"""Dense bf16 or fp16 with float32 accumulation, from the makers' data sheets; name → operations per second."""
SIDE = 1024
"""Of the square matrices that are multiplied to measure a CPU: 2 GFLOP, and friendly to its tiles."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one rank's device: `MMLM_PEAK_TFLOPS`, the data sheet of a GPU, or else measured.

    Raises ConfigError when the variable is no number.
    """
    if given := number_of("MMLM_PEAK_TFLOPS", positive=True):
        return given * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, flops in SHEETS.items():
            if part in name.replace("-", " ").split():
                return flops
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
