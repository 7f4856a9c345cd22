"""Random changes to training samples, from a generator that the caller seeds by position."""

from __future__ import annotations

import dataclasses
import math
from typing import Final, Literal

import numpy as np

from mmlm.data.config import AugmentConfig
from mmlm.errors import ConfigError
from mmlm.features.image import opencv
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec

CHANGES: Final[dict[Literal["image", "audio"], tuple[str, ...]]] = {
    "image": ("shift", "flip", "turn", "zoom", "contrast"),
    "audio": ("time_mask", "mel_mask"),
}
"""Kind of media → the settings that change it."""


def augment(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    """A changed copy of `sample`; `sample` itself, and its arrays, stay as they are."""
    if config == AugmentConfig():
        return sample
    return dataclasses.replace(
        sample,
        images=[_picture(x, config, rng) for x in sample.images],
        sounds=[_sound(x, config, rng) for x in sample.sounds],
    )


def refuse(config: AugmentConfig, spec: FeatureSpec) -> None:
    """Raise ConfigError where a medium is to be changed of which the model reads what an encoder made of it, and stored."""
    usual = AugmentConfig()
    for kind, names in CHANGES.items():
        asked = [f"data.augment.{name}" for name in names if getattr(config, name) != getattr(usual, name)]
        if asked and spec.encoder(kind):
            raise ConfigError(
                f"{', '.join(asked)}, and models read what an encoder made of each {kind}, which is stored and does not change",
                wanted=f"augmentation of {kind} only where models read it itself",
                cure=f"take that away, or make the shards with features.encoders.{kind}.read: false",
            )  # fmt: skip


def _picture(x_HWC: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    if config.flip and rng.random() < 0.5:
        x_HWC = x_HWC[:, ::-1]
    if config.resamples:  # drawn only when asked for: what other settings draw stays as it was
        degrees, zoom = rng.uniform(-config.turn, config.turn), rng.uniform(*np.log(config.zoom))
        x_HWC = turned(x_HWC, degrees, math.exp(zoom))
    if config.shift:
        down, right = rng.integers(-config.shift, config.shift + 1, 2)
        n = config.shift
        padded = np.pad(x_HWC, ((n, n), (n, n), (0, 0)), mode="edge")
        H, W, _ = x_HWC.shape
        x_HWC = padded[n + down : n + down + H, n + right : n + right + W]
    if config.contrast:
        factors = rng.uniform(1 - config.contrast, 1 + config.contrast, x_HWC.shape[-1])
        made = np.clip(np.arange(256)[:, None] * factors, 0, 255).astype(np.uint8)  # what each value becomes
        x_HWC = opencv().LUT(np.ascontiguousarray(x_HWC), made[None]).reshape(x_HWC.shape)
    return x_HWC


def turned(x_HWC: np.ndarray, degrees: float, zoom: float) -> np.ndarray:
    """The picture turned counterclockwise and enlarged about its middle in one bilinear resampling, as large as before; what
    lies outside of it repeats its edge."""
    cv2 = opencv()
    H, W, _ = x_HWC.shape
    down, right = (H - 1) / 2, (W - 1) / 2
    c, s = (f(math.radians(degrees)) / zoom for f in (math.cos, math.sin))
    # From a pixel of the new picture to where it lies in the old one. The middle of the outermost pixels is the centre, so that
    # quarter turns of squares meet pixels exactly.
    back = np.array([[c, -s, right - c * right + s * down], [s, c, down - s * right - c * down]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    found = cv2.warpAffine(np.ascontiguousarray(x_HWC), back, (W, H), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(found).reshape(x_HWC.shape)  # OpenCV leaves out an axis of one channel


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
