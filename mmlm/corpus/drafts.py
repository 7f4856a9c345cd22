"""What readers yield: a Draft (a record whose media are not looked at yet) or a Refusal; and the cleaning of cells."""

from __future__ import annotations

import base64
import binascii
import contextlib
import math
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, unquote_to_bytes

from mmlm.corpus.records import LARGEST, Part, Record
from mmlm.storage import is_remote, split_fragment

if TYPE_CHECKING:  # a worker that makes shards needs no config of a scan, which takes a third of its start
    from mmlm.corpus.config import PiecesConfig

_ASCII = re.compile("[\x00-\x7f]+")
_UTF8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_WESTERN = frozenset(
    "àâäáãåæçéèêëíìîïñóòôöõœøúùûüýÿßÀÂÄÁÃÅÆÇÉÈÊËÍÌÎÏÑÓÒÔÖÕŒØÚÙÛÜÝŸ€£§°ªº«»‹›“”„‘’‚–—…·•¿¡©®™½¼¾²³µ×\xa0"
)

SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test",
}  # fmt: skip
"""Names of splits as people write them."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A record as its source tells it. `where` is `file` or `file:line`; an empty `group` means the content's hash.

    `pieces`: how its sound is to be cut when it turns out to be a long one. `trusted`: beginnings of the remote URIs that
    are read even where remote ones in the data are not, since the config itself names that place. `cut`: whether turns of a
    chat that follow its last answer were left out.
    """

    record: Record
    where: str
    pieces: PiecesConfig | None = None
    trusted: tuple[str, ...] = ()
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something found that is not taken: `source` (`file` or `file:line`), `id` ("" when unknown), typed `reason`."""

    source: str
    id: str
    reason: str
    detail: str


Outcomes = Iterator[Draft | Refusal]


def refused_row(refusal: Refusal) -> dict[str, Any]:
    """A row of `records.REFUSED`; texts that cannot be stored as UTF-8 are escaped."""
    values = {"source": refusal.source, "id": refusal.id, "reason": refusal.reason, "detail": refusal.detail[:500]}
    return {k: v.encode("utf-8", "backslashreplace").decode() for k, v in values.items()}


class RefuseError(Exception):
    """Raised inside a reader; becomes a Refusal. `reason` is one of a small set of words, `detail` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def decode_text(data: bytes) -> str:
    """A text file's content: UTF-8, UTF-16 with its mark, Chinese text in GB18030 (which includes GBK), or Western European
    text in Windows-1252.

    Raises RefuseError (bad_encoding) when it is none of them.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise RefuseError("bad_encoding", f"not UTF-16 at byte {error.start}, though it begins so") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if (other := other_encoding(data.splitlines())) is not None:
            with contextlib.suppress(UnicodeDecodeError):  # a line may end within a character
                return data.decode(other)
        raise RefuseError("bad_encoding", f"not UTF-8 at byte {error.start}") from None


def other_encoding(lines: Iterable[bytes]) -> str | None:
    """`gb18030` or `cp1252` (which includes Latin-1), when lines that are not all UTF-8 look so; None when they do not.

    That they decode is not enough, since so does much that is neither. Hardly a line with other than ASCII may be UTF-8. Of
    Chinese text most characters must be common ones (GB 2312). Of Western European text letters with accents must be few
    among plain ones (in Cyrillic or Greek text they are nearly all), other signs those of a typewriter or a printer, and
    nothing may look like UTF-8.
    """
    utf8 = other = 0
    tries: list[_Chinese | _Western] = [_Chinese(), _Western()]
    for line in lines:
        if line.isascii():
            continue
        try:
            line.decode()
            utf8 += 1
        except UnicodeDecodeError:
            other += 1
            tries = [one for one in tries if (text := _decoded(line, one.name)) is not None and one.takes(text)]
            if not tries:
                return None
    return next((one.name for one in tries if other > 10 * utf8 and one.likely), None)


def _decoded(line: bytes, encoding: str) -> str | None:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError:
        return None


class _Chinese:
    name = "gb18030"

    def __init__(self) -> None:
        self.characters = self.common = 0

    def takes(self, text: str) -> bool:
        """Whether one more line may be such text; counts what tells."""
        beyond = _ASCII.sub("", text)  # a list of its characters would take 40 times as much
        self.characters += len(beyond)
        self.common += len(beyond.encode("gb2312", "ignore")) // 2
        return True

    @property
    def likely(self) -> bool:
        return self.common >= 0.8 * self.characters


class _Western:
    name = "cp1252"

    def __init__(self) -> None:
        self.letters = self.accented = 0

    def takes(self, text: str) -> bool:
        self.letters += sum(c.isalpha() for c in text)
        self.accented += sum(c.isalpha() and not c.isascii() for c in text)
        return not _UTF8.search(text.encode(self.name)) and all(c.isascii() or c in _WESTERN for c in text)

    @property
    def likely(self) -> bool:
        return 0 < self.accented <= 0.3 * self.letters


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
    return _sensible(number)


def _sensible(number: float) -> float:
    if abs(number) > LARGEST:
        raise RefuseError("bad_value", f"{number:g}: numbers may have the size {LARGEST:g} at most")
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
        return _sensible(number) if math.isfinite(number) else None
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


def media_root(root: str, table: str) -> str:
    """What relative media paths of a table are relative to: `root` below the data folder, or below the folder of a
    table that lies elsewhere (`s3://bucket/corpus/t.jsonl`)."""
    if is_remote(root) or not is_remote(table):
        return root
    folder = table.split("?")[0].rpartition("/")[0]
    return f"{folder}/{root.strip('/')}" if root not in ("", ".") else folder


def storable(text: str) -> bool:
    """Whether a text, such as a file's name, can be written as UTF-8, in which tables hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def media_uri(value: str, root: str, data: str = "") -> str:
    """The URI to store for a path in the data; `file:` URIs are decoded (RFC 8089), backslashes are left as they are.

    Raises RefuseError when it climbs out of the data folder.
    """
    if "\0" in value:
        raise RefuseError("unsafe_path", "a NUL character in the path")
    if not storable(value):  # a file may be called so, but no table can say it
        raise RefuseError("bad_name", f"{value[:80]!a} is not UTF-8")
    if value.strip().lower().startswith("file://"):
        value = unquote(value.strip()[len("file://") :].removeprefix("localhost"), errors="surrogateescape")
        if "\0" in value or not storable(value):
            raise RefuseError("unsafe_path", f"{value[:80]!a} is no path")
    if is_remote(value):
        return value
    value = value.strip()
    if (is_remote(root) or is_remote(data)) and os.path.isabs(value):
        raise RefuseError("unsafe_path", f"{value[:80]!r} is a path of this machine in a table from elsewhere")
    if os.path.isabs(value):
        value = posixpath.normpath(value)
        return value.removeprefix(data.rstrip("/") + "/") if data else value
    value = posixpath.normpath(value)  # `..#t=1,2/` means `..#t=1,2`
    path = split_fragment(value)[0]
    if _climbs(path, "" if is_remote(root) else root):
        raise RefuseError("unsafe_path", f"{value[:80]!r} climbs out of the data folder")
    if is_remote(root):
        return f"{root.rstrip('/')}/{value}"
    return posixpath.normpath(posixpath.join(root, path)) + value[len(path) :]


