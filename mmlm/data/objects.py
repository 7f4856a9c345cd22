"""Objects of published shard sets on this machine: each under the name of its content, in a folder of bounded size.

The folder is MMLM_SHARD_CACHE (default `~/.cache/mmlm/shards`), of at most MMLM_SHARD_CACHE_BYTES (default 64 GiB); what was
used longest ago goes first, and never what a process reads. Any number of processes share it: a file is fetched by one,
under a lock, while the others wait; it gets its name when its sha256 is right. A download that broke off is taken up.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from mmlm import remote
from mmlm.data.files import Opened, as_hash
from mmlm.errors import ArtifactError, ConfigError, DataError, LaunchError, explain_os_error
from mmlm.stores import blank

LIMIT = 64 << 30
PIECE = 8 << 20
"""Bytes of one request."""
TIDIED = 64
"""The size of the folder is looked at whenever a TIDIED-th of its limit was added by this process."""


def cache_folder() -> Path:
    return Path(os.environ.get("MMLM_SHARD_CACHE") or "~/.cache/mmlm/shards").expanduser()


def cache_limit() -> int:
    """Raises ConfigError when the environment names no number."""
    told = os.environ.get("MMLM_SHARD_CACHE_BYTES", "")
    if told and not told.isdigit():
        raise ConfigError(f"MMLM_SHARD_CACHE_BYTES is {told!r}", wanted="a number of bytes")
    return int(told or LIMIT)


class Objects:
    """The objects in `folder`, which grows to about `limit` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._added = limit  # so that the first one makes us look

    def path(self, sha256: str) -> Path:
        """Raises ArtifactError when that is no sha256: a manifest from elsewhere must not choose a path on this machine."""
        return self.folder / as_hash(sha256)[:2] / sha256

    def get(self, uri: str, sha256: str) -> Opened:
        """The object at `uri`, whose content has that sha256; it stays until it is closed.

        Raises ArtifactError when it is not there, or has another content; LaunchError when its store does not answer or
        the cache cannot be written.
        """
        path = self.path(sha256)
        try:
            while True:
                if found := _shared(path):
                    return found
                if added := self._fetch(uri, sha256, path):
                    with _shared(path) or Opened(path):  # not ours to evict just now
                        self._tidy(added)
        except DataError as error:
            raise ArtifactError(
                error.found, wanted=error.wanted, cure="run `mmlm verify` on the published set"
            ) from None
        except OSError as error:
            raise explain_os_error(error) or LaunchError(
                f"the cache {self.folder} cannot be written ({error})", cure="set MMLM_SHARD_CACHE to another folder"
            ) from None

    def _fetch(self, uri: str, sha256: str, path: Path) -> int:
        """Bring the object here, going on where an earlier attempt stopped. Returns its size, 0 when another was faster."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{sha256}.part")
        with part.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() or not _is_still(file.fileno(), part):
                return 0
            for fresh in (False, True):  # what was left of an earlier attempt may be damaged
                if fresh:
                    file.truncate(0)
                file.seek(0)
                found = hashlib.file_digest(file, lambda: hashlib.sha256())
                while data := remote.read_range(uri, file.tell(), PIECE):
                    file.write(data)
                    found.update(data)
                if found.hexdigest() == sha256:
                    file.flush()
                    os.fsync(file.fileno())
                    part.rename(path)
                    return file.tell()
            part.unlink()
        raise ArtifactError(
            f"{blank(uri)} has sha256 {found.hexdigest()[:16]}", wanted=f"{sha256[:16]}, as the manifest says",
            cure="run `mmlm verify` on the published set",
        )  # fmt: skip

    def _tidy(self, added: int) -> None:
        self._added += added
        if self._added >= self.limit // TIDIED:
            self._added = 0
            remote.evict(self.folder, self.limit)


def _shared(path: Path) -> Opened | None:
    """The file at `path`, locked against eviction; None when it is not there."""
    while True:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_still(file.fileno(), path):
            os.utime(file.fileno())  # the time of its last use
            return Opened(path, file)
        file.close()


def _is_still(handle: int, path: Path) -> bool:
    """Whether the opened file is the one that `path` names now."""
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    opened = os.fstat(handle)
    return (named.st_ino, named.st_dev) == (opened.st_ino, opened.st_dev)
