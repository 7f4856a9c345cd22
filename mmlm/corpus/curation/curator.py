"""Where a scan hands its records to curation, and gets the account of what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmlm.corpus.curation import names
from mmlm.corpus.curation.config import CurateConfig
from mmlm.corpus.curation.events import Event, Figures
from mmlm.corpus.curation.record_steps import RecordSteps
from mmlm.corpus.curation.set_steps import Drops, find_drops
from mmlm.corpus.drafts import Draft, Refusal, refused_row
from mmlm.corpus.sorting import Sorter
from mmlm.storage import read_uri
from mmlm.world import cores

CURATED = pa.schema([(name, pa.string()) for name in ("step", "action", "source", "id", "reason", "detail")])


def told_key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in CURATED.names)


def libraries(config: CurateConfig) -> dict[str, str]:
    """Versions of the libraries by which the steps of `config` decide, {} for most. Raises ConfigError for a missing one."""
    return names.versions() if config.pii and "name" in config.pii.kinds else {}


class Curator:
    """The steps of a CurateConfig, where a scan has its places for them; and the account of what they did.

    `told`, whose key is `told_key`, collects a row of CURATED for every record that a step dropped or changed.
    """

    def __init__(self, config: CurateConfig, told: Sorter, wordings: frozenset[str] = frozenset()) -> None:
        self.config, self.told, self.wordings = config, told, wordings
        self.on = bool(config.record_steps or config.set_steps)
        self.steps = RecordSteps(config)
        self.figures = Figures(config.record_steps)
        self.drops = Drops({}, {}, {})
        self.dropped_early = 0

    def each(self, outcomes: Iterable[Draft | Refusal]) -> Iterator[Draft | Refusal]:
        """What is left after the steps that look at one record; its media are not read yet."""
        for outcome in outcomes:
            if isinstance(outcome, Refusal) or not self.config.record_steps:
                yield outcome
                continue
            record = outcome.record
            curated = self.steps.apply(record)
            self.figures.note(record.source, curated.events, self.config.record_steps)
            for event in curated.events:
                if event.reason != "detected":  # counted, not listed: it happens to nearly every record
                    self._tell(record.source, record.id, event)
            if curated.record is None:
                self.dropped_early += 1
            else:
                yield replace(outcome, record=curated.record)

    def compare(self, rows: Callable[[], Iterator[dict[str, Any]]], data: Path | str, folder: Path) -> None:
        """Run the steps that look at all records."""
        if self.config.set_steps:
            self.drops = find_drops(
                rows, self.config, lambda uri, most: read_uri(uri, data, most), folder, cores(), self.wordings
            )

    def left(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            if event := self.drops.events.get(row["id"]):
                self._tell(row["source"], row["id"], event)
            else:
                yield row

    def _tell(self, source: str, name: str, event: Event) -> None:
        told = refused_row(Refusal(source, name, event.reason, event.detail))
        self.told.add({"step": event.step, "action": event.action, **told})

    @property
    def dropped(self) -> int:
        return self.dropped_early + len(self.drops.events)

    def by_source(self) -> dict[str, Any]:
        """step → source → kept, dropped, changed, and how often for which reason."""
        reasons = {**self.figures.reasons(), **self.drops.reasons}
        return {
            step: {
                source: {**counts, "reasons": reasons.get(step, {}).get(source, {})} for source, counts in by.items()
            }
            for step, by in {**self.figures.counts(), **self.drops.figures}.items()
        }

    def totals(self) -> dict[str, dict[str, int]]:
        """step → kept, dropped, changed."""
        return {
            step: {what: sum(counts[what] for counts in by.values()) for what in ("kept", "dropped", "changed")}
            for step, by in {**self.figures.counts(), **self.drops.figures}.items()
        }
