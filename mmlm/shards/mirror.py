"""Publish a finished ShardSet elsewhere, object by object and never over anything.

Shards and their indexes go first, in parallel, then the tables, `artifact.json` last: so who finds that finds all. Every
object is put under the condition that there is none of its name (S3 `If-None-Match: *`, Google Cloud Storage
`ifGenerationMatch=0`, a hard link on a file system). One that is there already must have the same content. A mirroring
that was killed is taken up by running it again; one that was finished uploads nothing.

A set whose lost samples were retried since has other bytes under some of its old names. It is published beside the one
that is there, as a whole set of its own below `TO/retry-NUMBER-DIGEST`: who reads the old one goes on reading it, the
highest number is the newest. Shards that did not change are not sent again: in a bucket the store copies those that are
there, on a file system they are links to them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmlm import artifacts, remote
from mmlm.artifacts import Artifact
from mmlm.errors import ArtifactError, DataError
from mmlm.progress import Progress
from mmlm.shards.verify import TABLES, rows_of
from mmlm.storage import fsync_folder, is_remote, sha256_file
from mmlm.stores import blank

_RETRY = re.compile(r"retry-([0-9]{1,9})-([0-9a-f]{12})")


def mirror(shards: Path, to: str, workers: int = 8) -> tuple[str, dict[str, int]]:
    """Publish the finished ShardSet in folder `shards` to `to`: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, or a folder.

    Returns where it lies, and how many `objects` there are, how many were `uploaded` and of how many `bytes`, and how many
    were `taken_over` from an older set of that place. Raises ArtifactError when the set is not finished or not sound, or
    when another object lies where one of it belongs; DataError or LaunchError when the store refuses or does not answer.
    """
    ours = artifacts.read(shards, "shards")
    first = _target(to)
    place = _place(first, ours)
    target = first if place == first.to else _target(place)
    older = _older(first, target)
    known = {}
    for row in rows_of(shards):
        if row["path"]:
            known[row["path"].removesuffix(".tar") + ".index.parquet"] = row["index_sha256"]
            known[row["path"]] = row["sha256"]
    there = target.names()
    counts: Counter[str] = Counter(objects=len(known) + len(TABLES) + 1, uploaded=0, bytes=0, taken_over=0)

    def publish(name: str) -> tuple[str, int]:
        return _publish(shards / name, known.get(name), target, name in there, older)

    with Progress("mirror", counts["objects"], "objects") as progress:
        for wave in (list(known), list(TABLES), [artifacts.NAME]):
            with stopping_pool(workers) as pool:
                for how, size in pool.map(publish, wave):
                    if how:
                        counts[how] += 1
                    counts["bytes"] += size
                    progress.add(1)
    return target.to, dict(counts)


def _place(target: _Target, ours: Artifact) -> str:
    """Where the set is to lie: in the place itself, or beside the set that lies there and lost more samples."""
    if artifacts.NAME not in target.names() or not _retried(target.read(artifacts.NAME), ours):
        return target.to
    numbers = {}
    for name in target.folders():
        if found := _RETRY.fullmatch(name):
            numbers[found[2]] = int(found[1])
    digest = ours.digest[:12]
    number = numbers.get(digest) or 1 + max(numbers.values(), default=0)
    return f"{target.to}/retry-{number}-{digest}"


def _older(first: _Target, target: _Target) -> list[str]:
    """The sets that lie in the place already and may hold some of the shards, the newest first."""
    if target is first:
        return []
    retries = sorted((int(found[1]), name) for name in first.folders() if (found := _RETRY.fullmatch(name)))
    there = [first.to, *(f"{first.to}/{name}" for _, name in retries)]
    return [place for place in reversed(there) if place != target.to]


def _retried(theirs: bytes, ours: Artifact) -> bool:
    """Whether ours is the set that is there, made of the same config and inputs, with other samples in it."""
    try:
        there = json.loads(theirs)
        return (there["kind"], there["fingerprint"]) == ("shards", ours.fingerprint) and there["digest"] != ours.digest
    except (ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def stopping_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that begin nothing more after an error."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _publish(path: Path, wanted: str | None, target: _Target, there: bool, older: Sequence[str]) -> tuple[str, int]:
    """Bring one file there, from the sets in `older` or from here. `wanted` is its sha256, if known.

    Returns (`taken_over`, `uploaded`, or "" when it was there already; bytes uploaded).
    """
    found = sha256_file(path)
    if wanted and found != wanted:
        raise ArtifactError(f"{path} is not what the manifest says", cure=f"`mmlm verify {path.parent}` says more")
    if not there:
        if wanted and any(target.take(place, path.name, found) for place in older):
            return "taken_over", 0
        if target.put(path, found):
            return "uploaded", path.stat().st_size
    other = target.sha256(path.name)
    same = other == found or (path.name == artifacts.NAME and _same_noun(path.read_bytes(), target.read(path.name)))
    if not same:
        raise ArtifactError(
            f"{blank(target.to)} holds another {path.name} (sha256 {other[:16]})", wanted=found[:16],
            cure="choose another place: nothing is ever replaced",
        )  # fmt: skip
    return "", 0


def _same_noun(ours: bytes, theirs: bytes) -> bool:
    """Whether two artifact.json tell of the same content: they differ in when and how fast it was made."""
    try:
        one, other = json.loads(ours), json.loads(theirs)
        return all(one[key] == other[key] for key in ("kind", "fingerprint", "digest"))
    except (ValueError, KeyError, TypeError):
        return False


def _target(to: str) -> _Target:
    if not is_remote(to):
        return _Folder(os.path.abspath(to.removeprefix("file://")))
    if remote.scheme_of(to) == "http":
        raise DataError(f"nothing is published to {blank(to)}", wanted="s3://, gs:// or a folder")
    return _Bucket(to.rstrip("/"))


class _Target(ABC):
    """Where a set is published."""

    def __init__(self, to: str) -> None:
        self.to = to

    @abstractmethod
    def names(self) -> set[str]:
        """What is there."""

    @abstractmethod
    def folders(self) -> set[str]:
        """The folders that are there."""

    @abstractmethod
    def put(self, path: Path, sha256: str) -> bool:
        """Store a file under its name; False, and nothing done, when something of that name is there."""

    @abstractmethod
    def take(self, older: str, name: str, sha256: str) -> bool:
        """Store under `name` what the set in the place `older` has under it, if it is that; False, and nothing done, if
        not, or when something of that name is here."""

    @abstractmethod
    def sha256(self, name: str) -> str:
        """Of what lies under a name."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """What lies under a name."""


class _Bucket(_Target):
    def names(self) -> set[str]:
        return {uri.removeprefix(self.to + "/") for uri in remote.below(self.to + "/")}

    def folders(self) -> set[str]:
        return {name.partition("/")[0] for name in self.names() if "/" in name}

    def put(self, path: Path, sha256: str) -> bool:
        return remote.put(f"{self.to}/{path.name}", path, sha256)

    def take(self, older: str, name: str, sha256: str) -> bool:
        return remote.copy(f"{older}/{name}", sha256, f"{self.to}/{name}")

    def sha256(self, name: str) -> str:
        uri = f"{self.to}/{name}"
        if told := remote.stat(uri).sha256:
            return told
        found = hashlib.sha256()
        for data in remote.stream(uri):
            found.update(data)
        return found.hexdigest()

    def read(self, name: str) -> bytes:
        return b"".join(remote.stream(f"{self.to}/{name}"))


class _Folder(_Target):
    def __init__(self, to: str) -> None:
        super().__init__(to)
        Path(to).mkdir(parents=True, exist_ok=True)

    def names(self) -> set[str]:
        return set(os.listdir(self.to))

    def folders(self) -> set[str]:
        return {entry.name for entry in os.scandir(self.to) if entry.is_dir()}

    def put(self, path: Path, sha256: str) -> bool:
        final = Path(self.to, path.name)
        temporary = final.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with path.open("rb") as source, temporary.open("xb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, final)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(final.parent)
        return True

    def take(self, older: str, name: str, sha256: str) -> bool:
        with contextlib.suppress(OSError):
            if sha256_file(Path(older, name)) == sha256:
                os.link(Path(older, name), Path(self.to, name))
                fsync_folder(Path(self.to))
                return True
        return False

    def sha256(self, name: str) -> str:
        return sha256_file(Path(self.to, name))

    def read(self, name: str) -> bytes:
        return Path(self.to, name).read_bytes()
