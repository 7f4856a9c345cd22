"""Google Cloud Storage and plain HTTP, by aiohttp."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmlm.errors import DataError
from mmlm.stores import (
    CHUNK,
    CONNECT_SECONDS,
    CURES,
    READ_SECONDS,
    Changed,
    Exists,
    Stat,
    Store,
    Transient,
    answered,
    blank,
    patience,
    ranged,
    require_range,
    split_uri,
    untrusted,
    words,
)

_LEGAL = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
"""Characters of a URL that needs no quoting; one that is quoted already, perhaps signed, stays as it is."""


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
        except aiohttp.ClientConnectorCertificateError as error:
            raise untrusted(uri, getattr(error.certificate_error, "verify_message", words(error))) from None
        except (aiohttp.InvalidURL, aiohttp.TooManyRedirects) as error:
            raise DataError(f"cannot read {blank(uri)}: {words(error)}", cure="check the address") from None
        except (aiohttp.ClientError, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise Transient(f"{blank(uri)}: {words(error)}") from None

    @abstractmethod
    async def _session(self) -> Any:
        """The aiohttp session in which is asked."""

    def _headers(self, headers: dict[str, str]) -> dict[str, str]:
        return headers

    async def _pour(self, answer: Any, uri: str, start: int, stop: int | None, sink: Callable[[bytes], Any]) -> None:
        """The body of an answer, from `start` on; a server that knows no ranges sends all of it."""
        skip = 0
        if answer.status == 206:
            require_range(answer.headers.get("Content-Range"), start, uri)
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
            raise DataError(f"no credentials for gs:// ({words(error)})", cure=CURES["gs"]) from None

    async def _session(self) -> Any:
        return await self.files._set_session()

    def _headers(self, headers: dict[str, str]) -> dict[str, str]:
        try:
            told: dict[str, str] = self.files._get_headers(headers)
        except Exception as error:  # a token that can no longer be renewed
            raise DataError(f"no credentials for gs:// ({words(error)})", cure=CURES["gs"]) from None
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
        headers = {"Accept-Encoding": "gzip", **ranged(start, stop)}
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

    async def copy(self, source: str, stat: Stat, uri: str) -> None:
        bucket, key = split_uri(uri)
        url = f"{self._url(*split_uri(source))}/rewriteTo/b/{quote(bucket, safe='')}/o/{quote(key, safe='')}"
        params = {"ifGenerationMatch": "0", "ifSourceGenerationMatch": stat.version}
        while True:  # a large object may take several requests
            async with self._asking(
                "POST", url, uri, {"Content-Length": "0"}, patience(stat.size), params=params
            ) as told:
                answer = await told.json()
            if answer.get("done", True):
                return
            params["rewriteToken"] = answer["rewriteToken"]


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
        headers = {"Accept-Encoding": "identity", **ranged(start, stop)}
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
        raise _reads_only(uri)

    async def copy(self, source: str, stat: Stat, uri: str) -> None:
        raise _reads_only(uri)


def _reads_only(uri: str) -> DataError:
    return DataError(f"{blank(uri)}: nothing is published to a web server", wanted="s3://, gs:// or a folder")


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
