"""Pretrained encoders as stems (`model.image_encoder`, `model.audio_encoder`): what their folders say, and their weights.

Read as `features.encoders` reads them: only safetensors are opened, and no code that comes with them is run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from mmlm.errors import ConfigError
from mmlm.features.config import EncoderConfig
from mmlm.features.spec import AudioSpec, FeatureSpec, ImageSpec
from mmlm.model.config import ModelConfig
from mmlm.model.stem_config import AudioEncoderConfig, ImageEncoderConfig
from mmlm.model.transformer import FusedTransformer
from mmlm.shards import encoder_checkpoint
from mmlm.shards.encoder_files import digest, folder_of
from mmlm.shards.encoder_inputs import Pictures

KINDS: tuple[Literal["image", "audio"], ...] = ("image", "audio")
LEFT_OUT = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "id2label", "label2id",
            "suppress_tokens", "begin_suppress_tokens")  # fmt: skip
"""What of a config.json does not change what an encoder computes."""
DROPPED = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob",
           "encoder_layerdrop", "drop_path_rate")  # fmt: skip
"""Shares that are dropped while training: none here."""
MOVED = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
"""By how much DINOv3 moves positions at random while training: not at all."""


def named(config: ModelConfig) -> dict[str, ImageEncoderConfig | AudioEncoderConfig]:
    """image, audio → the encoder through which they enter, of those that have one."""
    found = {kind: getattr(config, f"{kind}_encoder") for kind in KINDS}
    return {kind: one for kind, one in found.items() if one is not None}


def settle(config: ModelConfig, spec: FeatureSpec) -> ModelConfig:
    """The config with what its encoders' folders say filled in. Raises ConfigError when a folder is not what it should be, or
    the shards do not hold what the encoder reads."""
    made = {f"{kind}_encoder": _settled(kind, one, spec) for kind, one in named(config).items()}
    return config.model_copy(update=made)


def _settled(
    kind: str, one: ImageEncoderConfig | AudioEncoderConfig, spec: FeatureSpec
) -> ImageEncoderConfig | AudioEncoderConfig:
    key = f"train.model.{kind}_encoder"
    if not one.folder:
        raise ConfigError(f"{key} has no folder", wanted="where the encoder lies", cure=f"set {key}.folder")
    stored = _stored(spec, kind, key)
    asked = EncoderConfig(folder=one.folder)
    with _named(key):
        found = digest(asked)
        settings, reader = encoder_checkpoint.settings_of(asked, stored)
    if one.digest not in ("", found):
        raise ConfigError(
            f"the encoder in {one.folder} has the digest {found[:12]}", wanted=one.digest[:12],
            cure=f"give the folder with that content, or leave {key}.digest away",
        )  # fmt: skip
    kept = {k: v for k, v in settings.items() if k not in LEFT_OUT}
    kept |= {name: 0.0 for name in DROPPED if name in kept} | {name: None for name in MOVED if name in kept}
    update: dict[str, Any] = {"folder": folder_of(asked), "digest": found, "settings": kept}
    if isinstance(one, AudioEncoderConfig):
        assert isinstance(stored, AudioSpec)
        kept["max_source_positions"] = _positions(one, stored, int(kept["max_source_positions"]), key)
    else:
        assert isinstance(stored, ImageSpec) and isinstance(reader, Pictures)
        update |= _pictures(reader, stored, kept, one.folder)
    with _named(key):
        encoder_checkpoint.shape_of(asked, reader)  # a picture of the preprocessor's size may be none of the encoder's
    return one.model_copy(update=update)


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    """What is wrong with a checkpoint is told with the key that asks for it: features.encoders reads checkpoints, too."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error.found}", wanted=error.wanted, cure=error.cure) from None


def nameless(config: ModelConfig) -> ModelConfig:
    """The config without the folders, which are no part of what a model is."""
    return _without(config, ("folder",))


def by_digest(config: ModelConfig) -> ModelConfig:
    """The config with the digests in place of all that the folders say: another version of transformers fills in other
    defaults, and the encoder is the same."""
    return _without(config, ("folder", "settings", "size", "mean", "deviation"))


def _without(config: ModelConfig, names: tuple[str, ...]) -> ModelConfig:
    made = {}
    for kind, one in named(config).items():
        fields = {n: f.get_default() for n, f in type(one).model_fields.items() if n in names}
        made[f"{kind}_encoder"] = one.model_copy(update=fields)
    return config.model_copy(update=made)


