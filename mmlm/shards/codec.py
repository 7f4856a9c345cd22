"""Sample ↔ the members of one tar sample. Never pickled, never unpickled.

`json` holds all that is not an array, `tokens.npy` int32, `image<n>.png|webp` the pictures without loss,
`audio<n>.npy` the log-mels as float16; n counts from 0 in order of the slots.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import numpy as np
from PIL import Image

from mmlm.errors import DataError
from mmlm.features.sample import Sample

_ARRAYS = ("tokens", "images", "sounds")
_PLAIN = tuple(f.name for f in fields(Sample) if f.name not in _ARRAYS)
_MEDIA = re.compile(r"(image|audio)(\d+)\.(png|webp|npy)")


def sample_key(record_id: str) -> str:
    """The name of a record's members in a tar: 20 hexadecimal digits, whatever the id looks like."""
    return hashlib.sha256(record_id.encode()).hexdigest()[:20]


def pack(sample: Sample, image_codec: Literal["png", "webp"] = "png") -> dict[str, bytes]:
    """Extension → bytes, sorted by extension; the same sample gives the same bytes."""
    plain = {name: getattr(sample, name) for name in _PLAIN}
    members = {
        "json": json.dumps(plain, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode(),
        "tokens.npy": _npy(sample.tokens.astype(np.int32, copy=False)),
    }
    for i, image in enumerate(sample.images):
        codec = "png" if image.shape[-1] == 1 else image_codec  # WebP has no grey: it would come back as colour
        members[f"image{i}.{codec}"] = _encode_image(image, codec)
    for i, sound in enumerate(sample.sounds):
        members[f"audio{i}.npy"] = _npy(sound.astype(np.float16, copy=False))
    return dict(sorted(members.items()))


def unpack(members: Mapping[str, bytes]) -> Sample:
    """The inverse of `pack`. Raises DataError when a member is missing or broken."""
    try:
        plain: dict[str, Any] = json.loads(members["json"])
        sample = Sample(tokens=_array(members["tokens.npy"], np.int32, 1), **{name: plain[name] for name in _PLAIN})
        sample.context_spans = [(int(a), int(b)) for a, b in sample.context_spans]
        media = sorted((m[1], int(m[2]), m[0]) for m in map(_MEDIA.fullmatch, members) if m)
        for kind, _, extension in media:
            if kind == "image":
                sample.images.append(_decode_image(members[extension]))
            else:
                sample.sounds.append(_array(members[extension], np.float16, 2))
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise DataError(
            f"a sample of a shard cannot be read ({type(error).__name__}: {error})",
            cure="run `mmlm verify` on the shards",
        ) from None
    return sample


def task_of(data: bytes) -> str:
    """The task named in a sample's `json` member."""
    return str(json.loads(data)["task"])


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def _array(data: bytes, dtype: type[np.generic], ndim: int) -> np.ndarray:
    array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    if array.dtype != dtype or array.ndim != ndim:
        raise ValueError(f"an array of {array.dtype} with {array.ndim} axes")
    return array


def _encode_image(pixels: np.ndarray, codec: str) -> bytes:
    """(H, W, C) uint8 → bytes, without loss, at a fixed effort so that the bytes are reproducible."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    out = io.BytesIO()
    if codec == "png":
        picture.save(out, "PNG", compress_level=4)
    else:
        picture.convert("RGB").save(out, "WEBP", lossless=True, quality=50, method=3)
    return out.getvalue()


def _decode_image(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as picture:
        pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels
