"""What a stage has to say to the tracking server, as lines in its work folder until they have been sent.

Two files of JSON lines lie in the folder of a noun being made: `metrics.jsonl`, to which any process (training ranks
too) appends `{"step": int, "time": milliseconds, "metrics": {name: value}}`, and `.tracking.jsonl` for the rest:
`{"params": {}}`, `{"tags": {}}`, `{"text": [name, content]}`, `{"artifact": [path, folder]}`, `{"status": status}`,
`{"end": [status, time]}`.
`.tracking.json` says for which run they are and how many bytes of each were sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

METRICS, ROWS, STATE = "metrics.jsonl", ".tracking.jsonl", ".tracking.json"


def now() -> int:
    """Milliseconds since 1970, the clock of MLflow."""
    return int(time.time() * 1000)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line; a single O_APPEND write, so that lines of several processes do not mix."""
    data = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, data)
    finally:
        os.close(handle)


def append_metrics(folder: Path, values: Mapping[str, float], step: int | None = None) -> None:
    """One point of one or more curves; safe from any process, knows nothing of MLflow."""
    append(folder / METRICS, {"step": int(step or 0), "time": now(), "metrics": dict(values)})


def rows_after(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The complete rows of a file from byte `offset` on, each with the offset behind it. Lines that are no JSON
    object are passed over; a file shorter than `offset` gives nothing."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as f:
        f.seek(offset)
        for line in lines(f):
            yield row_of(line), f.tell()


def lines(f: BinaryIO) -> Iterator[bytes]:
    """The complete lines from where `f` stands; after each it stands behind that."""
    while (line := f.readline()).endswith(b"\n"):
        yield line


def row_of(line: bytes) -> dict[str, Any]:
    """A line as a row, empty when it is no JSON object."""
    try:
        row = json.loads(line)
    except ValueError:
        row = {}
    return row if isinstance(row, dict) else {}


def mark_of(line: bytes) -> str:
    """By which `stands` knows a line again: its length in bytes and its hash."""
    return f"{len(line)}:{hashlib.sha256(line).hexdigest()[:16]}"


def stands(f: BinaryIO, offset: int, mark: str) -> bool:
    """Whether the line before byte `offset` is the one of that mark. Rows bear their time: a file that was written anew has
    another one there, or the very same rows up to there. An inode would not tell: ext4 gives a freed one out again."""
    length = int(mark.partition(":")[0] or 0)
    if not 0 < length <= offset:
        return False
    f.seek(offset - length)
    return mark_of(f.read(length)) == mark


@dataclass
class State:
    """For which run a spool is, and what of it was sent. `uri` is a digest: it may hold a password."""

    uri: str
    name: str
    tags: dict[str, str]
    started: int
    run_id: str | None = None
    metrics: int = 0
    mark: str = ""
    """Of the row before the offset `metrics`."""
    latest: int = 0
    """Time of the latest point that was sent."""
    rows: int = 0
    dropped: int = 0
    ended: bool = False
    path: Path = field(default_factory=Path, compare=False)

    def save(self) -> None:
        row = asdict(self)
        del row["path"]
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
        temporary.replace(self.path)

    @classmethod
    def load(cls, folder: Path) -> State | None:
        """The state of the spool in `folder`; None when there is none that can be read."""
        try:
            row = json.loads((folder / STATE).read_text(encoding="utf-8"))
            known = {f.name: row[f.name] for f in fields(cls) if f.name in row}  # another version may have had others
            return cls(**{**known, "path": folder / STATE})
        except (OSError, ValueError, TypeError):
            return None

    @property
    def waiting(self) -> bool:
        """Whether lines are left that were not sent."""
        folder = self.path.parent
        return any(
            next(rows_after(folder / name, sent), None) is not None
            for name, sent in ((METRICS, self.metrics), (ROWS, self.rows))
        )
