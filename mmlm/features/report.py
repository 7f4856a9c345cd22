"""How well a tokenizer fits the texts of a corpus: tokens per word and per character, for each language."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

from mmlm.corpus.records import Record
from mmlm.features.encode import answer_text
from mmlm.features.text import Tokenizer

# Letters of languages that are written without spaces: kana, Chinese characters, Hangul aside (Korean has spaces).
_ALONE = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
# A run is looked through from its beginning only: one of dashes would be from each of them.
_WORDS = re.compile(f"[{_ALONE}]|(?<![^\\s{_ALONE}])[^\\w\\s{_ALONE}]*+[^\\W{_ALONE}][^\\s{_ALONE}]*+")


def count_words(text: str) -> int:
    """Runs between spaces that hold a letter or digit; of Chinese and Japanese, each character."""
    return sum(1 for _ in _WORDS.finditer(text))


def token_report(records: Iterable[Record], tokenizer: Tokenizer, limit: int = 20_000) -> list[dict[str, Any]]:
    """One row for each language of the first `limit` records, sorted; `lang` is "" where none is given.

    `texts` (questions, context and answers), `bytes` (UTF-8), `characters`, `words` (`count_words`), `tokens`; then
    `tokens_per_word`, `tokens_per_character`, `bytes_per_token`; `unknown`, tokens that stand for what the vocabulary
    does not have; and `changed`, texts that do not come back byte for byte when their tokens are decoded.
    """
    rows: dict[str, dict[str, Any]] = {}
    names = ("texts", "bytes", "characters", "words", "tokens", "unknown", "changed")
    for record in islice(records, limit):
        row = rows.setdefault(record.lang, dict.fromkeys(names, 0))
        texts = [part.text for part in record.parts if part.kind == "text" and part.text]
        if answer := answer_text(record.target):
            texts.append(answer)
        for text in texts:
            ids, raw = tokenizer.encode(text), text.encode("utf-8", "replace")
            row["texts"] += 1
            row["bytes"] += len(raw)
            row["characters"] += len(text)
            row["words"] += count_words(text)
            row["tokens"] += len(ids)
            row["unknown"] += ids.count(tokenizer.unknown) if tokenizer.unknown is not None else 0
            row["changed"] += tokenizer.decode(ids).encode("utf-8", "replace") != raw
    return [{"lang": lang, **row, **_ratios(row)} for lang, row in sorted(rows.items())]


def _ratios(row: dict[str, Any]) -> dict[str, float | None]:
    """None where there is nothing to divide by."""

    def over(above: str, below: str) -> float | None:
        return round(row[above] / row[below], 4) if row[below] else None

    return {
        "tokens_per_word": over("tokens", "words"),
        "tokens_per_character": over("tokens", "characters"),
        "bytes_per_token": over("bytes", "tokens"),
    }
