"""What recomputation costs and saves: seconds of a step and peak memory without, with `full` and with `selective`.

    python docs/make_recompute.py            # about 4 minutes on one core; prints the figures of docs/guide.md

Each measurement is a process of its own, so that the peak is its own; the order goes round, and medians are told.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS, STEPS = 3, 6
WAYS = ("none", "full", "selective")


def measure(way: str) -> None:
    """Print seconds of the median step and MB at most, of eight blocks of width 512 over 288 short records in bf16."""
    import torch

    from mmlm.data.collate import field_rows, pack
    from mmlm.model.config import ModelConfig
    from mmlm.model.layouts import build_model
    from tests.small import SPEC, sample

    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = SPEC.model_copy(update={"max_len": 512})
    config = ModelConfig(width=512, layers=8, heads=8, attention="prefix")
    net = build_model(config, spec, len(field_rows(spec))).train().bfloat16()
    net.set_up(recompute=int(way != "none"), granularity="selective" if way == "selective" else "full")
    batch = pack([[sample(row * 12 + n) for n in range(12)] for row in range(24)], spec)
    seconds = []
    for _ in range(STEPS):
        net.zero_grad()
        began = time.perf_counter()
        made = net(batch, z_loss=0.0)
        assert made.answer is not None
        made.answer.sum.backward()
        seconds.append(time.perf_counter() - began)
    print(statistics.median(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way in WAYS:
            done = subprocess.run(
                [sys.executable, __file__, way], capture_output=True, text=True, check=True,
                cwd=Path(__file__).parent.parent, env={"PYTHONPATH": "."},
            )  # fmt: skip
            seconds, megabytes = map(float, done.stdout.split())
            found[way].append((seconds, megabytes))
    for way, rows in found.items():
        seconds, megabytes = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{way:10} {seconds:5.2f} s a step, {megabytes:,.0f} MB at most")


if __name__ == "__main__":
    measure(sys.argv[1]) if sys.argv[1:] else main()
