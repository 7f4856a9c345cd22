"""What readers yield: a Draft (a record whose media are not looked at yet) or a Refusal; and the cleaning of cells."""

from __future__ import annotations

import base64
import binascii
import math
import os
import posixpath
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from mmlm.corpus.records import Part, Record
from mmlm.storage import is_remote

SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test",
}  # fmt: skip
"""Names of splits as people write them."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A record as its source tells it. `where` is `file` or `file:line`; an empty `group` means the content's hash."""

    record: Record
    where: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something found that is not taken: `source` (`file` or `file:line`), `id` ("" when unknown), typed `reason`."""

    source: str
    id: str
    reason: str
    detail: str


Outcomes = Iterator[Draft | Refusal]


class RefuseError(Exception):
    """Raised inside a reader; becomes a Refusal. `reason` is one of a small set of words, `detail` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def as_text(value: Any) -> str | None:
    """A cell as text: numbers without a needless `.0`, true and false in small letters, blank cells as None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, bytes):
        raise RefuseError("bad_value", "bytes where a text is wanted")
    if isinstance(value, dict | list | tuple):
        raise RefuseError("bad_value", f"a {type(value).__name__} where a text is wanted")
    text = str(value)
    return text if text.strip() else None


def as_label(value: Any) -> str | None:
    """A class: text without blanks around it, in Unicode normal form C, so that one name is one class."""
    text = as_text(value)
    return unicodedata.normalize("NFC", text.strip()) if text else None


def as_labels(value: Any) -> tuple[str, ...]:
    """Several classes, sorted, each once. Zero of them is a valid answer."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(sorted({label for v in values if (label := as_label(v))}))


def as_number(value: Any) -> float | None:
    """A finite number, or None for a blank cell."""
    if isinstance(value, bool):
        return float(value)
    text = as_text(value)
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        raise RefuseError("bad_value", f"{text[:40]!r} is no number") from None
    if not math.isfinite(number):
        raise RefuseError("bad_value", f"{text[:40]!r} is not finite")
    return number


def as_field(value: Any, category: bool = False) -> float | str | None:
    """A field of a record: a finite number where it is one, else a category; blank and not-a-number are missing."""
    text = as_text(value)
    if text is None or (not category and text.strip().lower() in ("nan", "na", "n/a", "null", "none", "?")):
        return None
    if not category:
        try:
            number = float(text)
        except ValueError:
            return text.strip()
        return number if math.isfinite(number) else None
    return text.strip()


def as_split(value: Any) -> str:
    """train, val, test, or "" when the cell is blank. Raises RefuseError for any other word."""
    text = as_text(value)
    if text is None:
        return ""
    if text.strip().lower() not in SPLIT_NAMES:
        raise RefuseError("bad_split", f"split {text[:40]!r}; wanted train, val or test")
    return SPLIT_NAMES[text.strip().lower()]


def media_part(kind: str, value: Any, root: str, data: str = "") -> Part:
    """A picture, sound or video from a cell: a path below `root`, a data: URI, bytes, or `{"bytes", "path"}`.

    `data` is the absolute data folder: absolute paths below it are stored relative to it.
    """
    if isinstance(value, dict):
        names = ("bytes", "data", "url", "path", "uri", kind)
        inner: Any = next((value[k] for k in names if value.get(k)), None)
        if isinstance(inner, dict) or inner is None:
            raise RefuseError("bad_value", f"no {kind} in {sorted(map(str, value))[:8]}")
        encoded = value.get("data")
        if isinstance(encoded, str) and encoded == inner and not encoded.startswith("data:"):
            return Part(kind, data=_base64(encoded))
        value = inner
    if isinstance(value, bytes):
        return Part(kind, data=value)
    if not isinstance(value, str):
        raise RefuseError("bad_value", f"{kind} is a {type(value).__name__}; wanted a path")
    if value.startswith("data:"):
        return Part(kind, data=_data_uri(value))
    return Part(kind, uri=media_uri(value, root, data))


def media_uri(value: str, root: str, data: str = "") -> str:
    """The URI to store for a path in the data. Raises RefuseError when it climbs out of the data folder."""
    if "\0" in value:
        raise RefuseError("unsafe_path", "a NUL character in the path")
    if is_remote(value):
        return value
    value = value.removeprefix("file://").strip()
    if os.path.isabs(value):
        value = posixpath.normpath(value)
        return value[len(data) + 1 :] if data and value.startswith(data.rstrip("/") + "/") else value
    if ".." in value.replace("\\", "/").split("/"):
        raise RefuseError("unsafe_path", f"{value[:80]!r} climbs out of the data folder")
    return posixpath.normpath(posixpath.join(root, value))


def _data_uri(text: str) -> bytes:
    head, comma, body = text.partition(",")
    if not comma:
        raise RefuseError("bad_data_uri", f"no comma in {text[:40]!r}")
    return _base64(body) if head.endswith(";base64") else unquote_to_bytes(body)


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefuseError("bad_data_uri", f"not base64: {error}") from None


def pick_wording(question: str | dict[str, str], lang: str, number: int) -> tuple[str, str]:
    """The wording to use and its language. `number` (a hash of the id) chooses where several languages are given."""
    if isinstance(question, str):
        return question, lang
    if lang:
        base = lang.replace("-", "_").split("_")[0]
        found = question.get(lang) or question.get(base) or question.get("other")
        if found:
            return found, lang
    langs = sorted(k for k in question if k != "other")
    if not langs:
        return question.get("other", ""), lang
    chosen = langs[number % len(langs)]
    return question[chosen], lang or chosen
