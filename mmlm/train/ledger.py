"""Ledger: which records each step trained on, as every rank saw it.

`ledger/attempts.jsonl` has a row per start of the training, written by rank 0: `{"attempt", "first", "ranks"}`, `first`
being the step it went on with, counted from 0; rolling back begins a new attempt. `ledger/rank-N.jsonl` has a row per
step: `{"attempt", "step", "ids"}`, with `"skipped": reason` where the step changed nothing.

The **effective** ledger is what the final model has seen: for each step the row of the last attempt that began at or
before it. An attempt that began later went on from a checkpoint that holds the step; one that began before it did the
step anew. Ids of a step stand in order of the ranks, which is the order of the global batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmlm import spool
from mmlm.errors import ArtifactError

FOLDER, ATTEMPTS = "ledger", "attempts.jsonl"


class Ledger:
    """The rows of one rank."""

    def __init__(self, out: Path, rank: int, on: bool) -> None:
        self.folder, self.rank, self.on = out / FOLDER, rank, on
        self.attempt = 0
        if on:
            self.folder.mkdir(parents=True, exist_ok=True)

    def count(self) -> int:
        """Attempts so far."""
        return sum(1 for _ in _rows(self.folder / ATTEMPTS)) if self.on else 0

    def begin(self, attempt: int, first: int, ranks: int) -> None:
        """Attempt number `attempt`, the same on every rank, goes on with step `first`."""
        self.attempt = attempt
        if self.on and self.rank == 0:
            spool.append(self.folder / ATTEMPTS, {"attempt": attempt, "first": first, "ranks": ranks})

    def write(self, step: int, ids: Sequence[str], skipped: str = "") -> None:
        if self.on:
            row: dict[str, Any] = {"attempt": self.attempt, "step": step, "ids": list(ids)}
            spool.append(self.folder / f"rank-{self.rank}.jsonl", {**row, "skipped": skipped} if skipped else row)


def effective(out: Path) -> dict[int, list[str]]:
    """step → ids that the final model was trained on; steps that were skipped have none.

    Raises ArtifactError when a rank's row is missing or there are two.
    """
    attempts = list(_rows(out / FOLDER / ATTEMPTS))
    steps: dict[tuple[int, int], dict[int, list[dict[str, Any]]]] = {}
    for path in (out / FOLDER).glob("rank-*.jsonl"):
        rank = int(path.stem.removeprefix("rank-"))
        for row in _rows(path):
            steps.setdefault((row["attempt"], row["step"]), {}).setdefault(rank, []).append(row)
    found: dict[int, list[str]] = {}
    for step in range(1 + max((step for _, step in steps), default=-1)):
        last = next((a for a in reversed(attempts) if a["first"] <= step), None)
        ranks = steps.get((last["attempt"], step), {}) if last else {}
        wanted = range(last["ranks"]) if last else range(0)
        # a step is first tried and then, perhaps, skipped: its last row says what became of it
        missing = [rank for rank in wanted if not ranks.get(rank)]
        if last is None or missing:
            raise ArtifactError(
                f"the ledger in {out / FOLDER} has no row of step {step} by rank {missing[0] if missing else 0}",
                wanted=f"one by each rank of attempt {last['attempt'] if last else 0}",
                cure="the ledger was written in part only: train with --ledger from the first step on",
            )
        rows = [ranks[rank][-1] for rank in wanted]
        found[step] = [] if rows[0].get("skipped") else [i for row in rows for i in row["ids"]]
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Complete rows; the torn last line of a killed writer is passed over."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
