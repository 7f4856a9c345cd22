"""What an encoder reads, made of what is stored: pictures of its size, log-mels of its length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mmlm.errors import ConfigError
from mmlm.features.config import EncoderConfig
from mmlm.features.spec import AudioSpec, ImageSpec
from mmlm.shards import timm_checkpoint
from mmlm.shards.encoder_files import read_json


class Pictures:
    """Stored pictures → what a vision model reads: its size, its mean and deviation."""

    argument = "pixel_values"

    def __init__(self, config: EncoderConfig, stored: ImageSpec, settings: dict[str, Any]) -> None:
        own, given = settings.get("vision_config", settings), None
        self.timm = settings if timm_checkpoint.is_timm(settings) else None
        if self.timm is not None:
            own = given = timm_checkpoint.preprocessor(settings)
        self.channels = int(own.get("num_channels", 3))
        if self.channels != 3 and self.channels != stored.channels:
            raise ConfigError(
                f"the encoder in {config.folder} reads {self.channels} channels",
                wanted=f"3, or the {stored.channels} of features.image", cure="use another checkpoint",
            )  # fmt: skip
        given = given or read_json(config, "preprocessor_config.json")
        if given is None:
            given = (read_json(config, "processor_config.json") or {}).get("image_processor")
        if not isinstance(given, dict):
            raise ConfigError(
                f"{config.folder} has no preprocessor_config.json", wanted="the size, mean and deviation it was trained on",
                cure="take that file from where the checkpoint came from",
            )  # fmt: skip
        try:
            self.factor = float(given.get("rescale_factor", 1 / 255)) if given.get("do_rescale", True) else 1.0
            normal = given.get("do_normalize", True)
            self.mean = np.array(given["image_mean"] if normal else 0.0, np.float32)
            self.deviation = np.array(given["image_std"] if normal else 1.0, np.float32)
            self.size = _size(given, own)  # (width, height)
            self.resample = Image.Resampling(given.get("resample", Image.Resampling.BICUBIC))
            self.read([np.zeros((1, 1, stored.channels), np.uint8)], 1)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the preprocessor of {config.folder} cannot be used ({type(error).__name__}: {error})",
                wanted="image_mean, image_std, size and resample as transformers writes them",
            ) from None

    def read(self, items: list[np.ndarray], batch: int) -> np.ndarray:
        """(batch, channels, height, width) float32; behind the last item black pictures."""
        width, height = self.size
        pixels = np.zeros((batch, height, width, self.channels), np.uint8)
        for at, item in enumerate(items):
            if item.shape[:2] != (height, width):
                picture = Image.fromarray(item[..., 0] if item.shape[-1] == 1 else item)
                item = np.asarray(picture.resize(self.size, self.resample)).reshape(height, width, -1)
            pixels[at] = item  # grey is repeated
        values = (pixels.astype(np.float32) * np.float32(self.factor) - self.mean) / self.deviation
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))

    def empty(self) -> tuple[int, ...]:
        return (1, self.channels, self.size[1], self.size[0])


class Sounds:
    """Stored log-mels → what a Whisper encoder reads: always its full length."""

    argument = "input_features"

    def __init__(self, config: EncoderConfig, stored: AudioSpec, settings: dict[str, Any]) -> None:
        self.n_mels = int(settings.get("num_mel_bins", 80))
        self.frames = 2 * int(settings.get("max_source_positions", 1500))
        wanted = {"scale": "whisper", "n_mels": self.n_mels, "sample_rate": 16000, "n_fft": 400, "hop": 160}
        if wrong := {name: value for name, value in wanted.items() if getattr(stored, name) != value}:
            raise ConfigError(
                f"features.audio has {', '.join(f'{name} {getattr(stored, name)}' for name in wrong)}",
                wanted=", ".join(f"{name} {value}" for name, value in wrong.items())
                + f", which the encoder in {config.folder} reads",
                cure="set features.audio so, or use another encoder",
            )
        if stored.max_frames > self.frames:
            longest = self.frames * stored.hop / stored.sample_rate
            raise ConfigError(
                f"features.audio.max_seconds = {stored.max_seconds:g}",
                wanted=f"at most {longest:g}, the length that the encoder in {config.folder} reads",
                cure="lower it, or cut the sounds in the scan (`pieces`)",
            )

    def read(self, items: list[np.ndarray], batch: int) -> np.ndarray:
        """(batch, n_mels, frames) float32. A sound is followed by what silence is beside it: 8 decades below its
        loudest value, the floor of the scale, as if zeros had stood behind it before its log-mel was taken.
        """
        values = np.zeros((batch, self.n_mels, self.frames), np.float32)
        for at, item in enumerate(items):
            mel = item.astype(np.float32)
            values[at] = max(-1.5, float(mel.max()) - 2.0)
            values[at, :, : len(mel)] = mel.T
        return values

    def empty(self) -> tuple[int, ...]:
        return (1, self.n_mels, self.frames)


def _size(given: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[int, int]:
    """(width, height) that a vision model was trained on: what its preprocessor cuts out, else makes."""
    size = (given.get("crop_size") if given.get("do_center_crop") else None) or given.get("size") or own["image_size"]
    width: Any
    height: Any
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        width, height = size.get("width", side), size.get("height", side)
    else:
        height, width = size if isinstance(size, list | tuple) else (size, size)
    if not (0 < int(width) <= 4096 and 0 < int(height) <= 4096):
        raise ValueError(f"a size of {width} × {height} pixels")
    return int(width), int(height)
