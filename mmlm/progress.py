"""Progress of long work: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """`with Progress("shard", total, "records") as p: p.add(n)`; silent when `quiet`."""

    quiet = False  # set once by the command line
    terminal_stream: TextIO | None = None  # set once in a rank whose own stderr is a log file

    def __init__(self, what: str, total: int | None, unit: str, stream: TextIO | None = None) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.stream = stream or self.terminal_stream or sys.stderr
        self.done, self.note = 0, ""
        self.started = self.shown = time.monotonic()
        self.first = 0
        self.terminal = self.stream.isatty()
        self.shown_at: int | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal or self.shown_at not in (None, self.done):
            self._show(last=True)

    def resume_at(self, done: int) -> None:
        """Work that an earlier run already did; not counted into the rate."""
        self.done = self.first = done

    def set(self, done: int, note: str = "") -> None:
        self.add(done - self.done, note)

    def add(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        if time.monotonic() - self.shown >= (0.2 if self.terminal else 5.0):
            self._show()

    def line(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = (self.done - self.first) / seconds
        text = f"{self.what:<9} {self.done:,}"
        if self.total:
            text += f" of {self.total:,} {self.unit} ({100 * self.done / self.total:.0f} %)"
        else:
            text += f" {self.unit}"
        text += f", {rate:,.1f}/s"
        if self.total and rate > 0 and self.done < self.total:
            left = int((self.total - self.done) / rate)
            text += f", {left // 60}:{left % 60:02d} left"
        return text + (f", {self.note}" if self.note else "")

    def _show(self, last: bool = False) -> None:
        self.shown = time.monotonic()
        self.shown_at = self.done
        if self.quiet:
            return
        if self.terminal:
            self.stream.write("\r\x1b[2K" + self.line() + ("\n" if last else ""))
        else:
            self.stream.write(self.line() + "\n")
        self.stream.flush()


def tell(text: str) -> None:
    """One line for the user, also from a rank whose own stderr is a log file (it gets the line, too)."""
    for stream in {id(s): s for s in (sys.stderr, Progress.terminal_stream or sys.stderr)}.values():
        stream.write(("\r\x1b[2K" if stream.isatty() else "") + text + "\n")
        stream.flush()
