"""The keys of a question, the same on the command line, over HTTP and in the bundle; any other is refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from mmlm.errors import DataError

ASKED = ("text", "image", "audio", "fields")
"""What is asked about, and what is embedded."""
KEYS = (*ASKED, "adapter", "generation")
"""Of a question that is answered."""
BESIDE = frozenset({"id", "label", "labels", "number", "answer", "split", "group", "lang"})
"""What lines of a test set hold beside the question; it is passed over."""


def check_keys(question: Iterable[str], known: Sequence[str] = KEYS) -> None:
    """Raises DataError with the nearest known name: a misspelt picture would be answered as if there were none."""
    unknown = sorted(str(key) for key in question if key not in known and key not in BESIDE)
    if unknown:
        raise DataError(f"unknown field {', '.join(_told(k, known) for k in unknown[:5])}; known: {', '.join(known)}")


def _told(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key[:40].lower(), known, 1, 0.6)
    return f"`{key[:40]}`" + (f" (did you mean `{close[0]}`?)" if close else "")
