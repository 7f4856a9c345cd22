"""Pictures turned and zoomed while training: where each pixel comes from, what is refused, and that only training sees it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.augment import augment, turned
from mmlm.data.config import AugmentConfig
from mmlm.errors import ConfigError
from mmlm.features import spec as feature_spec
from mmlm.train import weights
from mmlm.train.config import TrainConfig
from mmlm.train.validation import Validation
from mmlm.world import World
from tests.data.test_loader import features, loader
from tests.small import sample
from tests.train.runs import SMALL


def noise(size: int, channels: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (size, size, channels), dtype=np.uint8)


def blob(size: int, down: float, right: float) -> np.ndarray:
    """A soft spot, (size, size, 1)."""
    y, x = np.indices((size, size))
    return (255 * np.exp(-((y - down) ** 2 + (x - right) ** 2) / 18)).astype(np.uint8)[..., None]


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (15, 3), (64, 3)])
def test_quarter_turns_are_those_of_numpy(size: int, channels: int):
    x_HWC = noise(size, channels)
    for degrees, quarters in ((0, 0), (90, 1), (-90, -1), (180, 2), (-180, 2)):
        found = turned(x_HWC, degrees, 1.0)
        assert found.dtype == np.uint8 and found.shape == x_HWC.shape
        assert np.abs(found.astype(int) - np.rot90(x_HWC, quarters)).max() <= 1, degrees


def test_a_spot_goes_where_the_turn_and_the_factor_take_it():
    middle = 31.5
    found = turned(blob(64, middle - 10, middle), 30, 1.5)  # above the middle, turned counterclockwise: to the left
    weight = found[..., 0].astype(float)
    down, right = ((axis * weight).sum() / weight.sum() - middle for axis in np.indices((64, 64)))
    assert down == pytest.approx(-15 * math.cos(math.radians(30)), abs=0.1)
    assert right == pytest.approx(-15 * math.sin(math.radians(30)), abs=0.1)


def test_what_lies_outside_repeats_the_edge():
    x_HWC = np.full((32, 32, 3), 255, np.uint8)
    x_HWC[8:24, 8:24] = (200, 30, 60)
    for degrees, zoom in ((45, 1.0), (0, 0.5), (30, 0.4)):
        found = turned(x_HWC, degrees, zoom)
        assert (found[0] == 255).all() and (found[:, -1] == 255).all()
    small = turned(x_HWC, 0, 0.5)[..., 1]
    assert 8**2 * 0.8 < (small < 128).sum() < 8**2 * 1.3  # half as wide as the 16 pixels that it was


def test_factors_are_within_the_range_and_both_ways_alike():
    """Told by the width of a spot, which is as the factor."""
    one, config = sample(1), AugmentConfig(zoom=(0.5, 2.0))
    one.images = [np.repeat(blob(64, 31.5, 31.5), 3, -1)]
    before = one.images[0].copy()
    mass = float((before[..., 0] / 255.0).sum())
    areas = []
    for seed in range(300):
        found = augment(one, config, np.random.default_rng(seed)).images[0]
        areas.append(float((found[..., 0] / 255.0).sum()) / mass)
    factors = np.sqrt(areas)
    assert 0.48 < factors.min() < 0.55 and 1.8 < factors.max() < 2.05
    assert np.log(factors).mean() == pytest.approx(0, abs=0.1)
    assert (one.images[0] == before).all()


def test_settings_that_change_nothing_change_nothing_and_draw_nothing():
    one = sample(1)
    assert augment(one, AugmentConfig(turn=0, zoom=(1, 1)), np.random.default_rng(0)) is one
    plain = augment(one, AugmentConfig(shift=3, contrast=0.3), np.random.default_rng(5))
    asked = augment(one, AugmentConfig(shift=3, contrast=0.3, turn=0, zoom=(1.0, 1.0)), np.random.default_rng(5))
    assert (plain.images[0] == asked.images[0]).all()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"turn": -5}, "turn` = -5"),
        ({"turn": 181}, "turn` = 181"),
        ({"zoom": [1.2, 0.8]}, "the smaller factor comes first"),
        ({"zoom": [0, 1]}, "greater than or equal to 0.1"),
        ({"zoom": [0.9, 11]}, "less than or equal to 10"),
        ({"zoom": [0.9]}, "zoom"),
        ({"zoom": 0.9}, "zoom"),
    ],
)
def test_ranges_that_mean_nothing_are_refused(told: dict[str, object], said: str):
    with pytest.raises(ConfigError, match=said):
        parse(AugmentConfig, told, "test")


TURNING = {
    "batch": 12, "pack": {"kind": "best_fit", "length": 512}, "augment": {"turn": 40, "zoom": [0.7, 1.4], "flip": True},
    "mixture": {"kind": "weighted", "by": "source", "weights": {"chat": 1, "story": 1, "digit": 4}},
}  # fmt: skip


def test_the_same_pictures_on_any_ranks_and_pieces_and_after_seeking(mixed: Artifact):
    plain = loader(mixed.path, {**TURNING, "augment": {}})
    wanted = {step: loader(mixed.path, TURNING).batch(step) for step in (0, 3, 90)}
    assert all(len(batch.patches_PD) for batch in wanted.values())
    assert not torch.equal(wanted[0].patches_PD, plain.batch(0).patches_PD)
    assert not torch.equal(wanted[0].patches_PD, loader(mixed.path, TURNING, seed=6).batch(0).patches_PD)
    for ranks, pieces in ((1, 2), (2, 1), (3, 2)):
        parts = [loader(mixed.path, TURNING, rank, ranks) for rank in range(ranks)]
        for step in (90, 0, 3):
            found = [b for part in parts for b in part.batches(step, pieces)]
            for a, b in zip(features(found), features([wanted[step]]), strict=True):
                assert torch.equal(a, b)


def test_validation_sees_pictures_as_they_are(keypad_shards: Artifact):
    found = []
    for turn in (0, 90):
        changes = {
            "zero": {"stage": 0},
            "validation": {"every": 1},
            "data": {**SMALL["data"], "augment": {"turn": turn}},
        }
        settings = parse(TrainConfig, {**SMALL, **changes}, "test")
        torch.manual_seed(0)
        model = weights.build(settings.model, feature_spec.load(keypad_shards.path)).eval()
        looks = Validation(keypad_shards.path, settings, World(), torch.device("cpu"))
        with torch.no_grad():
            found.append(looks._chunk(model, looks.chunks[0]))
    assert found[0] == found[1]
