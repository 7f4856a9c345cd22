"""The steps that look at one record at a time: its language, the quality of its text, personal data in it."""

from __future__ import annotations

import re
from dataclasses import replace

from mmlm.corpus.curation.config import CurateConfig
from mmlm.corpus.curation.events import Curated, Event
from mmlm.corpus.curation.language import identify
from mmlm.corpus.curation.pii import Scrubber
from mmlm.corpus.curation.quality import fault
from mmlm.corpus.records import Record


class RecordSteps:
    """`apply` is a pure function of a record and the config: the same for every order, worker and retry.

    Raises ConfigError, at the first record that needs it, when the library for languages is not installed.
    """

    def __init__(self, config: CurateConfig) -> None:
        self.config = config
        self.steps = config.record_steps
        self.scrubber = Scrubber(config.pii) if config.pii else None

    def apply(self, record: Record) -> Curated:
        """The record as it is kept, and what was done to it; `.record` is None when a step dropped it."""
        events: list[Event] = []
        left: Record | None = record
        for step in self.steps:
            left = getattr(self, f"_{step}")(left, events)
            if left is None:
                break
        return Curated(left, tuple(events))

    def _language(self, record: Record, events: list[Event]) -> Record | None:
        config = self.config.language
        assert config
        if not record.lang or not config.trust:
            lang, confidence = identify(text_of(record), config.languages)
            if lang and confidence >= config.min_confidence and _base(record.lang) != lang:
                reason = "corrected" if record.lang else "detected"
                events.append(Event("language", "changed", reason, lang))
                record = replace(record, lang=lang)
        if config.keep is None or _base(record.lang) in {_base(code) for code in config.keep}:
            return record
        if not record.lang and config.unknown == "keep":
            return record
        reason = "other_language" if record.lang else "unknown_language"
        events.append(Event("language", "dropped", reason, record.lang))
        return None

    def _quality(self, record: Record, events: list[Event]) -> Record | None:
        config = self.config.quality
        assert config
        text = text_of(record)
        if text.strip():
            found = fault(text, record.lang, config)
        else:
            found = ("no_text", "") if config.without_text == "drop" else None
        if found is None:
            return record
        events.append(Event("quality", "dropped", *found))
        return None

    def _pii(self, record: Record, events: list[Event]) -> Record | None:
        assert self.scrubber and self.config.pii
        counts: dict[str, int] = {}

        def scrub(text: str | None) -> str | None:
            if not text:
                return text
            assert self.scrubber
            clean, found = self.scrubber.scrub(text)
            for kind, number in found.items():
                counts[kind] = counts.get(kind, 0) + number
            return clean

        parts = tuple(replace(p, text=scrub(p.text)) if p.kind == "text" else p for p in record.parts)
        target = replace(record.target, text=scrub(record.target.text))
        if not counts:
            return record
        action = "dropped" if self.config.pii.action == "drop" else "changed"
        for kind, number in sorted(counts.items()):  # never the value itself
            events.append(Event("pii", action, kind, f"{number} found"))  # type: ignore[arg-type]
        return None if action == "dropped" else replace(record, parts=parts, target=target)


def text_of(record: Record) -> str:
    """The text by which a record is judged: user and context parts and the answer, paragraphs of their own."""
    texts = [p.text for p in record.parts if p.kind == "text" and p.role != "system" and p.text]
    return "\n\n".join([*texts, record.target.text] if record.target.text else texts)


def _base(lang: str) -> str:
    """`zh-Hans` and `zh_CN` → `zh`."""
    return re.split("[-_]", lang.strip().lower())[0]
