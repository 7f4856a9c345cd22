"""Sample ↔ the members of one tar sample. Never pickled, never unpickled.

`json` holds all that is not an array, `tokens.npy` int32, `image<n>.png|webp|jpg|npy` the pictures, `audio<n>.npy` the
log-mels as float16 or float32; n counts from 0 in order of the slots. A picture as `.npy` is its raw patches, uint8
(tokens, patch_dim): rows are the patches from left to right and top to bottom, each laid out (patch, patch, channels),
as the model's patch embedding reads them. `features_image<n>.npy` and `features_audio<n>.npy`, float16 (tokens, dim), are
what pretrained encoders made of them, where there are any.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from PIL import Image

from mmlm.errors import DataError
from mmlm.features.borders import Border, kept_positions
from mmlm.features.image import opencv
from mmlm.features.image_header import read_jpeg, read_png
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec, ImageSpec

ImageCodec = Literal["png", "webp", "jpeg", "raw"]
JPEG_QUALITY = 90
"""Where the config names none: JPEG cannot keep everything."""
MAX_STORED_PIXELS = 16 << 20
"""Pixels of a stored picture; more is no picture of ours and is not decoded."""
_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))
_ARRAYS = ("tokens", "images", "sounds", "features")
_PLAIN = tuple(f.name for f in fields(Sample) if f.name not in _ARRAYS)
_WHERE_ANY = ("borders",)
"""Of _PLAIN, what is stored only where there is some: other samples have the bytes that they had before it."""
_MEDIA = re.compile(r"(?:(image)(\d{1,6})\.(?:png|webp|jpg|npy)|(audio)(\d{1,6})\.npy)")
_FEATURES = re.compile(r"features_(image|audio)(\d{1,6})\.npy")


def sample_key(record_id: str) -> str:
    """The name of a record's members in a tar: 20 hexadecimal digits, whatever the id looks like."""
    return hashlib.sha256(record_id.encode()).hexdigest()[:20]


def pack(
    sample: Sample, image_codec: ImageCodec = "png", image_quality: int | None = None, patch: int | None = None
) -> dict[str, bytes]:
    """Extension → bytes, sorted by extension; the same sample gives the same bytes.

    `image_quality` None: without loss where the codec can. `patch`: side of a patch in pixels, for `raw`; None: the
    whole picture is one.
    """
    plain = {name: getattr(sample, name) for name in _PLAIN if name not in _WHERE_ANY or getattr(sample, name)}
    members = {
        "json": _JSON.encode(plain).encode(),
        "tokens.npy": _npy(sample.tokens.astype(np.int32, copy=False)),
    }
    for i, image in enumerate(sample.images):
        ending, data = _encode_image(image, image_codec, image_quality, patch)
        members[f"image{i}.{ending}"] = data
    for i, sound in enumerate(sample.sounds):
        members[f"audio{i}.npy"] = _npy(sound if sound.dtype == np.float32 else sound.astype(np.float16, copy=False))
    return dict(sorted({**members, **pack_features(sample.features)}.items()))


def pack_features(features: Mapping[str, list[np.ndarray]]) -> dict[str, bytes]:
    """Extension → bytes of the features of pretrained encoders."""
    return {
        f"features_{kind}{i}.npy": _npy(one.astype(np.float16, copy=False))
        for kind, some in features.items()
        for i, one in enumerate(some)
    }


def unpack(members: Mapping[str, bytes], features: bool = False) -> Sample:
    """The inverse of `pack`; the features of pretrained encoders only on demand, since training does not read them yet.

    Raises DataError when a member is missing or broken.
    """
    try:
        plain: dict[str, Any] = json.loads(members["json"])
        sample = Sample(
            tokens=_array(members["tokens.npy"], (np.int32,), 1),
            **{name: plain[name] for name in _PLAIN if name in plain},
        )
        sample.context_spans = [(int(a), int(b)) for a, b in sample.context_spans]
        sample.borders = _borders(plain)
        media = sorted((m[1] or m[3], int(m[2] or m[4]), m[0]) for m in map(_MEDIA.fullmatch, members) if m)
        for kind, _, extension in media:
            if kind == "image":
                sample.images.append(_decode_image(members[extension], extension.rpartition(".")[2]))
            else:
                sample.sounds.append(_array(members[extension], (np.float16, np.float32), 2))
        encoded = sorted((m[1], int(m[2]), m[0]) for m in map(_FEATURES.fullmatch, members) if m) if features else []
        for kind, _, extension in encoded:
            sample.features.setdefault(kind, []).append(_array(members[extension], (np.float16,), 2))
    except MemoryError:
        raise
    except Exception as error:  # numpy alone raises half a dozen kinds on a broken header, TokenError among them
        raise DataError(
            f"a sample of a shard cannot be read ({type(error).__name__}: {error})",
            cure="run `mmlm verify` on the shards",
        ) from None
    return sample


