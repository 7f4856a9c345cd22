"""Batches in page-locked memory, copied beside the computation; skips itself without a CUDA device."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.config import DataConfig
from mmlm.data.loader import Loader
from mmlm.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_are_those_of_the_cpu(keypad_shards: Artifact, workers: int):
    config = parse(DataConfig, {"batch": 16}, "test")
    pinned = Loader(keypad_shards.path, config, 1, World(), 20, workers=workers, pin=True)
    plain = Loader(keypad_shards.path, config, 1, World(), 20)
    for step in (0, 1, 2, 9, 4):
        for there, here in zip(pinned.batches(step, 2), plain.batches(step, 2), strict=True):
            moved = there.to("cuda")
            for field in dataclasses.fields(here):
                tensor = getattr(here, field.name)
                if isinstance(tensor, torch.Tensor):
                    assert getattr(there, field.name).is_pinned() or not tensor.numel()
                    assert torch.equal(getattr(moved, field.name).cpu(), tensor)
    pinned.close()
