"""Memory of a rank on a CPU that does not grow: batches of changing shapes leave holes that nobody gives back.

Measured on the story `almanac` (1.9 million parameters, every step other shapes). For each shape oneDNN compiles a kernel
and keeps up to 1,024; the library between it and torch (ideep) keeps up to 1,024 more of its own. They take 0.1 to 8 MB
each: what a training holds grew by 0.8 MB a step, for as long as new shapes came. CAPACITY of each are as many as most
steps need (`model.kernels.rung` makes few shapes of many): of 64, 14 kernels a step were made anew, which took 4 ms, and as
what is kept came to lie between what is not, a rank took 50 MB more at step 1,300 than at step 100; of 128, five, and none.

torch's recorder of collective operations keeps the Python stack of the last 2,000, 2 MB for every 1,000 until then; it is for
finding out why NCCL hangs, and without a GPU the watchdog tells that. Freed pages also stay with the
process: they are given back when it has grown by SLACK beyond what a step needs, which every step would else map anew (100 M
parameters: 900,000 page faults a step, a tenth of its time). Mapping every large buffer by itself (a fixed
M_MMAP_THRESHOLD) would do that as well, at 2.6 times the CPU time of a step.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Any

CAPACITY = 128
"""Kernels that are kept."""
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""What oneDNN and ideep are told by: both are read at the first operation."""
RECORDER = "TORCH_FR_BUFFER_SIZE"
"""How many collective operations torch's recorder keeps."""
SLACK = 64 << 20
"""Bytes by which a process may grow before it gives freed pages back,"""
SLACK_SHARE = 0.1
"""or this share of what it needs, where that is more;"""
EVERY = 500
"""and steps after which it does so in any case. Without, a rank of `almanac` grew by 2 to 3 MB every 1,000 steps for 18,000
steps, while what it held after a trim stayed."""


def bound_kernels() -> None:
    """Before the first operation: keep CAPACITY kernels and no record of collectives, unless the user's environment says
    otherwise."""
    for name in CACHES:
        os.environ.setdefault(name, str(CAPACITY))
    os.environ.setdefault(RECORDER, "0")


def resident_bytes() -> tuple[float, float]:
    """Resident memory of this process, and what of it is its own: no pages of mapped files. 0 where there is no /proc."""
    found = {}
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        found = {line.split(":")[0]: float(line.split()[1]) * 1024 for line in f if line.startswith(("VmRSS", "Rss"))}
    return found.get("VmRSS", 0.0), found.get("RssAnon", 0.0) + found.get("RssShmem", 0.0)


class Trimmer:
    """Gives freed pages back to the system when holes have made the process grow by SLACK, and every EVERY steps.

    What it grows beyond is what it holds after a step that follows a trim: pages that every step needs again stay.
    """

    def __init__(self) -> None:
        self.needed = 0.0
        self._since = 0
        self._trimmed = False
        self._trim: Any = None
        with contextlib.suppress(AttributeError, OSError):  # another C library than glibc has none
            self._trim = ctypes.CDLL(None).malloc_trim

    def look(self, steps: int = 1) -> None:
        """After `steps` further steps."""
        if not self._trim:
            return
        held = resident_bytes()[1]
        if self._trimmed:
            self.needed = max(self.needed, held)
        self._since += steps
        again = self._since >= EVERY
        if again:
            self.needed, self._since = 0.0, 0
        self._trimmed = again or held > self.needed + max(SLACK, SLACK_SHARE * self.needed)
        if self._trimmed:
            self._trim(0)
