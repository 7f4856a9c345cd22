from __future__ import annotations

from typing import Any

import pytest

from mmlm.config import parse
from mmlm.errors import ConfigError
from mmlm.shards.config import ShardConfig


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"image": {"size": 0, "patch": 8, "channels": 1}}, "`features.image.size` = 0: "),
        ({"image": {"size": 16, "patch": 0, "channels": 1}}, "`features.image.patch` = 0: "),
        ({"image": {"size": 16, "patch": 7, "channels": 1}}, "size 16 must be a multiple of patch 7"),
        ({"image": {"size": 8, "patch": 16, "channels": 1}}, "size 8 must be a multiple of patch 16"),
        ({"audio": {"hop": 0}}, "`features.audio.hop` = 0: "),
        ({"audio": {"max_seconds": -1}}, "`features.audio.max_seconds` = -1: "),
        ({"audio": {"max_seconds": 0.001}}, "max_seconds 0.001 is no whole hop, which is 0.01 s"),
        ({"audio": {"frames_per_token": 0}}, "`features.audio.frames_per_token` = 0: "),
        ({"audio": {"floor": 0}}, "`features.audio.floor` = 0: "),
        ({"max_len": 0}, "`features.max_len` = 0: "),
    ],
)
def test_settings_that_no_picture_or_sound_can_have_are_refused(given: dict[str, Any], words: str) -> None:
    """Before any worker meets them."""
    with pytest.raises(ConfigError) as caught:
        parse(ShardConfig, {"features": given}, "shard.yaml")
    assert words in str(caught.value)
