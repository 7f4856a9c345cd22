"""The child process that opens PDF and HTML: run by its path, it knows nothing of mmlm.

Hostile files can make any library for them run for hours or swell (a tag of 200,000 attributes takes libxml2 minutes),
and only a process can be stopped for sure. Frames on both pipes: 8 bytes of length, then a JSON head, then (to the child)
8 bytes of length and the file. Answers: `{"title", "text"}` or `{"reason", "detail"}`.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import logging
import os
import resource
import signal
import sys
from typing import Any, BinaryIO

MEMORY = 3 << 30
"""Bytes of address space that reading one document may take."""
_BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "center", "dd", "details", "dialog", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html",
    "legend", "li", "main", "nav", "ol", "option", "p", "pre", "section", "summary", "table", "tr", "ul",
}  # fmt: skip
_TIGHT = {"li", "tr", "dd", "dt", "option"}
"""Blocks that begin a line, not a paragraph."""
_DROPPED = {
    "script", "style", "noscript", "template", "svg", "math", "iframe", "object", "embed", "canvas", "select", "button",
    "head", "textarea", "audio", "video",
}  # fmt: skip


class Refused(Exception):
    """(reason, detail)."""


def read_pdf(data: bytes, most_pages: int, most_chars: int) -> dict[str, str]:
    """Title and text of a PDF. Raises Refused: encrypted, too_many_pages, bomb, no_text, too_large."""
    import pypdf
    from pypdf import errors

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = pypdf.PdfReader(io.BytesIO(data), strict=False)
        if reader.is_encrypted and not reader.decrypt(""):
            raise Refused("encrypted", "it wants a password")
        count = len(reader.pages)
        if count > most_pages:
            raise Refused("too_many_pages", f"{count:,} pages; at most {most_pages:,} are read")
        pages, size = [], 0
        for page in reader.pages:
            pages.append(page.extract_text() or "")
            size += len(pages[-1])
            if size > most_chars:
                raise Refused("too_large", f"more than {most_chars:,} characters of text")
        title = str(reader.metadata.get("/Title") or "") if reader.metadata else ""
    except errors.LimitReachedError as error:
        raise Refused("bomb", str(error)[:120]) from None
    except errors.DependencyError:
        raise Refused("encrypted", "in a way that is not read here") from None
    text = "\n\n".join(p.strip() for p in pages if p.strip())
    if not text:
        raise Refused("no_text", f"no text on its {count:,} pages (pictures of pages?)")
    return {"title": title, "text": text}


def read_html(data: bytes, most_chars: int) -> dict[str, str]:
    """Title and text of an HTML page in UTF-8; scripts, styles and the like dropped. Raises Refused: bomb, too_large."""
    from lxml import etree

    parser = etree.HTMLParser(
        recover=True, no_network=True, remove_comments=True, remove_pis=True, huge_tree=False, encoding="utf-8"
    )
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        raise Refused("no_text", f"no HTML: {str(error)[:100]}") from None
    for entry in parser.error_log:
        if entry.type_name == "ERR_RESOURCE_LIMIT" or "Excessive depth" in entry.message:
            raise Refused("bomb", f"nested too deeply ({entry.message[:80]})")
    if root is None:
        return {"title": "", "text": ""}
    out = _Text()
    for event, node in etree.iterwalk(root, events=("start", "end")):
        out.visit(event, node)
        if out.size > most_chars:
            raise Refused("too_large", f"more than {most_chars:,} characters of text")
    title = root.findtext(".//title") or ""
    return {"title": " ".join(title.split()), "text": out.text()}


class _Text:
    """Gathers the text of a tree: blocks apart, blanks as a browser shows them."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.size = self.dropped = self.kept = 0

    def visit(self, event: str, node: Any) -> None:
        tag = node.tag if isinstance(node.tag, str) else "script"
        if event == "start":
            self.dropped += tag in _DROPPED
            self.kept += tag == "pre"
            if tag == "br":
                self.add("\n")
            elif tag in ("td", "th"):
                self.add("\t")
            elif tag in _BLOCKS:
                self.add("\n" if tag in _TIGHT else "\n\n")
            if not self.dropped:
                self.words(node.text)
        else:
            self.dropped -= tag in _DROPPED
            self.kept -= tag == "pre"
            if tag in _BLOCKS:
                self.add("\n" if tag in _TIGHT else "\n\n")
            if not self.dropped:
                self.words(node.tail)

    def add(self, text: str) -> None:
        if not self.dropped:
            self.pieces.append(text)
            self.size += len(text)

    def words(self, text: str | None) -> None:
        if text:
            self.add(text if self.kept else " ".join(("x" + text + "x").split())[1:-1])

    def text(self) -> str:
        lines = "".join(self.pieces).split("\n")
        return "\n".join(line.strip(" \t") if not line.startswith("    ") else line.rstrip() for line in lines).strip()


def answer_to(head: dict[str, Any], data: bytes) -> dict[str, str]:
    """`{"title", "text"}` of a document, or `{"reason", "detail"}`. `head` says its kind and the limits."""
    try:
        if head["kind"] == "pdf":
            return read_pdf(data, head["pages"], head["chars"])
        return read_html(data, head["chars"])
    except Refused as error:
        return {"reason": error.args[0], "detail": error.args[1]}
    except MemoryError:
        return {"reason": "bomb", "detail": f"it takes more than {MEMORY >> 30} GiB of memory to read"}
    except RecursionError:
        return {"reason": "bomb", "detail": "nested too deeply"}
    except ImportError as error:
        return {"reason": "missing", "detail": str(error)}
    except Exception as error:  # pypdf raises nearly anything on rubbish
        return {"reason": "unreadable_document", "detail": f"{type(error).__name__}: {str(error)[:120]}"}


def _prepare() -> BinaryIO:
    """Limit this process, and keep what libraries print off the pipe. Returns the pipe for answers."""
    with contextlib.suppress(Exception):  # Linux: die with the parent
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    return answers


def main() -> None:
    answers, asked = _prepare(), sys.stdin.buffer
    while size := asked.read(8):
        head = json.loads(asked.read(int.from_bytes(size)))
        data = asked.read(int.from_bytes(asked.read(8)))
        signal.alarm(int(head["seconds"]) + 10)  # should the parent be gone
        answer = answer_to(head, data)
        signal.alarm(0)
        line = json.dumps(answer).encode()
        answers.write(len(line).to_bytes(8) + line)
        answers.flush()


if __name__ == "__main__":
    main()