def stored_images(members: Mapping[str, bytes]) -> list[np.ndarray]:
    """The pictures in `members` as they will be read, which is not what was packed where the codec loses something."""
    found = sorted((int(m[2]), m[0]) for m in map(_MEDIA.fullmatch, members) if m and m[1])
    return [_decode_image(members[extension], extension.rpartition(".")[2]) for _, extension in found]


@dataclass(frozen=True, slots=True)
class Glance:
    """What a pack plan asks of a sample. `length` counts positions with media slots opened, `tokens` with them closed."""

    task: str
    source: str
    tokens: int
    length: int


def glance(members: Mapping[str, bytes], spec: FeatureSpec) -> Glance:
    """A look at a sample that decodes no picture or sound. Raises DataError when a member is missing or broken."""
    try:
        plain = json.loads(members["json"])
        tokens = length = _rows(members["tokens.npy"])
        for found in filter(None, map(_MEDIA.fullmatch, members)):
            if found[1] and spec.image:
                length += _encoded(members, spec, "image", found[2]) or _kept(plain, spec.image, int(found[2]))
                length -= 1
            elif found[3] and spec.audio:
                length += _encoded(members, spec, "audio", found[4]) or spec.audio_positions([_rows(members[found[0]])])
                length -= 1
        if plain["fields"] and spec.fields:
            length += len(spec.fields.names) - 1
        return Glance(str(plain["task"]), str(plain.get("source", "")), tokens, length)
    except (KeyError, TypeError, ValueError, SyntaxError, IndexError) as error:
        raise DataError(
            f"a sample of a shard cannot be read ({type(error).__name__}: {error})",
            cure="run `mmlm verify` on the shards",
        ) from None


def _borders(plain: Mapping[str, Any]) -> list[Border]:
    """Those stored with a sample. Raises ValueError and the like when they are none."""
    found = [(int(rows), int(columns)) for rows, columns in plain.get("borders", ())]
    if any(side < 0 for border in found for side in border):
        raise ValueError(f"a border of {found}")
    return found


def _kept(plain: Mapping[str, Any], spec: ImageSpec, number: int) -> int:
    """Positions of picture `number`; at most, in shards that were made before borders were stored."""
    borders = _borders(plain) if spec.padding == "drop" else []
    return kept_positions(borders[number], spec) if borders else spec.tokens


def _encoded(members: Mapping[str, bytes], spec: FeatureSpec, kind: Literal["image", "audio"], number: str) -> int:
    """Tokens of an encoder that are read in place of a picture or sound; 0 where they are not."""
    return _rows(members[f"features_{kind}{int(number)}.npy"]) if spec.encoder(kind) else 0


def _rows(data: bytes) -> int:
    """The first axis of the array in an `.npy` member, by its header."""
    return _read_header(bytes(data[: 10 + int.from_bytes(data[8:10], "little")]))[0][0]


def _npy(array: np.ndarray) -> bytes:
    return _npy_header(array.dtype.str, array.shape) + array.tobytes()


@functools.lru_cache(1024)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What stands before the values in numpy's format 1.0; made once, since it takes longer than the values."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


def _array(data: bytes, dtypes: tuple[type[np.generic], ...], ndim: int) -> np.ndarray:
    """The array in an `.npy` member, which must be as large as its header says."""
    shape, dtype = _read_header(bytes(data[: 10 + int.from_bytes(data[8:10], "little")]))
    if dtype not in dtypes or len(shape) != ndim:
        raise ValueError(f"an array of {dtype} with {len(shape)} axes")
    at = 10 + int.from_bytes(data[8:10], "little")
    if math.prod(shape) * dtype.itemsize != len(data) - at:
        raise ValueError(f"an array of {shape} in {len(data)} bytes")
    return np.frombuffer(data, dtype, offset=at).reshape(shape).copy()


