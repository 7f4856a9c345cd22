"""Settings of the stage `shard`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmlm.config import Config
from mmlm.features.config import FeaturesConfig


class ShardConfig(Config):
    """How a Manifest becomes a ShardSet."""

    features: FeaturesConfig = FeaturesConfig()
    """What every record is turned into."""
    shard_records: int = Field(default=1000, ge=1)
    """Records in one shard, at most."""
    shard_bytes: int = Field(default=256 << 20, ge=1 << 16)
    """Estimated bytes of one shard, at most; the estimate is an upper one, made from the feature sizes."""
    error_budget: float = Field(default=0.02, ge=0.0, le=1.0)
    """Share of the records that may fail and go to quarantine before the stage stops."""
    image_codec: Literal["png", "webp", "jpeg", "raw"] = "png"
    """How pictures are stored: `webp` is smaller than `png`, `png` is read everywhere, `jpeg` loses something; `raw` is
    patches of plain bytes, large, and nothing to decode when training. Grey pictures that should be `webp` are `png`."""
    image_quality: int | None = Field(default=None, ge=1, le=100)
    """Quality of `jpeg` and `webp`. None: `webp` loses nothing, `jpeg` takes 90. `png` and `raw` never lose anything."""
    ray_from: int = Field(default=2000, ge=0)
    """From how many records on Ray workers are used; below, one process is faster than starting Ray."""
