"""Text out of tokens, piece by piece, as soon as it is certain: never half a character, never the beginning of a stop text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

UNKNOWN = "\ufffd"
"""What bytes become that are no character, or not yet one."""


class Pieces:
    """The pieces of one answer, which joined are its whole text: cut before the first stop text, without white space at
    either end."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._window: list[int] = []
        """The last tokens: those whose text is known, as context, and those that may end within a character."""
        self._known = 0
        self._before = ""
        """The text of the first `_known` tokens of the window."""
        self._text, self._given = "", 0
        """Text that is certain, and how much of it was given away."""
        self.stopped = False

    def copy(self) -> Pieces:
        other = copy.copy(self)
        other._window = list(self._window)
        return other

    def push(self, token: int) -> str:
        """Add a token; returns the text that has become certain, often none."""
        self._window.append(token)
        text = self._decode(self._window)
        new = text[len(self._before) :]
        if text.endswith(UNKNOWN):  # perhaps a character of which bytes are missing
            return self._give(self._searched(self._text + new.rstrip(UNKNOWN)), final=False)
        self._text = self._searched(self._text + new)
        del self._window[: self._known]
        self._known, self._before = len(self._window), self._decode(self._window)
        return self._give(self._text, final=False)

    def close(self) -> str:
        """What was held back."""
        if not self.stopped:
            new = self._decode(self._window)[len(self._before) :]
            self._text = self._searched(self._text + new)
        return self._give(self._text, final=True)

    def _searched(self, text: str) -> str:
        """`text`, or what of it stands before a stop text."""
        begin = max(0, self._given - self._longest)
        found = [at for stop in self._stop if (at := text.find(stop, begin)) >= 0]
        if not found:
            return text
        self.stopped = True
        self._text = text[: min(found)]
        return self._text

    def _give(self, text: str, *, final: bool) -> str:
        end = len(text)
        if not (final or self.stopped):
            end -= next((n for n in range(min(self._longest, end), 0, -1) if self._may_become_stop(text[end - n :])), 0)
        end = len(text[:end].rstrip())  # white space at the end is given only when something follows it
        begin = self._given or len(text) - len(text.lstrip())
        if end <= begin:
            return ""
        self._given = end
        return text[begin:end]

    def _may_become_stop(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stop)


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop texts in it, without white space at either end: what all pieces give."""
    found = [at for one in stop if (at := text.find(one)) >= 0]
    return text[: min(found, default=len(text))].strip()
