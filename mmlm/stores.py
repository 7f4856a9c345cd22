"""Object stores, one try at one thing: S3, Google Cloud Storage and plain HTTP, through the clients that fsspec finds.

What a store answers becomes one of four: the value, a DataError (nothing there, no access: trying again will not help),
Transient (it may help), or Changed (the object is no longer the one that was looked at). Retrying, resuming and caching
are `mmlm.remote`'s. fsspec brings credentials, endpoints and connections; requests are made here, since resuming a
download needs the headers of each.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from mmlm.config import blank_credentials
from mmlm.errors import DataError

CHUNK = 1 << 20
"""Bytes handed on at a time."""
CONNECT_SECONDS, READ_SECONDS = 20.0, 60.0
"""How long a store may take to answer, and to send the next bytes."""
SLOWEST = 64 << 10
"""Bytes a second below which a download counts as stuck: a store could send a byte a minute for ever."""
_QUERY = re.compile(r"(?=[^\s?'\"<>]*?(?:https?|s3|gs|gcs)://[^\s?'\"<>])([^\s?'\"<>]++)\?[^\s'\"<>)]*+|[^\s?'\"<>]++")
"""A word that holds an address, and its query; or a word without one, passed over whole so that no part is looked at again."""
CURES = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and AWS_ENDPOINT_URL for a store of your own; "
    "FSSPEC_S3_ANON=true reads a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a key file, or run `gcloud auth application-default login`; "
    "FSSPEC_GCS_TOKEN=anon reads a public bucket",
    "http": "use a signed address, or one with user:password@ in it",
}
_EXPIRED = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch")


class Transient(Exception):
    """Something that may go better next time. `wait`: seconds that the store asks for."""

    def __init__(self, text: str, wait: float = 0.0) -> None:
        super().__init__(text)
        self.wait = wait


class Changed(Exception):
    """The object is another one than the one that was looked at."""


class Exists(Exception):
    """There is an object of that name already."""


@dataclass(frozen=True, slots=True)
class Stat:
    """What a store tells about an object without reading it."""

    size: int
    """Bytes; -1 when the store does not say."""
    version: str
    """ETag, generation, or else time of change; "" when the store tells none of them."""
    md5: str = ""
    """Of the whole content, hexadecimal, where the store knows it."""
    crc32c: str = ""
    """Likewise, base64."""
    sha256: str = ""
    """Likewise, hexadecimal: what `put` stored beside it."""

    @property
    def resumable(self) -> bool:
        """Whether bytes read now and bytes read later are known to belong together."""
        return bool(self.version) and not self.version.startswith("W/")


def blank(text: str) -> str:
    """`text` without credentials: neither `user:password@` nor the query of a (perhaps signed) address."""
    return _QUERY.sub(lambda found: f"{found[1]}?***" if found[1] else found[0], blank_credentials(text))


def scheme_of(uri: str) -> str:
    """s3, gs or http. Raises DataError for any other: nothing else is opened, whatever fsspec knows."""
    scheme = uri.partition("://")[0].lower()
    found = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}.get(scheme)
    if found is None:
        raise DataError(
            f"the address {blank(uri)[:200]!r} is of no store that is read", wanted="s3://, gs:// or https://"
        )
    return found


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/a/b` → ("bucket", "a/b"); a name is taken as it is, `%`, `?` and `#` included.

    Raises DataError when there is no bucket, or credentials stand before it.
    """
    bucket, _, key = uri.partition("://")[2].partition("/")
    if not bucket or "@" in bucket:
        found = "credentials in it" if "@" in bucket else "no bucket in it"
        raise DataError(f"{blank(uri)} has {found}", wanted="s3://BUCKET/NAME", cure=CURES[scheme_of(uri)])
    return bucket, key


class Store(ABC):
    """One kind of store. All of its methods run in fsspec's own loop, which `loop` is."""

    scheme = ""
    files: Any

    @property
    def loop(self) -> Any:
        return self.files.loop

    @abstractmethod
    async def stat(self, uri: str) -> Stat:
        """What is known of an object without reading it."""

    @abstractmethod
    async def read(self, uri: str, stat: Stat, start: int, stop: int | None, sink: Callable[[bytes], Any]) -> Stat:
        """Give bytes `start` to `stop` (None: the end) of the object to `sink`; returns what the answer told of it.

        Raises Changed when the object is no longer the one of `stat`.
        """

    @abstractmethod
    async def list(self, uri: str) -> list[tuple[str, Stat]]:
        """All objects whose URI begins with `uri`."""

    @abstractmethod
    async def put(self, uri: str, path: Path, sha256: str) -> None:
        """Store the file `path` without replacing anything. Raises Exists."""

    @abstractmethod
    async def copy(self, source: str, stat: Stat, uri: str) -> None:
        """Store under `uri` the object `source` of the same store, of which `stat` is known, without replacing anything;
        its bytes stay in the store. Raises Exists, or Changed when `source` is no longer the one of `stat`."""


def answered(status: int, uri: str, scheme: str, said: str = "", wait: str | None = None) -> Exception:
    """What an HTTP status other than success means."""
    shown = blank(uri)
    if status in (408, 425, 429) or status >= 500:
        return Transient(f"{shown} answers {status} {said}".strip(), _seconds(wait))
    if status in (401, 403) or said in _EXPIRED:
        return DataError(f"no access to {shown} ({status} {said})".replace(" )", ")"), cure=CURES[scheme])
    if status in (404, 410):
        what = "bucket for" if said == "NoSuchBucket" else "object"
        return DataError(f"there is no {what} {shown}", cure="check the address")
    if status in (304, 412, 416):
        return Changed(f"{shown} changed while it was read")
    return DataError(f"{shown} answers {status} {said}".strip(), cure="check the address")


def untrusted(uri: str, why: str, variable: str = "SSL_CERT_FILE") -> DataError:
    """A server whose certificate did not pass; `variable` of the environment names whom to trust."""
    file = os.environ.get(variable, "")
    lost = f"; there is no file {file}, which {variable} names" if file and not os.path.isfile(file) else ""
    return DataError(
        f"the certificate of the server of {blank(uri)} is not to be trusted ({why}){lost}",
        wanted="one for this address, by an authority that is known here",
        cure=f"set {variable} to the certificate of your own authority (a PEM file), or check the address",
    )


def _seconds(wait: str | None) -> float:
    """The header Retry-After: seconds, or a date."""
    if not wait:
        return 0.0
    if wait.strip().isdigit():
        return float(wait)
    try:
        return max(0.0, (parsedate_to_datetime(wait) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def patience(size: int) -> float:
    """Seconds that reading `size` bytes may take in all (-1: unknown)."""
    return READ_SECONDS + (size if size >= 0 else 1 << 30) / SLOWEST


def ranged(start: int, stop: int | None) -> dict[str, str]:
    return {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}


def require_range(told: str | None, start: int, uri: str) -> None:
    """Raise Transient when bytes from elsewhere than `start` come. `told` is the header Content-Range."""
    begin = re.match(r"bytes (\d+)-", told or "")
    if (int(begin[1]) if begin else 0) != start:
        raise Transient(f"{blank(uri)} sends {told or 'all of it'} instead of what follows byte {start:,}")


def words(error: BaseException) -> str:
    """An error of a library in one short line, without credentials."""
    text = " ".join(blank(str(error)).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
