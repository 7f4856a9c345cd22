"""Pictures and sounds of a question: one or several of each, as bytes, base64 or paths."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmlm.errors import DataError
from mmlm.features.image import MAX_PIXELS
from mmlm.storage import is_remote, read_uri

_DATA_URI = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w.+-]+=[^;,]*)*;base64,", re.I)


def missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, pandas' NA, an empty text or list, no bytes or no fields."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, (str, bytes, bytearray, dict, list, tuple)):
        return len(value) == 0
    return type(value).__name__ in ("NAType", "NaTType")


def listed(value: Any) -> list[Any]:
    """What was given under `image` or `audio` as a list, of one where it is none. A table from Parquet has arrays for lists."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "OSU":
        return list(value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def all_bytes(values: Sequence[Any], word: str, paths: bool, most: int) -> list[bytes]:
    """The bytes of each, in order. Raises DataError for an empty one, and for more than `most`, which is what a sequence has
    room for."""
    if len(values) > most:
        raise DataError(f"{len(values)} {word}s", wanted=f"at most {most}: a question has no room for more")
    found = []
    for number, value in enumerate(values, 1):
        one = word if len(values) == 1 else f"{word} {number} of {len(values)}"
        if missing(value):
            raise DataError(f"the {one} is empty", wanted="a picture or sound at every place of the list")
        found.append(media_bytes(value, one, paths))
    return found


def require_pixels(pictures: Sequence[bytes]) -> None:
    """Raise DataError when several pictures have more pixels together than one may have, by their headers."""
    total = 0
    for data in pictures if len(pictures) > 1 else ():
        with (
            contextlib.suppress(Exception),
            Image.open(io.BytesIO(data)) as picture,
        ):  # decoding says what is wrong with it
            total += picture.width * picture.height
    if total > MAX_PIXELS:
        raise DataError(f"{len(pictures)} pictures of {total:,} pixels together", wanted=f"at most {MAX_PIXELS:,}")


def message_media(value: Any, word: str, paths: bool) -> bytes:
    """The bytes of a picture or sound in a message, where it may also be `{"url"}`, `{"path"}` or `{"data": base64}`."""
    if isinstance(value, dict):
        name = next((key for key in ("data", "bytes", "url", "path", "uri") if value.get(key)), None)
        if name is None:
            raise DataError(f"no {word} in {sorted(map(str, value))[:8]}", wanted="`url`, `path` or `data`")
        return media_bytes(value[name], word, paths and name not in ("data", "bytes"))
    return media_bytes(value, word, paths)


def media_bytes(value: Any, word: str, paths: bool) -> bytes:
    """The bytes of a picture or sound that came as bytes, as a `data:` URI, as a path (if allowed), else as base64."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"the {word} is a {type(value).__name__}", wanted="bytes, or a path" if paths else "base64")
    found = _DATA_URI.match(value[:200])
    if found:
        return _base64(value[found.end() :], word)
    if not paths:
        return _base64(value, word)
    # the person's own path: `..` is meant, unlike in a corpus
    return read_uri(value if is_remote(value) else os.path.abspath(value.removeprefix("file://")))


def _base64(text: str, word: str) -> bytes:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise DataError(
            f"the {word} is not base64 ({text[:40]!r})",
            cure="send the file's bytes in base64; a path is not opened here",
        ) from None
    if not data:
        raise DataError(f"the {word} is empty", wanted="the bytes of a file in base64")
    return data
