"""Random changes to training samples, from a generator that the caller seeds by position."""

from __future__ import annotations

import dataclasses

import numpy as np

from mmlm.data.config import AugmentConfig
from mmlm.features.sample import Sample


def augment(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """A changed copy of `sample`; `sample` itself, and its arrays, stay as they are."""
    if config == AugmentConfig():
        return sample
    return dataclasses.replace(
        sample,
        images=[_picture(x, config, rng) for x in sample.images],
        sounds=[_sound(x, config, rng) for x in sample.sounds],
    )


def _picture(x_HWC: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    if config.flip and rng.random() < 0.5:
        x_HWC = x_HWC[:, ::-1]
    if config.shift:
        down, right = rng.integers(-config.shift, config.shift + 1, 2)
        n = config.shift
        padded = np.pad(x_HWC, ((n, n), (n, n), (0, 0)), mode="edge")
        H, W, _ = x_HWC.shape
        x_HWC = padded[n + down : n + down + H, n + right : n + right + W]
    if config.contrast:
        factors = rng.uniform(1 - config.contrast, 1 + config.contrast, x_HWC.shape[-1])
        x_HWC = np.clip(x_HWC * factors, 0, 255).astype(np.uint8)
    return x_HWC


def _sound(x_FM: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    frames, mels = x_FM.shape
    if config.time_mask:
        width = int(rng.integers(0, int(frames * config.time_mask) + 1))
        first = int(rng.integers(0, frames - width + 1))
        x_FM = x_FM.copy()
        x_FM[first : first + width] = x_FM.min()
    if config.mel_mask:
        width = int(rng.integers(0, min(config.mel_mask, mels) + 1))
        first = int(rng.integers(0, mels - width + 1))
        x_FM = x_FM.copy()
        x_FM[:, first : first + width] = x_FM.min()
    return x_FM
