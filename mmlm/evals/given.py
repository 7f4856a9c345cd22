"""Which modalities are given to a model in each row of scores, and what such a row is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ORDER = ("text", "context", "fields", "image", "audio", "video")
"""The order in which modalities are named; `text` is the question, which is always given."""


def row_name(modalities: Iterable[str]) -> str:
    """`{audio, image}` → `text+image+audio`."""
    wanted = {"text", *modalities}
    return "+".join([m for m in ORDER if m in wanted])


@dataclass(frozen=True)
class Pass:
    """One round of answering: the modalities that are kept (None: all), and the row name for each task it scores."""

    kept: frozenset[str] | None
    names: dict[str, str]

    def takes(self, task: str, modalities: Iterable[str]) -> bool:
        """Whether a record belongs to this round: its task does, and it has one of the modalities that are kept."""
        return task in self.names and (self.kept is None or not self.kept.isdisjoint(modalities))

    def kept_of(self, present: frozenset[str]) -> frozenset[str]:
        """What of a task's modalities is given in this round."""
        return present if self.kept is None else present & self.kept


def plan_passes(present: Mapping[str, frozenset[str]], wanted: list[list[str]] | None) -> list[Pass]:
    """Rounds that together give every task each of its rows once.

    `present`: task → modalities (without the question) that any of its records has. A set in `wanted` is cut down to
    what a task has; two sets that are the same for a task make one row, the first. A task of which no set names
    anything gets the row with all it has. Without `wanted`: all together, one taken away, one alone.
    """
    passes: list[Pass] = []
    named: dict[str, set[str]] = {task: set() for task in present}

    def add(kept: frozenset[str] | None, tasks: Iterable[str]) -> None:
        names = {}
        for task in tasks:
            left = present[task] if kept is None else present[task] & kept
            name = row_name(left)
            if (left or kept is None) and name not in named[task]:
                named[task].add(name)
                names[task] = name
        if names:
            passes.append(Pass(kept, names))

    if wanted is None:
        everything = frozenset().union(*present.values()) if present else frozenset()
        add(None, present)
        for kept in _parts(everything):
            add(kept, present)
    else:
        for entry in wanted:
            add(frozenset(entry), present)
        add(None, [task for task, names in named.items() if not names])
    return passes


def _parts(everything: frozenset[str]) -> list[frozenset[str]]:
    """One taken away, then one alone, in the order of names."""
    ordered = [m for m in ORDER if m in everything]
    without = [everything - {m} for m in ordered] if len(ordered) > 2 else []
    return [*without, *(frozenset({m}) for m in ordered)]
