"""What the stem of histograms costs, and which patches it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmlm.config import parse
from mmlm.errors import ConfigError
from mmlm.features.spec import FeatureSpec, ImageSpec
from mmlm.model.flops import Shape
from mmlm.model.hog import HogStem, cell_of, moved_bytes, takes
from mmlm.train.config import TrainConfig
from mmlm.train.devices import Device
from mmlm.train.planning import forecast
from mmlm.train.workload import Workload
from tests.small import SPEC

CPU = Device("cpu", 1e11, 16e9, 1e10, 1e9, per_node=2)


class Moved(TorchDispatchMode):
    """Adds up the bytes that operations read and write; views move none."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        read, written = (
            [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in ((args, kwargs), made)
        )
        if not {t.data_ptr() for t in read} & {t.data_ptr() for t in written}:
            self.bytes += sum(t.numel() * t.element_size() for t in [*read, *written])
        return made


@pytest.mark.parametrize(("size", "patch", "channels"), [(64, 16, 3), (64, 16, 1), (224, 8, 3), (28, 14, 1)])
def test_bytes_of_histograms_are_those_that_operations_move(size: int, patch: int, channels: int):
    spec = ImageSpec(size=size, patch=patch, channels=channels)  # type: ignore[arg-type]
    rows, at = torch.randn(2 * spec.tokens, spec.patch_dim), torch.arange(spec.tokens).repeat(2)
    stem = HogStem(spec, 8)
    with torch.no_grad(), Moved() as counter:
        stem(rows, at)
    assert 2 * moved_bytes(spec) == pytest.approx(counter.bytes, rel=0.15)


def planned(spec: FeatureSpec, stem: str, **changes: Any) -> float:
    """Seconds of a step of 8 records with a picture each."""
    config = parse(
        TrainConfig,
        {"precision": "fp32", "data": {"batch": 8}, "model": {"image_stem": stem, "dropout": 0.0}, **changes},
        "t",
    )
    assert spec.image
    shape = Shape((spec.image.tokens + 6,) * 8, 8, 8, 8 * spec.image.tokens)
    work = Workload(shape, 8, spec.image.tokens + 6, "a test")
    return forecast(config, config.model, spec, work, CPU, 1).seconds["forward_backward"]


def test_forecasts_know_what_histograms_cost():
    spec = SPEC.model_copy(update={"image": ImageSpec(size=224, patch=8, channels=3), "max_len": 900})
    longer = planned(spec, "hog") - planned(spec, "linear")
    assert spec.image
    assert longer == pytest.approx(8 * moved_bytes(spec.image) / CPU.bandwidth, rel=0.1)
    assert longer > 0.05 * planned(spec, "linear")


@pytest.mark.parametrize(("patch", "cell"), [(1, 1), (3, 3), (7, 7), (8, 8), (10, 5), (12, 6), (14, 7), (16, 8)])
def test_patches_are_one_cell_or_several_of_four_pixels_at_least(patch: int, cell: int):
    assert takes(patch) and cell_of(ImageSpec(size=4 * patch, patch=patch, channels=3)) == cell


@pytest.mark.parametrize(
    ("size", "patch", "others"), [(26, 13, "1, 2,"), (66, 11, "1, 2, 3, 6, 66"), (36, 9, "4, 6, 12")]
)
def test_patches_that_would_be_cut_into_single_pixels_are_refused(size: int, patch: int, others: str):
    spec = ImageSpec(size=size, patch=patch, channels=3)
    with pytest.raises(ConfigError, match=f"patches of {patch} pixels.*patches of up to 8.*{others}"):
        HogStem(spec, 8)
    assert not takes(patch)