@functools.lru_cache(1024)
def _read_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type by the header of an array; read once, since that takes longer than the values."""
    opened = io.BytesIO(header)
    if np.lib.format.read_magic(opened) != (1, 0):
        raise ValueError("an array of another format than 1.0")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(opened)
    if by_columns or any(side < 0 for side in shape):
        raise ValueError("an array laid out by columns")
    return shape, dtype


def _encode_image(pixels: np.ndarray, codec: str, quality: int | None, patch: int | None) -> tuple[str, bytes]:
    """(ending, bytes) of (H, W, C) uint8, at a fixed effort so that the bytes are reproducible.

    WebP has no grey, a picture would come back as colour: grey is stored as PNG then.
    """
    if codec == "raw":
        return "npy", _npy(_patches(pixels, patch))
    grey = pixels.shape[-1] == 1
    if codec == "jpeg":
        import simplejpeg

        kind = "GRAY" if grey else "RGB"
        made: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality or JPEG_QUALITY, kind, "420")
        return "jpg", made
    if codec == "webp" and not grey:
        out = io.BytesIO()
        if quality is None:
            Image.fromarray(pixels).save(out, "WEBP", lossless=True, quality=50, method=3)
        else:
            Image.fromarray(pixels).save(out, "WEBP", quality=quality, method=3)
        return "webp", out.getvalue()
    return "png", _encode_png(pixels)


def _encode_png(pixels: np.ndarray) -> bytes:
    """All filters and run lengths: as small as Pillow's level 4 within a few per cent, in a third of its time."""
    cv2 = opencv()
    settings = [cv2.IMWRITE_PNG_COMPRESSION, 3, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    done, made = cv2.imencode(".png", pixels if pixels.shape[-1] == 1 else pixels[..., ::-1], settings)
    if not done:
        raise ValueError(f"a picture of shape {pixels.shape} cannot be written")
    return bytes(made)


def _decode_image(data: bytes, ending: str) -> np.ndarray:
    """(H, W, C) uint8. What stands in the header is checked before anything is decoded. Raises ValueError, OSError."""
    if ending == "npy":
        return _unpatch(_array(data, (np.uint8,), 2))
    if ending == "jpg":
        return _decode_jpeg(data)
    if ending == "png" and (header := read_png(data)):
        _check_pixels(header.width, header.height)
        cv2 = opencv()
        kind = cv2.IMREAD_GRAYSCALE if header.channels == 1 else cv2.IMREAD_COLOR_RGB
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), kind | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None or pixels.shape[:2] != (header.height, header.width):
            raise ValueError("a broken PNG")
        return pixels[..., None] if header.channels == 1 else pixels
    with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as picture:
        _check_pixels(*picture.size)
        pixels = np.asarray(picture)
    if pixels.dtype != np.uint8 or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise ValueError(f"a picture of {pixels.dtype} and shape {pixels.shape}")
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _decode_jpeg(data: bytes) -> np.ndarray:
    import simplejpeg

    header = read_jpeg(data)
    if header is None or header.components not in (1, 3) or header.progressive:
        raise ValueError("a JPEG that is not ours")
    _check_pixels(header.width, header.height)
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, "GRAY" if header.components == 1 else "RGB")
    return pixels


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_STORED_PIXELS:
        raise ValueError(f"a picture of {width} × {height} pixels")


def _patches(pixels: np.ndarray, patch: int | None) -> np.ndarray:
    """(H, H, C) → (tokens, patch * patch * C)."""
    side, width, channels = pixels.shape
    p = patch or side
    if side != width or side % p:
        raise ValueError(f"a picture of {side} × {width} pixels is not cut into patches of {p}")
    n = side // p
    return pixels.reshape(n, p, n, p, channels).transpose(0, 2, 1, 3, 4).reshape(n * n, p * p * channels)


def _unpatch(patches: np.ndarray) -> np.ndarray:
    """The inverse of `_patches`. The sides follow: three times a square is never a square."""
    tokens, dim = patches.shape
    n, p, channels = math.isqrt(tokens), math.isqrt(dim), 1
    if p * p != dim:
        p, channels = math.isqrt(dim // 3), 3
    if n * n != tokens or p * p * channels != dim or not n * p:
        raise ValueError(f"{tokens} patches of {dim} values are no picture")
    _check_pixels(n * p, n * p)
    return patches.reshape(n, n, p, p, channels).transpose(0, 2, 1, 3, 4).reshape(n * p, n * p, channels)