def take_over(model: FusedTransformer, config: ModelConfig, spec: FeatureSpec) -> None:
    """Give `model` the weights of its encoders, on every rank by itself. Raises ConfigError when one lacks, or is no number."""
    for kind, one in named(config).items():
        with _named(f"train.model.{kind}_encoder"):
            given = encoder_checkpoint.weights_of(EncoderConfig(folder=one.folder), getattr(spec, kind)).state_dict()
        encoder = getattr(model, kind).project.encoder
        own = encoder.state_dict()
        for name, tensor in own.items():
            if name.endswith("embed_positions.weight"):  # of Whisper, of which a shorter one knows the first
                given[name] = given[name][: len(tensor)]
        if wrong := [name for name in own if not given[name].isfinite().all()]:
            raise ConfigError(
                f"train.model.{kind}_encoder: {wrong[0]} in {one.folder} has values that are not numbers",
                wanted="numbers in all tensors: every loss would be none", cure="use another checkpoint",
            )  # fmt: skip
        encoder.load_state_dict({name: given[name] for name in own})


def _stored(spec: FeatureSpec, kind: str, key: str) -> ImageSpec | AudioSpec:
    stored: ImageSpec | AudioSpec | None = getattr(spec, kind)
    if stored is None:
        raise ConfigError(
            f"{key}, and shards without features.{kind}", wanted="shards that hold what the encoder reads",
            cure=f"set features.{kind} in shard.yaml, or leave {kind}_encoder away",
        )  # fmt: skip
    if (read := spec.encoders.get(kind)) and read.read:
        raise ConfigError(
            f"{key}, and features.encoders.{kind} with read: true", wanted="one of them",
            cure=f"leave {kind}_encoder away, or make the shards with read: false",
        )  # fmt: skip
    if isinstance(stored, ImageSpec) and (stored.scale, stored.padding) != ("fixed", "keep"):
        raise ConfigError(
            f"{key}, and pictures stored with scale {stored.scale} and padding {stored.padding}",
            wanted="scale fixed and padding keep: the encoder was trained on whole pictures with their own light",
            cure="set features.image.scale: fixed and features.image.padding: keep, and make the shards again",
        )  # fmt: skip
    return stored


def _pictures(reader: Pictures, stored: ImageSpec, settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """The fields of ImageEncoderConfig that the folder decides."""
    width, height = reader.size
    patch = settings.get("patch_size")
    if reader.timm or width != height or not isinstance(patch, int) or width % patch:
        raise ConfigError(
            f"the encoder in {folder} is no vision Transformer with square pictures and patches",
            wanted="ViT, DeiT, DINO, CLIP or SigLIP as transformers writes them",
            cure="let it make the features of the shards (features.encoders.image)",
        )
    side, ours = width // patch, stored.size // stored.patch
    if side % ours:
        fitting = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
        raise ConfigError(
            f"pictures of {ours} × {ours} patches (features.image.size / features.image.patch)",
            wanted=f"a side that {side} is a multiple of, since the encoder in {folder} has {side} × {side}: {fitting}",
            cure=f"set features.image: {{size: {width}, patch: {patch}}} and make the shards again",
        )
    white = 255 * reader.factor
    mean, deviation = (
        tuple(float(v) / white for v in np.broadcast_to(one, (reader.channels,)))
        for one in (reader.mean, reader.deviation)
    )
    return {"size": width, "mean": mean, "deviation": deviation}


def _positions(config: AudioEncoderConfig, stored: AudioSpec, most: int, key: str) -> int:
    """Positions of the encoder, two mel frames each."""
    each = stored.frames_per_token
    if each % 2:
        raise ConfigError(
            f"{key}, and features.audio.frames_per_token = {each}", wanted="an even number: the encoder makes a token of two",
            cure="change features.audio.frames_per_token and make the shards again",
        )  # fmt: skip
    frames = 2 * most
    if config.seconds is not None:
        frames = -(-round(config.seconds * stored.sample_rate / stored.hop) // each) * each
    if frames % each or frames > 2 * most or frames < stored.max_frames:
        unit = stored.hop / stored.sample_rate
        raise ConfigError(
            f"{key}.seconds = {config.seconds or frames * unit:g}",
            wanted=f"from {stored.max_frames * unit:g}, the longest sound of the shards, to {2 * most * unit:g}, in "
            f"whole stacks of {each} frames",
            cure=f"set {key}.seconds so, or change features.audio.frames_per_token and make the shards again",
        )
    return frames // 2
