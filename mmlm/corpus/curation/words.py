"""Texts as words, in scripts with and without spaces, and which script a text is written in."""

from __future__ import annotations

import re

from mmlm.corpus.curation.shingles import UNSPACED

_UNSPACED = "".join(f"{chr(low)}-{chr(high)}" for low, high in UNSPACED)
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_UNSPACED_ONE = re.compile(rf"[{_UNSPACED}]")
_LETTERS = {
    "Latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
    "Cyrillic": "\u0400-\u052f",
    "Arabic": "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff",
    "Devanagari": "\u0900-\u097f",
    "zh": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af",
    "ja": "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\uff66-\uff9d",
    "ko": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3",
    "th": "\u0e01-\u0e5b", "lo": "\u0e81-\u0edf", "km": "\u1780-\u17ff", "my": "\u1000-\u109f",
    "el": "\u0370-\u03ff\u1f00-\u1fff", "he": "\u0590-\u05ff", "hy": "\u0530-\u058f", "ka": "\u10a0-\u10ff",
    "bn": "\u0980-\u09ff", "pa": "\u0a00-\u0a7f", "gu": "\u0a80-\u0aff", "ta": "\u0b80-\u0bff", "te": "\u0c00-\u0c7f",
    "kn": "\u0c80-\u0cff", "ml": "\u0d00-\u0d7f", "si": "\u0d80-\u0dff", "am": "\u1200-\u137f",
}  # fmt: skip
"""Script → its letters; where one language owns nearly all of a script, under the code of that language."""
OWNERS = frozenset(name for name in _LETTERS if len(name) == 2)
"""Languages that are told by their script alone."""
_SCRIPT = re.compile("|".join(f"(?P<{name}>[{letters}]+)" for name, letters in _LETTERS.items()))
_ASCII_LETTER = re.compile("[A-Za-z]")
_HEAVY = {"zh": 2}
"""A Han character stands for more than a letter."""


def tokens(text: str) -> list[str]:
    """Runs of what is not a blank; in scripts without spaces, single characters."""
    return _TOKEN.findall(text) if has_unspaced(text) else text.split()


def has_unspaced(text: str) -> bool:
    """Whether there is any character of a script without spaces."""
    return not text.isascii() and _UNSPACED_ONE.search(text) is not None


def is_unspaced(token: str) -> bool:
    """Whether a token is a character of a script without spaces."""
    return len(token) == 1 and _UNSPACED_ONE.match(token) is not None


def script(text: str) -> str:
    """The script of most of the letters, as a key of the table above; "" when there is no letter of a known one."""
    if text.isascii():
        return "Latin" if _ASCII_LETTER.search(text) else ""
    weights: dict[str, int] = {}
    for found in _SCRIPT.finditer(text):
        name = found.lastgroup or ""
        weights[name] = weights.get(name, 0) + (found.end() - found.start()) * _HEAVY.get(name, 1)
    if not weights:
        return ""
    # Japanese mixes kana into Han; a Chinese text that quotes a word in kana has few of them
    if 20 * weights.get("ja", 0) >= weights.get("zh", 0) > 0 and "ja" in weights:
        weights["ja"] += weights.pop("zh")
    return max(sorted(weights), key=lambda name: weights[name])
