"""The profile that stands beside the share of a GPU's peak, on a CPU and with work of which the share is known."""

from __future__ import annotations

import time

import torch

from benchmarks.ours import what_is_left


def test_spans_that_overlap_count_once():
    assert what_is_left.covered([(5, 6), (0, 2), (1, 4), (2, 3)]) == 5
    assert what_is_left.covered([]) == 0


def test_idle_time_and_the_largest_kernel_are_found():
    a, seconds = torch.ones(700, 700), []

    def step() -> None:
        begin = time.perf_counter()
        for _ in range(8):
            a @ a
        a.clone()
        seconds.append(time.perf_counter() - begin)
        time.sleep(seconds[-1])  # as long as it worked

    found = what_is_left.look(step, 4, torch.device("cpu"))
    assert 0.3 < found["idle"] < 0.8
    first, *others = found["kernels"].items()
    assert first[0] == "aten::mm" and 0.5 < first[1] <= 1 and all(share < first[1] for _, share in others)
    told = what_is_left.lines(found)
    assert f"{found['idle']:.1%}" in told[0] and f"{first[1]:.1%}  aten::mm" in told[1]
