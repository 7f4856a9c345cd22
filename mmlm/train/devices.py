"""What a device can do: peak arithmetic, memory, and the links between devices: the one table, for planning and for MFU."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from mmlm.errors import ConfigError
from mmlm.world import cores

GB = 10**9


@dataclass(frozen=True)
class Device:
    """Figures of one device; dense bf16, no sparsity."""

    name: str
    peak: float
    """bf16 FLOP/s."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s to its neighbours in one node, in one direction."""
    pcie: float = 32e9
    """Bytes/s to the host's memory, in one direction, of 16 lanes: 16 GB/s by PCIe 3, 32 by PCIe 4, 64 by PCIe 5."""
    per_node: int = 8
    """Devices in one node."""
    efficiency: float = 0.65
    """Share of the peak that matrix products of usual sizes reach. An assumption where nothing was measured."""
    launch: float = 5e-6
    """Seconds to start one kernel from Python."""
    measured: str = ""
    """What of it was measured, and how; empty for a data sheet."""

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


HOST_BANDWIDTH = 200e9
"""Bytes/s of the memory of a node with GPUs, for all its ranks together: about half of what two sockets with eight channels of
DDR4-3200 have by their data sheet. An assumption."""
PCIE_REACHED = 0.8
"""Share of PCIe's rate that copies from and to pinned memory reach. An assumption."""
NODE_LINK = 50e9
"""Bytes/s between nodes and device, one direction: a 400 Gbit/s adapter a GPU, as DGX H100 has."""

DEVICES = {
    device.name: device
    for device in (
        # NVIDIA DGX B200 data sheet (2025), 8 of them: 18 PFLOP/s bf16, 1,440 GB, 64 TB/s; NVLink 1.8 TB/s both ways
        Device("b200", 2250e12, 180 * GB, 8.0e12, 900e9, pcie=64e9),
        # NVIDIA H200 SXM data sheet (2024): 1,979 TFLOP/s with sparsity, 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways
        Device("h200", 989e12, 141 * GB, 4.8e12, 450e9, pcie=64e9),
        # NVIDIA H100 data sheet (2023), SXM: 1,979 TFLOP/s with sparsity, 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways
        Device("h100", 989e12, 80 * GB, 3.35e12, 450e9, pcie=64e9),
        # the same, PCIe: 1,513 TFLOP/s with sparsity, 80 GB, 2 TB/s, PCIe 5 x16
        Device("h100-pcie", 756e12, 80 * GB, 2.0e12, 64e9, pcie=64e9),
        # NVIDIA A100 data sheet (2021), SXM: 312 TFLOP/s, 80 or 40 GB, 2,039 or 1,555 GB/s, NVLink 600 GB/s both ways
        Device("a100-80", 312e12, 80 * GB, 2.039e12, 300e9),
        Device("a100-40", 312e12, 40 * GB, 1.555e12, 300e9),
        # NVIDIA L40S data sheet (2023): 733 TFLOP/s with sparsity, 48 GB, 864 GB/s, PCIe 4 x16
        Device("l40s", 366e12, 48 * GB, 0.864e12, 32e9),
        # NVIDIA L4 data sheet (2023): 242 TFLOP/s with sparsity, 24 GB, 300 GB/s, PCIe 4 x16
        Device("l4", 121e12, 24 * GB, 0.3e12, 32e9),
        # NVIDIA A10 data sheet (2021): 125 TFLOP/s, 24 GB, 600 GB/s, PCIe 4 x16
        Device("a10", 125e12, 24 * GB, 0.6e12, 32e9),
        # NVIDIA V100 data sheet (2020), SXM2, fp16: 125 TFLOP/s, 32 or 16 GB, 900 GB/s, NVLink 300 GB/s both ways
        Device("v100-32", 125e12, 32 * GB, 0.9e12, 150e9, pcie=16e9),
        Device("v100-16", 125e12, 16 * GB, 0.9e12, 150e9, pcie=16e9),
        # NVIDIA T4 data sheet (2019), fp16: 65 TFLOP/s, 16 GB, 320 GB/s, PCIe 3 x16
        Device("t4", 65e12, 16 * GB, 0.32e12, 16e9, pcie=16e9),
        # NVIDIA RTX 4090, Ada white paper (2022): 165.2 TFLOP/s with fp32 accumulation, 24 GB, 1,008 GB/s, PCIe 4 x16
        Device("rtx4090", 165e12, 24 * GB, 1.008e12, 32e9, per_node=4),
        # AMD MI300X data sheet (2023): 1,307 TFLOP/s, 192 GB, 5.3 TB/s, Infinity Fabric 896 GB/s both ways
        Device("mi300x", 1307e12, 192 * GB, 5.3e12, 448e9, pcie=64e9),
    )
}


def find(name: str | None) -> Device:
    """A device by its name in the table; `cpu` is this machine, measured; by default what is here.

    Raises ConfigError naming the known ones.
    """
    import torch

    if name is None and torch.cuda.is_available():
        said, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
        found = named(said, memory)
        if found is None:
            raise ConfigError(f"{said} is not in the table of devices", cure=f"give --gpu: {', '.join(DEVICES)}")
        return found
    name = name or "cpu"
    if name == "cpu":
        return measure_cpu()
    if name not in DEVICES:
        raise ConfigError(f"no device {name!r}", wanted=f"one of cpu, {', '.join(DEVICES)}")
    return DEVICES[name]


def named(said: str, memory: float) -> Device | None:
    """The device of the table that a driver calls `said`, such as `NVIDIA A100-SXM4-80GB`, with `memory` bytes."""
    words = said.lower().replace("-", " ").split()
    name = next((word for word in words if any(known.partition("-")[0] == word for known in DEVICES)), "")
    if name == "h100" and "pcie" in words:
        name = "h100-pcie"
    if name in ("a100", "v100"):
        sizes = {"a100": (80, 40), "v100": (32, 16)}[name]
        name = f"{name}-{sizes[0] if memory > 1.25 * sizes[1] * GB else sizes[1]}"
    return DEVICES.get("rtx4090" if "4090" in words else name)


def measure_cpu(seconds: float = 0.2) -> Device:
    """This machine as one device: a bf16 product of 1024³ on all cores, and a copy of 64 MB, for `seconds` each."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        x = torch.randn(1024, 1024, dtype=torch.bfloat16)
        flops = 2 * 1024**3 * _rate(lambda: x @ x, seconds)
        y = torch.zeros(16 << 20)
        z = torch.empty_like(y)
        moved = 2 * y.nbytes * _rate(lambda: z.copy_(y), seconds)
    finally:
        torch.set_num_threads(before)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    said = (
        f"a bf16 product of 1024³: {flops / 1e9:,.0f} GFLOP/s, a copy of 64 MB: {moved / 1e9:.0f} GB/s, {cores()} cores"
    )
    # gloo over loopback moved 0.7 GB/s between two ranks here
    return Device("cpu", flops, memory, moved, 0.7e9, per_node=cores(), efficiency=0.3, launch=1e-5, measured=said)


def _rate(call: object, seconds: float) -> float:
    """Calls a second, after one for warming up."""
    call()  # type: ignore[operator]
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        call()  # type: ignore[operator]
        count += 1
    return count / spent


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
