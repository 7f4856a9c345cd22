"""Amazon S3 and what speaks like it, by the client of s3fs."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from mmlm.errors import DataError
from mmlm.stores import (
    CHUNK,
    CONNECT_SECONDS,
    CURES,
    READ_SECONDS,
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


class S3(Store):
    """Amazon S3 and what speaks like it (AWS_ENDPOINT_URL)."""

    scheme = "s3"

    def __init__(self) -> None:
        import s3fs

        if (file := os.environ.get("AWS_CA_BUNDLE")) and not os.path.isfile(file):
            raise DataError(
                f"there is no file {file}, which AWS_CA_BUNDLE names", wanted="the certificates of whom to trust (PEM)",
                cure="set it to that file, or unset it",
            )  # fmt: skip
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
        wanted = ranged(start, stop)
        async with self._asking(uri), asyncio.timeout(patience((stat.size if stop is None else stop) - start)):
            client = await self._client(bucket)
            same = {"IfMatch": f'"{stat.version}"'} if stat.version else {}  # some that speak like S3 tell none
            answer = await client.get_object(Bucket=bucket, Key=key, **same, **wanted)
            require_range(answer.get("ContentRange"), start, uri)
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
                    stat = Stat(entry["Size"], entry.get("ETag", "").strip('"'))
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

    async def copy(self, source: str, stat: Stat, uri: str) -> None:
        (bucket, key), (from_bucket, from_key) = split_uri(uri), split_uri(source)
        async with self._asking(uri), asyncio.timeout(patience(stat.size)):
            client = await self._client(bucket)
            try:
                await client.copy_object(
                    Bucket=bucket, Key=key, CopySource={"Bucket": from_bucket, "Key": from_key},
                    CopySourceIfMatch=f'"{stat.version}"', IfNoneMatch="*",
                )  # fmt: skip
            except Exception as error:
                if _status(error) == 409:  # 412 may mean either object: who asked looks
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
            raise DataError(f"no credentials for {blank(uri)} ({error})", cure=CURES["s3"]) from None
        except (boto.ParamValidationError, boto.InvalidRegionError) as error:
            raise DataError(f"{blank(uri)}: {blank(str(error))[:200]}", wanted="s3://BUCKET/NAME") from None
        except boto.SSLError as error:
            told = str(error)
            if "CERTIFICATE_VERIFY_FAILED" not in told:
                raise Transient(f"{blank(uri)}: {words(error)}") from None
            why = re.search(r"certificate verify failed: ([^(\]]+)", told)
            raise untrusted(uri, why[1].strip() if why else words(error), "AWS_CA_BUNDLE") from None
        except (boto.BotoCoreError, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Transient(f"{blank(uri)}: {words(error)}") from None


def _status(error: Exception) -> int:
    response = getattr(error, "response", None)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(response, dict) else 0


def _s3_stat(answer: Any) -> Stat:
    whole = answer.get("ContentRange", "").rpartition("/")[2]
    etag = answer.get("ETag", "").strip('"')
    plain = answer.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in answer
    return Stat(
        int(whole) if whole.isdigit() else answer["ContentLength"],
        etag,
        md5=etag if plain and re.fullmatch(r"[0-9a-f]{32}", etag) else "",
        sha256=answer.get("Metadata", {}).get("sha256", ""),
    )
