"""Pretrained encoders for what people ask: the checkpoints that the shard set was made with run on their pictures and
sounds, so that the model reads what it was trained on.

The model knows their digests, not where they lie: MMLM_ENCODERS says so, `image=/models/vit,audio=/models/whisper`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from mmlm.errors import ConfigError
from mmlm.features.config import EncoderConfig
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec
from mmlm.shards.encoder_files import digest
from mmlm.shards.encoders import PretrainedEncoder

PLACES = "MMLM_ENCODERS"
KINDS: tuple[Literal["image", "audio"], ...] = ("image", "audio")


def places(given: str | None = None) -> dict[str, str]:
    """kind → folder, from `given` or the environment. Raises ConfigError when that does not read as such."""
    text = os.environ.get(PLACES, "") if given is None else given
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, equals, folder = part.partition("=")
        if not equals or kind not in KINDS:
            raise ConfigError(f"an encoder {part!r}", wanted="KIND=FOLDER, such as image=/models/vit")
        found[kind] = folder
    return found


def find(spec: FeatureSpec, folders: Mapping[str, str]) -> dict[str, PretrainedEncoder]:
    """The encoders whose features the model reads and whose folders are known; weights are read at the first question.

    Raises ConfigError when a folder holds another checkpoint than the shard set was made with.
    """
    found: dict[str, PretrainedEncoder] = {}
    for kind in KINDS:
        told = spec.encoder(kind)
        if told is None or kind not in folders:
            continue
        layer: Any = "pooled" if told.tokens == 1 else "last"
        config = EncoderConfig(folder=os.path.abspath(os.path.expanduser(folders[kind])), layer=layer, batch=1)
        if (here := digest(config)) != told.digest:
            raise ConfigError(
                f"the {kind} encoder in {folders[kind]} has the digest {here[:12]}",
                wanted=f"{told.digest[:12]}, that of the shard set", cure="give the folder that it was made with",
            )  # fmt: skip
        found[kind] = PretrainedEncoder(config, told, getattr(spec, kind))
    return found


def add_features(sample: Sample, encoders: Mapping[str, PretrainedEncoder]) -> None:
    """What the encoders make of the pictures and sounds of `sample`, put into it."""
    for kind, encoder in encoders.items():
        items = sample.images if kind == "image" else sample.sounds
        sample.features[kind] = [encoder.encode([item])[0] for item in items]
