"""A document's text → pieces, cut where a reader would pause: paragraphs, then sentences, then words."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

_PARAGRAPH = re.compile(r"\n{2,}")
# possessive, and never begun within a run: a megabyte of full stops must not take a square of that
_SENTENCE = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]»]*+\s+|[。！？；…]+[”’」』）》]*\s*|\n+")
_WORD = re.compile(r"\s+|[，、：,]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def tidied(text: str) -> str:
    """`text` with plain line ends, no control characters, no blanks at line ends and at most one empty line."""
    text = _CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def cut(text: str, max_chars: int, min_chars: int, overlap: int = 0) -> Iterator[tuple[int, str]]:
    """(offset, piece) of `text`; each at most `max_chars` long, save that a rest shorter than `min_chars` is joined on.

    The last paragraph's end beyond the first quarter of a full piece wins, else the last sentence's end beyond its
    half, else a blank there, else it is cut at the very length. With `overlap`, a piece begins with the whole sentences
    that the last `overlap` characters of the one before it hold.
    """
    paragraphs = [m.end() for m in _PARAGRAPH.finditer(text)]
    sentences = [m.end() for m in _SENTENCE.finditer(text)]
    start = 0
    while start < len(text):
        end = start + max_chars
        if len(text) - end < min_chars:
            end = len(text)
        else:
            quarter, half = start + max_chars // 4, start + max_chars // 2
            end = _last(paragraphs, quarter, end) or _last(sentences, half, end) or _last_word(text, half, end) or end
        piece = text[start:end].strip()
        if piece:
            yield start, piece
        if end >= len(text):
            return
        at = bisect_left(sentences, max(end - overlap, start + 1))
        start = min(sentences[at], end) if overlap and at < len(sentences) else end


def _last(ends: list[int], low: int, high: int) -> int:
    """The last of the sorted `ends` in (low, high], or 0."""
    at = bisect_right(ends, high) - 1
    return ends[at] if at >= 0 and ends[at] > low else 0


def _last_word(text: str, low: int, high: int) -> int:
    ends = [m.end() for m in _WORD.finditer(text, low, high)]
    return ends[-1] if ends else 0


def head_and_rest(piece: str) -> tuple[str, str]:
    """The first sentence and what follows; of a piece without a second sentence, its first quarter at a word's end.

    A first sentence longer than three quarters of the piece counts as none. Both are not empty where `piece` has two characters
    that are no blanks at its ends.
    """
    found = _SENTENCE.search(piece)
    end = found.end() if found else 0
    if not 0 < end <= max(1, 3 * len(piece) // 4):
        quarter = max(1, len(piece) // 4)
        word = _WORD.search(piece, quarter, max(quarter, len(piece) // 2))
        end = word.end() if word else quarter
    return piece[:end].strip(), piece[end:].strip()
