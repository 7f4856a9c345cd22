"""Opens PDF and HTML in a child process with a deadline and a cap on memory, so that no file can stall or sink a run."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from mmlm.corpus.drafts import RefuseError
from mmlm.errors import DataError

_CHILD = Path(__file__).with_name("document_child.py")
_NEEDS = {"pdf": "pypdf", "html": "lxml", "warc": "warcio"}


def require_library(kind: str) -> None:
    """Raise DataError when the library that reads `kind` (pdf, html, warc) is not installed."""
    if find_spec(_NEEDS[kind]) is None:
        raise DataError(
            f"reading {kind.upper()} takes {_NEEDS[kind]}, which is not installed",
            cure="pip install 'mmlm-workflows[documents]'",
        )


class DocumentProcess:
    """One child, started when first needed and again after it was stopped. Use it in a `with`."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> DocumentProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        if self.child:
            self.child.kill()
            self.child.communicate()
            self.child = None

    def read(self, kind: str, data: bytes, *, pages: int, chars: int, seconds: float) -> tuple[str, str]:
        """(title, text) of a PDF or an HTML page in UTF-8.

        Raises RefuseError: too_slow (more than `seconds`), bomb, encrypted, too_many_pages, no_text, too_large,
        unreadable_document; DataError when a library is missing.
        """
        require_library(kind)
        if self.child is None or self.child.poll() is not None:
            self.stop()
            self.child = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD)],  # -P: its folder holds a `tar.py`, which is not to be imported
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        head = json.dumps({"kind": kind, "pages": pages, "chars": chars, "seconds": seconds}).encode()
        try:
            assert self.child.stdin
            self.child.stdin.write(b"".join((_sized(head), len(data).to_bytes(8), data)))
            self.child.stdin.flush()
            answer = self._answer(time.monotonic() + seconds)
        except (BrokenPipeError, EOFError):
            self.stop()
            raise RefuseError("bomb", "the process that read it did not survive it") from None
        except TimeoutError:
            self.stop()
            raise RefuseError("too_slow", f"reading it took more than {seconds:g} s") from None
        if "reason" in answer:
            raise RefuseError(answer["reason"], answer["detail"])
        return answer["title"], answer["text"]

    def _answer(self, deadline: float) -> dict[str, Any]:
        size = int.from_bytes(self._bytes(8, deadline))
        answer: dict[str, Any] = json.loads(self._bytes(size, deadline))
        return answer

    def _bytes(self, count: int, deadline: float) -> bytes:
        """`count` bytes from the child. Raises TimeoutError or EOFError."""
        assert self.child and self.child.stdout
        handle, held = self.child.stdout.fileno(), bytearray()
        while len(held) < count:
            if not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            more = os.read(handle, min(1 << 20, count - len(held)))
            if not more:
                raise EOFError
            held += more
        return bytes(held)


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(8) + data
