"""Object stores, one try at one thing: S3, Google Cloud Storage and plain HTTP, through the clients that fsspec finds.

What a store answers becomes one of four: the value, a DataError (nothing there, no access: trying again will not help),
Transient (it may help), or Changed (the object is no longer the one that was looked at). Retrying, resuming and caching
are `mmlm.remote`'s. fsspec brings credentials, endpoints and connections; requests are made here, since resuming a
download needs the headers of each.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmlm.config import blank_credentials
from mmlm.errors import DataError

CHUNK = 1 << 20
"""Bytes handed on at a time."""
CONNECT_SECONDS, READ_SECONDS = 20.0, 60.0
"""How long a store may take to answer, and to send the next bytes."""
SLOWEST = 64 << 10
"""Bytes a second below which a download counts as stuck: a store could send a byte a minute for ever."""
_QUERY = re.compile(r"((?:https?|s3|gs|gcs)://[^\s?'\"<>]+)\?[^\s'\"<>)]*")
_SIGNATURE = re.compile(
    r"(?i)(x-(amz|goog|oss|cos)-|awsaccesskeyid|googleaccessid|(access_?)?(token|key)=|api_?key|signature|sig=|s[eprtv]{1,2}=|"
    r"expires|policy|key-pair-id)"
)
"""What signs an address: Amazon, Google, Azure, CloudFront and others."""
_LEGAL = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
"""Characters of a URL that needs no quoting; one that is quoted already, perhaps signed, stays as it is."""
_CURES = {
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
    return _QUERY.sub(r"\1?***", blank_credentials(text))


def unsigned(uri: str) -> str:
    """A web address without the signature in its query: a name that stays the same, and that can be shown."""
    place, mark, query = uri.partition("?")
    if not mark or not place.lower().startswith(("http://", "https://")):
        return uri
    left = [pair for pair in query.split("&") if not _SIGNATURE.match(pair)]
    return place + "?" + "&".join(left) if left else place


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
        raise DataError(f"{blank(uri)} has {found}", wanted="s3://BUCKET/NAME", cure=_CURES[scheme_of(uri)])
    return bucket, key


def open_store(scheme: str) -> Store:
    """The store for `scheme` (s3, gs, http) as the environment describes it.

    Raises DataError when its package is missing or there are no credentials.
    """
    try:
        return {"s3": S3, "gs": Gcs, "http": Http}[scheme]()
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs", "http": "remote"}[scheme]
        raise DataError(
            f"{'https' if scheme == 'http' else scheme}:// needs a package that is not there ({error.name})",
            cure=f'pip install "mmlm-workflows[{extra}]"',
        ) from None


class Store:
    """One kind of store. All of its methods run in fsspec's own loop, which `loop` is."""

    scheme = ""
    files: Any

    @property
    def loop(self) -> Any:
        return self.files.loop

    async def stat(self, uri: str) -> Stat:
        raise NotImplementedError

    async def read(self, uri: str, stat: Stat, start: int, stop: int | None, sink: Callable[[bytes], Any]) -> Stat:
        """Give bytes `start` to `stop` (None: the end) of the object to `sink`; returns what the answer told of it.

        Raises Changed when the object is no longer the one of `stat`.
        """
        raise NotImplementedError

    async def list(self, uri: str) -> list[tuple[str, Stat]]:
        """All objects whose URI begins with `uri`."""
        raise NotImplementedError

    async def put(self, uri: str, path: Path, sha256: str) -> None:
        """Store the file `path` without replacing anything. Raises Exists."""
        raise NotImplementedError


def answered(status: int, uri: str, scheme: str, said: str = "", wait: str | None = None) -> Exception:
    """What an HTTP status other than success means."""
    shown = blank(uri)
    if status in (408, 425, 429) or status >= 500:
        return Transient(f"{shown} answers {status} {said}".strip(), _seconds(wait))
    if status in (401, 403) or said in _EXPIRED:
        return DataError(f"no access to {shown} ({status} {said})".replace(" )", ")"), cure=_CURES[scheme])
    if status in (404, 410):
        what = "bucket for" if said == "NoSuchBucket" else "object"
        return DataError(f"there is no {what} {shown}", cure="check the address")
    if status in (304, 412, 416):
        return Changed(f"{shown} changed while it was read")
    return DataError(f"{shown} answers {status} {said}".strip(), cure="check the address")


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


