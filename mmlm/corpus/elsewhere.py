"""What lies below an address, as a local folder of names: a file is fetched when somebody needs what is in it.

    with laid_out("s3://bucket/corpus") as place:      # every name, with its size, and nothing in it
        place.need(place.folder / "a.parquet")         # now it is there

So code that looks at folders looks at buckets, and no more is fetched than it reads.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from mmlm import remote
from mmlm.config import blank_credentials
from mmlm.errors import DataError

MAX_NAMES = 200_000
"""Names of one folder."""
DESCRIPTIONS = ("README.md", "dataset_info.json", "dataset_dict.json", "state.json")
"""Small files that say what a data set is; these are fetched at once."""
_DEPTH = 2


@dataclass(frozen=True)
class Place:
    """`folder` stands for what lies below the address `uri`."""

    uri: str
    folder: Path

    def address(self, path: Path) -> str:
        return f"{self.uri}/{path.relative_to(self.folder).as_posix()}"

    def need(self, path: Path) -> Path:
        """`path`, with its content. Raises as `remote.fetch` does."""
        fetched = remote.fetch(self.address(path))
        if path.stat().st_ino != fetched.stat().st_ino:
            path.unlink()
            try:
                os.link(fetched, path)
            except OSError:  # another file system
                shutil.copyfile(fetched, path)
        return path


_current: ContextVar[Place | None] = ContextVar("place", default=None)


@contextmanager
def laid_out(uri: str, only: str = "") -> Iterator[Place]:
    """The names below `uri` (or `only` that one, where there is no listing) in a temporary folder.

    Raises DataError when there is nothing, or there are too many names.
    """
    uri = uri.rstrip("/")
    named = [f"{uri}/{only}"] if only else remote.below(uri + "/")
    if not named or len(named) > MAX_NAMES:
        shown = blank_credentials(uri)
        raise DataError(
            f"{f'{len(named):,} files' if named else 'nothing'} at {shown}", wanted=f"one to {MAX_NAMES:,} files",
            cure="give a folder below it" if named else "check the address",
        )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="mmlm-names-") as held:
        place = Place(uri, Path(held))
        for address in named:
            name = address.removeprefix(uri + "/")
            if set(name.split("/")) & {"", ".", ".."} or "\0" in name:
                continue  # no name of a file
            path = place.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(max(0, remote.known(address).size))  # no block of the disk
            if path.name in DESCRIPTIONS and name.count("/") < _DEPTH:
                place.need(path)
        yield place


@contextmanager
def looking_at(place: Place) -> Iterator[None]:
    """Meanwhile `filled` fetches what lies in the folder of `place`, and `source_of` knows where that is."""
    token = _current.set(place)
    try:
        yield
    finally:
        _current.reset(token)


def filled(path: Path) -> Path:
    """`path`, with its content if it is a name that stands for an object."""
    place = _current.get()
    return place.need(path) if place and path.is_relative_to(place.folder) and path.is_file() else path


def address_of(path: Path) -> str:
    """The address that `path` stands for, "" if it is a file of this machine."""
    place = _current.get()
    return place.address(path) if place and path.is_relative_to(place.folder) else ""


def source_of(path: Path) -> Path | str:
    """The address that the folder `path` stands for, or the folder."""
    place = _current.get()
    return place.uri if place and path == place.folder else path