def _climbs(path: str, root: str) -> bool:
    """Whether a relative path leads out of the data folder, or of a `root` that lies outside, read with either slash."""
    path = path.replace("\\", "/")
    if ".." not in path.split("/"):
        return False
    inside = posixpath.normpath(path if root.startswith(("..", "/")) else posixpath.join(root, path))
    return inside == ".." or inside.startswith(("../", "/"))


def _data_uri(text: str) -> bytes:
    head, comma, body = text.partition(",")
    if not comma:
        raise RefuseError("bad_data_uri", f"no comma in {text[:40]!r}")
    if head.endswith(";base64"):
        return _base64(body)
    try:
        return unquote_to_bytes(body)
    except UnicodeEncodeError:
        raise RefuseError("bad_data_uri", "half a surrogate pair in it") from None


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefuseError("bad_data_uri", f"not base64: {error}") from None


_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_OTHER_LETTER = re.compile("[^\\W\\d_\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


def is_chinese(text: str) -> bool:
    """Whether a fifth of the letters or more are Chinese characters, and none is kana or Hangul."""
    han, others = len(_HAN.findall(text)), _OTHER_LETTER.findall(text)
    foreign = any("\u3040" <= c <= "\u30ff" or c >= "\uac00" for c in others)
    return han > 0 and 4 * han >= len(others) and not foreign


def pick_wording(question: str | dict[str, str], lang: str, number: int, written: str | None = None) -> tuple[str, str]:
    """The wording to use and its language. `number` (a hash of the id) chooses where several languages are given.

    `written` is a text that is to be written: without `lang` it is asked for in Chinese where it is Chinese, else in
    English, if there are such wordings.
    """
    if not lang and written and isinstance(question, dict):
        spoken = "zh" if is_chinese(written) else "en"
        if spoken in question:
            return question[spoken], spoken
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