class S3(Store):
    """Amazon S3 and what speaks like it (AWS_ENDPOINT_URL)."""

    scheme = "s3"

    def __init__(self) -> None:
        import s3fs

        self.files = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={
                "retries": {"max_attempts": 0}, "connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS,
                "max_pool_connections": 64,
            },
        )  # fmt: skip

    async def _client(self, bucket: str) -> Any:
        """The client for the region of `bucket`."""
        await self.files.set_session()
        return await self.files.get_s3(bucket)

    async def stat(self, uri: str) -> Stat:
        bucket, key = split_uri(uri)
        async with self._asking(uri):
            return _s3_stat(await (await self._client(bucket)).head_object(Bucket=bucket, Key=key))

    async def read(self, uri: str, stat: Stat, start: int, stop: int | None, sink: Callable[[bytes], Any]) -> Stat:
        bucket, key = split_uri(uri)
        wanted = _ranged(start, stop)
        async with self._asking(uri), asyncio.timeout(patience((stat.size if stop is None else stop) - start)):
            client = await self._client(bucket)
            answer = await client.get_object(Bucket=bucket, Key=key, IfMatch=f'"{stat.version}"', **wanted)
            _require_range(answer.get("ContentRange"), start, uri)
            async with answer["Body"] as body:
                while data := await body.read(CHUNK):
                    sink(data)
        return _s3_stat(answer)

    async def list(self, uri: str) -> list[tuple[str, Stat]]:
        bucket, prefix = split_uri(uri)
        found = []
        async with self._asking(uri):
            client = await self._client(bucket)
            async for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for entry in page.get("Contents", ()):
                    # whether the ETag is an MD5 depends on the encryption, which a listing does not tell
                    stat = Stat(entry["Size"], entry["ETag"].strip('"'))
                    found.append((f"s3://{bucket}/{entry['Key']}", stat))
        return found

    async def put(self, uri: str, path: Path, sha256: str) -> None:
        bucket, key = split_uri(uri)
        digest = base64.b64encode(bytes.fromhex(sha256)).decode()
        async with self._asking(uri):
            client = await self._client(bucket)
            with path.open("rb") as file:
                try:
                    await client.put_object(
                        Bucket=bucket, Key=key, Body=file, IfNoneMatch="*", Metadata={"sha256": sha256},
                        ChecksumSHA256=digest,
                    )  # fmt: skip
                except Exception as error:
                    if _status(error) in (409, 412):  # 409: somebody else is putting it at this moment
                        raise Exists(uri) from None
                    raise

    @contextlib.asynccontextmanager
    async def _asking(self, uri: str) -> AsyncIterator[None]:
        import aiohttp
        from botocore import exceptions as boto

        missing = (
            boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound, boto.CredentialRetrievalError,
            boto.TokenRetrievalError,
        )  # fmt: skip
        try:
            yield
        except boto.ClientError as error:
            told = error.response.get("Error", {}).get("Code", "")
            headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            said = "" if told.isdigit() else told
            raise answered(_status(error), uri, "s3", said, headers.get("retry-after")) from None
        except missing as error:
            raise DataError(f"no credentials for {blank(uri)} ({error})", cure=_CURES["s3"]) from None
        except (boto.ParamValidationError, boto.InvalidRegionError) as error:
            raise DataError(f"{blank(uri)}: {blank(str(error))[:200]}", wanted="s3://BUCKET/NAME") from None
        except (boto.BotoCoreError, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Transient(f"{blank(uri)}: {_words(error)}") from None


def _status(error: Exception) -> int:
    response = getattr(error, "response", None)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(response, dict) else 0


def _s3_stat(answer: Any) -> Stat:
    whole = answer.get("ContentRange", "").rpartition("/")[2]
    etag = answer["ETag"].strip('"')
    plain = answer.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in answer
    return Stat(
        int(whole) if whole.isdigit() else answer["ContentLength"],
        etag,
        md5=etag if plain and re.fullmatch(r"[0-9a-f]{32}", etag) else "",
        sha256=answer.get("Metadata", {}).get("sha256", ""),
    )


class _Web(Store):
    """What the two stores that are spoken to by aiohttp share."""

    @contextlib.asynccontextmanager
    async def _asking(
        self, method: str, url: str, uri: str, headers: dict[str, str], seconds: float = READ_SECONDS, **more: Any
    ) -> AsyncIterator[Any]:
        """The answer to one request, if it is a success."""
        import aiohttp
        import yarl

        limits = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        try:
            session = await self._session()
            where = yarl.URL(url, encoded=bool(_LEGAL.fullmatch(url)))
            async with session.request(method, where, headers=self._headers(headers), timeout=limits, **more) as answer:
                if answer.status >= 300:
                    told = answer.headers.get("Retry-After")
                    raise answered(answer.status, uri, self.scheme, answer.reason or "", told)
                yield answer
        except (aiohttp.InvalidURL, aiohttp.ClientConnectorCertificateError, aiohttp.TooManyRedirects) as error:
            raise DataError(f"cannot read {blank(uri)}: {_words(error)}", cure="check the address") from None
        except (aiohttp.ClientError, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise Transient(f"{blank(uri)}: {_words(error)}") from None

    async def _session(self) -> Any:
        raise NotImplementedError

    def _headers(self, headers: dict[str, str]) -> dict[str, str]:
        return headers

    async def _pour(self, answer: Any, uri: str, start: int, stop: int | None, sink: Callable[[bytes], Any]) -> None:
        """The body of an answer, from `start` on; a server that knows no ranges sends all of it."""
        skip = 0
        if answer.status == 206:
            _require_range(answer.headers.get("Content-Range"), start, uri)
        else:
            skip = start
        left = None if stop is None else stop - start
        async for data in answer.content.iter_chunked(CHUNK):
            passed = min(skip, len(data))
            skip -= passed
            data = data[passed : None if left is None else passed + left]
            if data:
                sink(data)
            if left is not None:
                left -= len(data)
                if left == 0:
                    return


def _ranged(start: int, stop: int | None) -> dict[str, str]:
    return {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}


def _require_range(told: str | None, start: int, uri: str) -> None:
    """Raise Transient when bytes from elsewhere than `start` come. `told` is the header Content-Range."""
    begin = re.match(r"bytes (\d+)-", told or "")
    if (int(begin[1]) if begin else 0) != start:
        raise Transient(f"{blank(uri)} sends {told or 'all of it'} instead of what follows byte {start:,}")


class Gcs(_Web):
    """Google Cloud Storage, or an emulator of it (STORAGE_EMULATOR_HOST)."""

    scheme = "gs"

    def __init__(self) -> None:
        from gcsfs.core import GCSFileSystem

        options: dict[str, Any] = {"session_kwargs": {"auto_decompress": False, "trust_env": True}}
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            options["token"] = "anon"
        try:
            self.files = GCSFileSystem(skip_instance_cache=True, use_listings_cache=False, **options)
        except Exception as error:  # google.auth raises a dozen kinds, and gcsfs OSError and ValueError
            raise DataError(f"no credentials for gs:// ({_words(error)})", cure=_CURES["gs"]) from None

    async def _session(self) -> Any:
        return await self.files._set_session()

    def _headers(self, headers: dict[str, str]) -> dict[str, str]:
        try:
            told: dict[str, str] = self.files._get_headers(headers)
        except Exception as error:  # a token that can no longer be renewed
            raise DataError(f"no credentials for gs:// ({_words(error)})", cure=_CURES["gs"]) from None
        return told

    def _url(self, bucket: str, key: str = "", way: str = "") -> str:
        name = f"/{quote(key, safe='')}" if key else ""
        return f"{self.files._location}{way}/storage/v1/b/{quote(bucket, safe='')}/o{name}"

    async def _json(self, uri: str, url: str, params: dict[str, str]) -> Any:
        async with self._asking("GET", url, uri, {"Accept-Encoding": "identity"}, params=params) as answer:
            return await answer.json()

    async def stat(self, uri: str) -> Stat:
        return _gcs_stat(await self._json(uri, self._url(*split_uri(uri)), {}))

    async def read(self, uri: str, stat: Stat, start: int, stop: int | None, sink: Callable[[bytes], Any]) -> Stat:
        params = {"alt": "media", "ifGenerationMatch": stat.version}
        # an object that is stored as gzip is wanted as it is stored, else its size would be another one
        headers = {"Accept-Encoding": "gzip", **_ranged(start, stop)}
        seconds = patience((stat.size if stop is None else stop) - start)
        async with self._asking("GET", self._url(*split_uri(uri)), uri, headers, seconds, params=params) as answer:
            if answer.headers.get("X-Goog-Generation", stat.version) != stat.version:
                raise Changed(f"{blank(uri)} changed while it was read")
            await self._pour(answer, uri, start, stop, sink)
        return stat

    async def list(self, uri: str) -> list[tuple[str, Stat]]:
        bucket, prefix = split_uri(uri)
        found: list[tuple[str, Stat]] = []
        params = {"prefix": prefix}
        while True:
            page = await self._json(uri, self._url(bucket), params)
            found += [(f"gs://{bucket}/{entry['name']}", _gcs_stat(entry)) for entry in page.get("items", ())]
            if not page.get("nextPageToken"):
                return found
            params = {"prefix": prefix, "pageToken": page["nextPageToken"]}

    async def put(self, uri: str, path: Path, sha256: str) -> None:
        bucket, key = split_uri(uri)
        with path.open("rb") as file:
            md5 = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
        told = json.dumps({"name": key, "md5Hash": md5, "metadata": {"sha256": sha256}}).encode()
        border = f"mmlm-{sha256[:32]}".encode()
        head = (
            b"--" + border + b"\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n" + told
            + b"\r\n--" + border + b"\r\nContent-Type: application/octet-stream\r\n\r\n"
        )  # fmt: skip
        tail = b"\r\n--" + border + b"--\r\n"
        size = path.stat().st_size

        async def body() -> AsyncIterator[bytes]:
            yield head
            with path.open("rb") as file:
                while data := file.read(CHUNK):
                    yield data
            yield tail

        headers = {
            "Content-Type": f"multipart/related; boundary={border.decode()}",
            "Content-Length": str(len(head) + size + len(tail)),
        }
        params = {"uploadType": "multipart", "ifGenerationMatch": "0"}
        url = f"{self.files._location}/upload/storage/v1/b/{quote(bucket, safe='')}/o"
        try:
            async with self._asking("POST", url, uri, headers, patience(size), params=params, data=body()):
                pass
        except Changed:
            raise Exists(uri) from None


def _gcs_stat(entry: Any) -> Stat:
    md5 = base64.b64decode(entry.get("md5Hash", "")).hex()
    told = entry.get("metadata") or {}
    return Stat(int(entry["size"]), str(entry["generation"]), md5, entry.get("crc32c", ""), told.get("sha256", ""))


class Http(_Web):
    """Any web server, by its address."""

    scheme = "http"

    def __init__(self) -> None:
        import aiohttp  # noqa: F401
        from fsspec.implementations.http import HTTPFileSystem

        self.files = HTTPFileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            client_kwargs={"auto_decompress": False, "trust_env": True},
        )

    async def _session(self) -> Any:
        return await self.files.set_session()

    async def stat(self, uri: str) -> Stat:
        plain = {"Accept-Encoding": "identity"}
        try:
            async with self._asking("HEAD", uri, uri, plain, allow_redirects=True) as answer:
                if "Content-Length" in answer.headers:
                    return _http_stat(answer)
        except DataError:
            pass  # an address that is signed for GET refuses HEAD, and some servers do not know it
        try:
            async with self._asking("GET", uri, uri, {**plain, "Range": "bytes=0-0"}) as answer:
                return _http_stat(answer)
        except Changed:  # no byte 0: it is empty
            return Stat(0, "")

    async def read(self, uri: str, stat: Stat, start: int, stop: int | None, sink: Callable[[bytes], Any]) -> Stat:
        headers = {"Accept-Encoding": "identity", **_ranged(start, stop)}
        seconds = patience(-1 if stop is None and stat.size < 0 else (stat.size if stop is None else stop) - start)
        async with self._asking("GET", uri, uri, headers, seconds) as answer:
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise DataError(f"{blank(uri)} is sent compressed", wanted="the bytes as they are")
            found = _http_stat(answer)
            if found.version != stat.version:
                raise Changed(f"{blank(uri)} changed while it was read")
            await self._pour(answer, uri, start, stop, sink)
            return found

    async def list(self, uri: str) -> list[tuple[str, Stat]]:
        raise DataError(f"{blank(uri)}: a web server has no listing", wanted="the address of one file")

    async def put(self, uri: str, path: Path, sha256: str) -> None:
        raise DataError(f"{blank(uri)}: nothing is published to a web server", wanted="s3://, gs:// or a folder")


def _http_stat(answer: Any) -> Stat:
    headers = answer.headers
    whole = headers.get("Content-Range", "").rpartition("/")[2] if answer.status == 206 else ""
    size = whole if whole.isdigit() else headers.get("Content-Length", "") if answer.status != 206 else ""
    etag = headers.get("ETag", "")
    md5 = ""
    if answer.status != 206 and "Content-MD5" in headers:
        with contextlib.suppress(ValueError):
            md5 = base64.b64decode(headers["Content-MD5"]).hex()
    version = etag if etag.startswith("W/") else etag.strip('"') or headers.get("Last-Modified", "")
    return Stat(int(size) if size.isdigit() else -1, version, md5)


def _words(error: BaseException) -> str:
    """An error of a library in one short line, without credentials."""
    text = " ".join(blank(str(error)).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
