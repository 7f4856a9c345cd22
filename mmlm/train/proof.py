"""Proof: the loss of some fixed records when a checkpoint was saved, beside that of the model which goes on from it.

The records are cut into parts with a loss each. One that was damaged or repaired in the meantime has, or had, another in
its place: that is no fault of the model, and the parts without such a record prove it all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PARTS = 4
"""Of the probe batch; each is a forward pass of its own at every save."""
TOLD = 3
"""Records that are named."""
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 5e-3}
"""Relative difference of the loss that another number of ranks or threads may make."""


@dataclass(frozen=True)
class Part:
    """Some records of the probe batch."""

    loss: float
    ids: tuple[str, ...] = ()
    """Empty when an earlier version saved it."""


def row(parts: Sequence[Part]) -> dict[str, Any]:
    """What a checkpoint tells of them."""
    return {"probe": loss(parts), "probes": [{"loss": part.loss, "ids": list(part.ids)} for part in parts]}


def parts_of(state: dict[str, Any]) -> list[Part]:
    """The same, read. Earlier versions wrote the loss of all records together, and not which these were."""
    told = state.get("probes", [{"loss": state["probe"], "ids": []}])
    return [Part(float(part["loss"]), tuple(part["ids"])) for part in told]


def loss(parts: Sequence[Part]) -> float:
    """The mean of those that have one: a record may itself be poisoned."""
    finite = [part.loss for part in parts if not math.isnan(part.loss)]
    return sum(finite) / len(finite) if finite else math.nan


class Proof:
    """`saved` beside `found`, part by part."""

    def __init__(self, saved: Sequence[Part], found: Sequence[Part]) -> None:
        pairs = list(zip(saved, found, strict=True))
        same = [(then, now) for then, now in pairs if not then.ids or then.ids == now.ids]
        self.then, self.now = [then for then, _ in same], [now for _, now in same]
        """Parts of the same records."""
        self.records = sum(len(now.ids) for now in self.now)
        self.all = sum(len(now.ids) for now in found)
        self.named = all(then.ids for then in saved)
        """Whether the checkpoint tells which records they were."""
        places = enumerate((a, b) for then, now in pairs if then.ids for a, b in zip(then.ids, now.ids, strict=True))
        self.others = [(n + 1, was, now) for n, (was, now) in places if was != now]
        """(place from 1, id then, id now) of records that are not the same."""

    def holds(self, precision: str) -> bool:
        """Whether the loss is the same; always where no part is."""
        if any(math.isnan(then.loss) != math.isnan(now.loss) for then, now in zip(self.then, self.now, strict=True)):
            return False
        then, now = loss(self.then), loss(self.now)
        return math.isnan(then) or math.isclose(then, now, rel_tol=TOLERANCE[precision], abs_tol=1e-3)

    def why(self) -> list[str]:
        """What is to be told of records that are not the same."""
        lines = [
            f"record {place} of the probe batch was {was} when this was saved and is {now} now: one of them is damaged, or was"
            for place, was, now in self.others[:TOLD]
        ]
        if len(self.others) > TOLD:
            lines.append(f"{len(self.others) - TOLD} more records of the probe batch are others now")
        return lines

    def __str__(self) -> str:
        if not self.then:
            return "not proved, since each part of the probe batch has another record now"
        of = (
            "the probe batch"
            if self.records == self.all
            else f"{self.records} of {self.all} records of the probe batch"
        )
        return f"proved on {of} (loss {loss(self.then):.4f})"
