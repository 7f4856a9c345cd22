"""Settings of the order and of what happens to a sample on its way into a batch."""

from __future__ import annotations

from pydantic import Field

from mmlm.config import Config


class AugmentConfig(Config):
    """Random changes to training samples; a pure function of (seed, position), so the same on any number of ranks."""

    shift: int = Field(0, ge=0)
    """Pictures are moved by up to this many pixels in both directions, their edge repeated."""
    flip: bool = False
    """Half of the pictures are mirrored left to right."""
    contrast: float = Field(0.0, ge=0, lt=1)
    """Colour channels are scaled by factors from 1 - contrast to 1 + contrast."""
    time_mask: float = Field(0.0, ge=0, lt=1)
    """Up to this share of a sound's frames, in one run, is silenced."""
    mel_mask: int = Field(0, ge=0)
    """Up to this many neighbouring mel bins are silenced (SpecAugment, Park et al. 2019)."""


class DataConfig(Config):
    batch: int = Field(128, ge=1)
    """Records of one optimizer step, over all ranks."""
    modality_dropout: float = Field(0.25, ge=0, le=1)
    """Share of samples that lose some of their modalities, so that the model also answers without them."""
    repeat: dict[str, int] = {}
    """task → how many times an epoch holds each of its records (1 where not named)."""
    cache_bytes: int = Field(512 << 20, ge=0)
    """Decoded samples kept in memory by each rank, bytes."""
    augment: AugmentConfig = AugmentConfig()
