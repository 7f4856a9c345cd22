"""Where the files of a ShardSet lie: in a folder of this machine, or elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from mmlm import artifacts
from mmlm.errors import ArtifactError
from mmlm.storage import is_remote
from mmlm.stores import blank

ORIGIN = ".origin"
"""In a folder that stands for a set elsewhere: its address."""


def as_hash(told: object) -> str:
    """`told`, which names a file of the cache. Raises ArtifactError unless it is a sha256, and so no path to elsewhere."""
    if isinstance(told, str) and re.fullmatch("[0-9a-f]{64}", told):
        return told
    raise ArtifactError(
        f"the shard set tells a hash {told!r}", wanted="64 digits out of 0-9a-f", cure="do not trust who published it"
    )


def as_name(told: object) -> str:
    """`told`, which names a shard. Raises ArtifactError unless it is the plain name of a file, and so no path to elsewhere."""
    if isinstance(told, str) and re.fullmatch(r"\w[\w.-]*", told, re.ASCII):
        return told
    raise ArtifactError(
        f"the shard set tells a shard {told!r}", wanted="the plain name of a file", cure="do not trust who made it"
    )


@dataclass
class Opened:
    """A file that stays where it is until it is closed."""

    path: Path
    lock: IO[Any] | None = None

    def close(self) -> None:
        if self.lock:
            self.lock.close()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShardFiles(Protocol):
    folder: Path
    """The tables of the set, on this machine."""
    remote: bool
    """Whether a shard may first have to be fetched."""
    room: int | None
    """Bytes of shards that all readers of this machine together may keep open; None where nothing is ever evicted."""

    def tar(self, row: dict[str, Any]) -> Opened:
        """The shard of a row of the manifest. Raises ArtifactError when it is not what the row says."""
        ...

    def index(self, row: dict[str, Any]) -> Opened:
        """Its offsets. Raises likewise."""
        ...


def open_files(path: Path | str) -> ShardFiles:
    """The files of the set at `path`, a folder or an address."""
    folder = Path(path)
    if is_remote(str(path)) or (folder / ORIGIN).exists():
        from mmlm.data.published import PublishedFiles, view  # here, since most never need it

        return PublishedFiles(view(str(path)) if is_remote(str(path)) else folder)
    return LocalFiles(folder)


def address(folder: Path) -> str:
    """What names the set of `folder` on every machine, for `open_files`: where it was published, or else the folder."""
    origin = folder / ORIGIN
    return origin.read_text(encoding="utf-8") if origin.exists() else str(folder)


def folder_of(path: Path | str, digest: str = "") -> Path:
    """The folder of the set at `path`, an address or a folder. Raises ArtifactError when a `digest` is given and another
    set lies there by now: one that was published anew between two attempts, or seen by one machine and not by another."""
    folder = open_files(path).folder
    if digest and (found := artifacts.read(folder, "shards").digest) != digest:
        raise ArtifactError(
            f"the shard set at {blank(str(path))} has the digest {found[:12]}", wanted=f"{digest[:12]}, as it was started with",
            cure="start it again, so that all ranks read the set that is there now",
        )  # fmt: skip
    return folder


class LocalFiles:
    remote: bool = False
    room: int | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tar(self, row: dict[str, Any]) -> Opened:
        path = self.folder / as_name(row["path"])
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ArtifactError(
                f"the shard {path} cannot be read ({error.strerror})", cure="run `mmlm verify` on the shard set"
            ) from None
        if size != row["bytes"]:
            raise ArtifactError(
                f"the shard {path} has {size:,} bytes", wanted=f"{row['bytes']:,}, as the manifest says",
                cure="run `mmlm verify` on the shard set",
            )  # fmt: skip
        return Opened(path)

    def index(self, row: dict[str, Any]) -> Opened:
        return Opened((self.folder / as_name(row["path"])).with_suffix(".index.parquet"))
