"""Which records of a corpus that grew are new: those of an earlier manifest keep the generation that they have there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmlm.artifacts import Artifact
from mmlm.corpus.records import read_rows

_SAME = ("content_hash", "task", "split", "group", "lang", "source")
"""What makes a record of an earlier manifest the same record today, its id aside."""


class Generations:
    """Tells which records an earlier manifest holds as they are now, in one pass over both in order of id.

    Afterwards: `kept` records are as they were, `removed` ones are not there any more, `newest` is the generation of all
    that is new or changed.
    """

    def __init__(self, earlier: Artifact | None) -> None:
        columns = ["id", *_SAME, "generation"]
        self.rows = read_rows(earlier.path, columns=columns) if earlier else iter(())
        self.before = next(self.rows, None)
        self.newest = 1 + int(earlier.extra["generation"]) if earlier else 0
        self.kept = self.removed = 0

    def of(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """`rows` with their generations."""
        for row in rows:
            while self.before and self.before["id"] < row["id"]:
                self.removed += 1
                self.before = next(self.rows, None)
            same = self.before and self.before["id"] == row["id"] and all(self.before[k] == row[k] for k in _SAME)
            row["generation"] = self.before["generation"] if self.before and same else self.newest
            self.kept += bool(same)
            if self.before and self.before["id"] == row["id"]:
                self.before = next(self.rows, None)
            yield row
        self.removed += (self.before is not None) + sum(1 for _ in self.rows)
