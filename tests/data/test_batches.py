"""Modality dropout, augmentation and collation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmlm.data.augment import augment
from mmlm.data.collate import collate
from mmlm.data.config import AugmentConfig
from mmlm.data.modalities import drop_modalities, keep_modalities
from mmlm.features.spec import AUDIO, CONTEXT, IMAGE
from tests.small import SPEC, sample


def test_taking_a_modality_away_equals_never_having_had_it():
    full = sample(4, ("image", "audio", "context"))
    kept = keep_modalities(full, {"context"})
    assert IMAGE not in kept.tokens and AUDIO not in kept.tokens and CONTEXT in kept.tokens
    assert kept.modalities == ("context",)
    first, last = kept.context_spans[0]
    assert kept.tokens[first] == CONTEXT and last - first == 4
    assert kept.tokens[kept.answer_at :].tolist() == full.tokens[full.answer_at :].tolist()
    bare = keep_modalities(full, set())
    assert bare.tokens.tolist() == sample(4, ()).tokens.tolist() or len(bare.tokens) == len(full.tokens) - 6
    assert keep_modalities(full, set(full.modalities)) is full


def test_modality_dropout_rate_and_variety():
    full = sample(1, ("image", "audio"))
    rng = np.random.default_rng(0)
    seen = Counter(drop_modalities(full, 0.25, rng).modalities for _ in range(4000))
    assert seen[("audio", "image")] / 4000 == pytest.approx(0.75, abs=0.03)
    assert seen[("audio",)] / seen[("image",)] == pytest.approx(1, abs=0.2)
    assert () not in seen
    lone = sample(2, ("image",))
    assert drop_modalities(lone, 1.0, rng) is lone


def test_slots_open_to_as_many_positions_as_features():
    batch = collate([sample(i) for i in range(5)] + [sample(9, ("audio",))], SPEC)
    assert int((batch.tokens_BT == IMAGE).sum()) == len(batch.patches_PD)
    assert int((batch.tokens_BT == AUDIO).sum()) == len(batch.mels_MD)
    assert batch.patches_PD[:4].mean().abs() < 1e-5  # standardised per picture


def test_on_a_fixed_scale_a_picture_keeps_how_bright_it_is_and_of_which_colour():
    assert SPEC.image is not None
    fixed = SPEC.model_copy(update={"image": SPEC.image.model_copy(update={"scale": "fixed"})})
    dark, light = sample(1, ("image",)), sample(1, ("image",))
    dark.images[0] = dark.images[0] // 2
    light.images[0] = 255 - dark.images[0]
    of_dark, of_light = (collate([one], fixed).patches_PD for one in (dark, light))
    assert of_dark.mean() < 0 and np.allclose(of_dark, -of_light, atol=1e-6)
    p, n, (H, W, C) = SPEC.image.patch, SPEC.image.size // SPEC.image.patch, dark.images[0].shape
    back_HWC = of_dark.reshape(n, n, p, p, C).permute(0, 2, 1, 3, 4).reshape(H, W, C)
    assert np.allclose(back_HWC * 63.75 + 127.5, dark.images[0], atol=1e-4)
    assert fixed.digest != SPEC.digest


def test_augmentation_leaves_the_sample_alone_and_stays_in_range():
    one = sample(1)
    before = one.images[0].copy(), one.sounds[0].copy()
    config = AugmentConfig(shift=3, flip=True, contrast=0.3, time_mask=0.3, mel_mask=4)
    changed = augment(one, config, np.random.default_rng(1))
    assert (one.images[0] == before[0]).all() and (one.sounds[0] == before[1]).all()
    assert changed.images[0].shape == before[0].shape and changed.images[0].dtype == np.uint8
    assert not (changed.images[0] == before[0]).all()
    again = augment(one, config, np.random.default_rng(1))
    assert (again.images[0] == changed.images[0]).all() and (again.sounds[0] == changed.sounds[0]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_scales_each_channel(channels: int):
    one = sample(1)
    one.images = [np.random.default_rng(0).integers(0, 256, (16, 16, channels), dtype=np.uint8)]
    found = augment(one, AugmentConfig(contrast=0.3), np.random.default_rng(2)).images[0]
    factors = np.random.default_rng(2).uniform(0.7, 1.3, channels)
    assert (found == np.clip(one.images[0] * factors, 0, 255).astype(np.uint8)).all()
