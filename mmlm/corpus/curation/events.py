"""What curation did to a record, and the counts of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mmlm.corpus.records import Record


@dataclass(frozen=True, slots=True)
class Event:
    """`step` did `action` to a record. `reason` is one of a small set of words, `detail` is for people."""

    step: str
    action: Literal["dropped", "changed"]
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Curated:
    """A record after the record steps; None when one of them dropped it."""

    record: Record | None
    events: tuple[Event, ...] = ()


class Figures:
    """Counts per step and source. `kept` are those a step let pass, `changed` some of these; kept + dropped entered."""

    def __init__(self, steps: Iterable[str] = ()) -> None:
        self.steps: dict[str, dict[str, Counter[str]]] = {step: {} for step in steps}
        self.why: dict[str, dict[str, Counter[str]]] = {}

    def note(self, source: str, events: Iterable[Event], steps: Iterable[str]) -> None:
        """A record of `source` went through `steps`, in order, until one dropped it."""
        by_step: dict[str, list[Event]] = {}
        for event in events:
            by_step.setdefault(event.step, []).append(event)
        for step in steps:
            here = by_step.get(step, [])
            for event in here:
                self.reason(step, source, event.reason)
            if any(e.action == "dropped" for e in here):
                self.add(step, source, "dropped")
                return
            self.add(step, source, "kept")
            if here:
                self.add(step, source, "changed")

    def add(self, step: str, source: str, what: str, number: int = 1) -> None:
        """`what` is kept, dropped or changed."""
        self.steps.setdefault(step, {}).setdefault(source, Counter())[what] += number

    def reason(self, step: str, source: str, reason: str, number: int = 1) -> None:
        self.why.setdefault(step, {}).setdefault(source, Counter())[reason] += number

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """{step: {source: {kept, dropped, changed}}}, sources sorted."""
        return {
            step: {s: {k: c[k] for k in ("kept", "dropped", "changed")} for s, c in sorted(sources.items())}
            for step, sources in self.steps.items()
        }

    def reasons(self) -> dict[str, dict[str, dict[str, int]]]:
        """{step: {source: {reason: number}}}, sorted."""
        return {
            step: {s: dict(sorted(c.items())) for s, c in sorted(sources.items())} for step, sources in self.why.items()
        }
