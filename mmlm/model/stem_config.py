"""Encoders that were trained elsewhere as stems: inside of the model, trained with it.

`features.encoders` is the other way: an encoder that stays outside and as it is, whose features lie in the shards.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mmlm.config import Config


class ImageEncoderConfig(Config):
    """A vision Transformer (ViT, DeiT, DINOv2, CLIP, SigLIP) through which pictures enter in place of `image_stem`."""

    folder: str = ""
    """Its checkpoint as transformers writes it: config.json, preprocessor_config.json and safetensors. Its content counts,
    not where it lies: in a finished model only `digest` is left."""
    digest: str = ""
    """sha256 of its files; given, another content is refused."""
    settings: dict[str, Any] = {}
    """Its config.json; filled in."""
    size: int = 0
    """Side of the pictures that it reads, pixels; filled in."""
    mean: tuple[float, ...] = ()
    """Of each channel where black is 0 and white 1; filled in."""
    deviation: tuple[float, ...] = ()
    """Standard deviation of each channel; filled in."""


class AudioEncoderConfig(Config):
    """The encoder of a Whisper through which sounds enter in place of `audio_stem`."""

    folder: str = ""
    """Its checkpoint as transformers writes it: config.json and safetensors. Its content counts, not where it lies: in a
    finished model only `digest` is left."""
    digest: str = ""
    """sha256 of its files; given, another content is refused."""
    seconds: float | None = Field(None, gt=0)
    """Length that every sound is filled up to with silence; default the 30 s that it was trained on. Less costs less time, and
    the positions behind are left out."""
    settings: dict[str, Any] = {}
    """Its config.json; filled in."""
