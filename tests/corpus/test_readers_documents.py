"""Documents become pieces to be continued; hostile ones are refused with the right word and stall nothing."""

from __future__ import annotations

import gzip
import io
import time
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mmlm.corpus.drafts import RefuseError
from mmlm.corpus.readers import document_process
from mmlm.corpus.readers.cutting import cut, head_and_rest, tidied
from mmlm.corpus.readers.document_process import DocumentProcess
from mmlm.corpus.readers.documents import decode_html
from mmlm.errors import DataError
from tests.corpus.samples import Scan, Scanned
from tests.corpus.test_folders import fill

SOURCE: dict[str, Any] = {"kind": "documents", "max_chars": 80, "min_chars": 10}
ENGLISH = "".join(f"This is sentence number {i}. " for i in range(20)).strip()
CHINESE = "".join(f"这是第{i}句话。" for i in range(20))


def texts(made: Scanned, name: str) -> list[str]:
    """Head and answer of each piece of a document, joined."""
    found = [r for i, r in made.records.items() if i.rpartition("#")[0] == name]
    return [f"{[p.text for p in r.parts if p.role == 'user'][-1]} {r.target.text}" for r in found]


@pytest.mark.parametrize(
    "text", [ENGLISH, CHINESE, "x" * 500, "word " * 100, "第一段。\n\n第二段。" * 20, "a\nb\n" * 100]
)
@pytest.mark.parametrize("overlap", [0, 30])
def test_pieces_hold_all_of_the_text_and_are_not_too_long(text: str, overlap: int) -> None:
    pieces = list(cut(text, 80, 10, overlap))
    covered = 0
    for offset, piece in pieces:
        assert len(piece) <= 90 and text[offset : offset + 100].lstrip().startswith(piece[:20])
        assert not text[covered:offset].strip()
        covered = max(covered, text.index(piece, offset) + len(piece))
        head, rest = head_and_rest(piece)
        assert head and rest and piece.startswith(head) and piece.endswith(rest)
    assert not text[covered:].strip()
    if not overlap:
        assert "".join("".join(p for _, p in pieces).split()) == "".join(text.split())


def test_pieces_end_where_a_reader_would_pause() -> None:
    assert all(piece.endswith(".") for _, piece in cut(ENGLISH, 80, 10))
    assert all(piece.endswith("。") for _, piece in cut(CHINESE, 80, 10))
    assert [p for _, p in cut("One one one.\n\nTwo two. Two two two.", 30, 2)] == [
        "One one one.",
        "Two two. Two two two.",
    ]
    overlapping = [piece for _, piece in cut(CHINESE, 80, 10, 20)]
    assert all(after.startswith("这是第") and after[:6] in before for before, after in pairwise(overlapping))
    assert head_and_rest("第一句。第二句。第三句。") == ("第一句。", "第二句。第三句。")


def test_cutting_takes_time_in_proportion() -> None:
    start = time.monotonic()
    for text in ("." * 1_000_000, "!?" * 500_000, '."' * 500_000, "\n" * 1_000_000, "x" * 1_000_000):
        sum(1 for _ in cut(tidied(text), 2000, 20, 500))
    assert time.monotonic() - start < 10


def test_text_and_markdown(tmp_path: Path, scanned: Scan) -> None:
    markdown = f"---\ntitle: The book\n---\n# First\n\n{ENGLISH}\n\n```\n# no heading\n```\n\n## 第二章\n\n{CHINESE}\n"
    fill(
        tmp_path,
        {
            "a/en.txt": ENGLISH.encode(), "a/zh.txt": CHINESE.encode("gb18030"), "a/copy.txt": ENGLISH.encode(),
            "a/book.md": markdown.encode(), "a/short.txt": b"Hi.", "a/empty.txt": b"", "a/binary.txt": b"\x7fELF\0\0",
            "a/latin.txt": "é à ü ö".encode("latin-1"), "a/picture.png": b"x", "a/huge.txt": b"x" * 100_001,
        },
    )  # fmt: skip
    made = scanned(tmp_path, {**SOURCE, "files": "a", "max_bytes": 100_000})
    assert made.reasons == {
        "a/short.txt": "too_short", "a/empty.txt": "no_parts", "a/binary.txt": "unknown_format",
        "a/latin.txt": "bad_encoding", "a/huge.txt": "too_large",
    }  # fmt: skip
    assert " ".join(texts(made, "a/en.txt")).split() == ENGLISH.split()
    assert "".join(" ".join(texts(made, "a/zh.txt")).split()) == CHINESE
    record = made.records["a/en.txt#0001"]
    assert (record.task, record.parts[0].text) == ("text", "This is sentence number 0.")
    groups: dict[str, set[str]] = {}
    splits: dict[str, set[str]] = {}
    for name, one in made.records.items():
        groups.setdefault(name.split("#")[0], set()).add(one.group)
        splits.setdefault(one.group, set()).add(one.split)
    assert {len(g) for g in groups.values()} == {len(s) for s in splits.values()} == {1}
    assert groups["a/en.txt"] == groups["a/copy.txt"] != groups["a/zh.txt"]
    titles = {p.text for i, r in made.records.items() if "book" in i for p in r.parts if p.role == "context"}
    assert titles == {"First", "第二章"}
    asked = scanned(tmp_path, {**SOURCE, "files": "a/en.txt", "question": {"en": "Go on."}, "title": False})
    assert [p.text for p in asked.records["a/en.txt#0001"].parts] == ["Go on.", "This is sentence number 0."]


def test_splits_by_folder(tmp_path: Path, scanned: Scan) -> None:
    for split in ("train", "valid", "test"):
        fill(tmp_path, {f"d/{split}/{i}.txt": f"{split} {i}. {ENGLISH}".encode() for i in range(3)})
    made = scanned(tmp_path, {**SOURCE, "files": "d/**/*.txt"})
    assert {(i.split("/")[1], r.split) for i, r in made.records.items()} == {
        ("train", "train"), ("valid", "val"), ("test", "test"),
    }  # fmt: skip


PAGE = """<!DOCTYPE html><html><head><title>A  page</title><style>p {{}}</style></head><body><script>alert("no")</script>
<h1>Head<em>ing</em></h1><p>First <b>bold</b>ly said.<br>Next line. &amp; more</p><!-- no --><ul><li>one<li>two</ul>
<pre>a
    b</pre><p>{}</p></body></html>"""


def test_html(tmp_path: Path, scanned: Scan) -> None:
    fill(
        tmp_path,
        {
            "en.html": PAGE.format(ENGLISH).encode(),
            "zh.htm": PAGE.format(CHINESE).replace("<head>", '<head><meta charset="GB2312">').encode("gb18030"),
            "deep.html": b"<div>" * 5000 + ENGLISH.encode(), "empty.html": b"<html><script>x</script></html>",
        },
    )  # fmt: skip
    made = scanned(tmp_path, {**SOURCE, "files": ".", "max_chars": 2000})
    assert made.reasons == {"deep.html": "bomb", "empty.html": "too_short"}
    record = made.records["en.html#0001"]
    assert [(p.role, p.text) for p in record.parts] == [("context", "A page"), ("user", "Heading")]
    expected = "First boldly said.\nNext line. & more\n\none\n\ntwo\n\na\n    b\n\nThis is"
    assert (record.target.text or "").startswith(expected)
    assert "alert" not in (record.target.text or "") and "no -->" not in (record.target.text or "")
    assert (made.records["zh.htm#0001"].target.text or "").endswith(CHINESE)


def test_characters_of_pages() -> None:
    assert decode_html("é“".encode("cp1252"), "iso-8859-1") == "é“"
    assert decode_html('<meta content="text/html; charset=big5">漢字'.encode("big5")).endswith("漢字")
    assert decode_html("<meta charset=rot13>漢字".encode()).endswith("漢字")
    with pytest.raises(RefuseError, match="bad_encoding"):
        decode_html(b"\xff\xfa\xff")


def test_a_page_that_takes_too_long_is_stopped() -> None:
    slow = b"<p " + b" ".join(b"a%d=1" % i for i in range(200_000)) + b">x"
    start = time.monotonic()
    with DocumentProcess() as process:
        with pytest.raises(RefuseError, match="too_slow"):
            process.read("html", slow, pages=1, chars=10**6, seconds=1.5)
        assert time.monotonic() - start < 10
        assert process.read("html", b"<p>x", pages=1, chars=10**6, seconds=20) == ("", "x")
        child = process.child
    assert child and child.returncode is not None


def test_a_library_that_is_missing_is_named(tmp_path: Path, scanned: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(document_process._NEEDS, "html", "no_such_library")
    fill(tmp_path, {"a.html": b"<p>x"})
    with pytest.raises(DataError, match=r"pip install 'mmlm-workflows\[documents\]'"):
        scanned(tmp_path, SOURCE)


def warc(*records: tuple[str, str, bytes], compressed: bool = True) -> bytes:
    """Records of (type, HTTP head or content type, body)."""
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    held = io.BytesIO()
    writer = WARCWriter(held, gzip=compressed)
    for number, (kind, told, body) in enumerate(records):
        if kind == "response":
            status, _, content = told.partition(" ")
            head = StatusAndHeaders(f"{status} X", [("Content-Type", content)], protocol="HTTP/1.1")
            record = writer.create_warc_record(f"http://x/{number}", kind, payload=io.BytesIO(body), http_headers=head)
        else:
            record = writer.create_warc_record(
                f"http://x/{number}", kind, payload=io.BytesIO(body), warc_content_type=told
            )
        writer.write_record(record)
    return held.getvalue()


def test_warc(tmp_path: Path, scanned: Scan) -> None:
    page = PAGE.format(ENGLISH).encode()
    whole = warc(
        ("response", "200 text/html; charset=utf-8", page), ("response", "404 text/html", page),
        ("response", "200 image/png", b"\x89PNG"), ("metadata", "text/plain", b"no"),
        ("response", "200 text/html; charset=gbk", PAGE.format(CHINESE).encode("gbk")),
        ("conversion", "text/plain", ENGLISH.encode()), ("response", "200 text/html", b"<p>" + b"x" * 30_000),
        ("response", "200 text/html", b"<p>short"),
    )  # fmt: skip
    fill(
        tmp_path,
        {"a.warc.gz": whole, "b.warc": gzip.decompress(whole), "cut.warc.gz": whole[:900], "no.warc": b"hello"},
    )
    made = scanned(tmp_path, {**SOURCE, "files": "*.warc*", "max_chars": 2000, "max_bytes": 20_000})
    for name in ("a.warc.gz", "b.warc"):
        assert {i.split("#")[0] for i in made.records if i.startswith(name)} == {f"{name}:{n}" for n in (1, 5, 6)}
        assert {w: r for w, r in made.reasons.items() if w.startswith(name)} == {
            f"{name}:7": "too_large", f"{name}:8": "too_short",
        }  # fmt: skip
    assert made.records["a.warc.gz:5#0001"].target.text == made.records["b.warc:5#0001"].target.text
    assert [r for w, r in made.reasons.items() if w.startswith("cut")] == ["bad_warc"]
    assert [r for w, r in made.reasons.items() if w.startswith("no.")] == ["bad_warc"]
    lying = gzip.decompress(whole).replace(b"Content-Length: ", b"Content-Length: 9999999", 1)
    fill(tmp_path, {"lying/c.warc": lying, "lying/d.txt": ENGLISH.encode()})
    assert scanned(tmp_path, {**SOURCE, "files": "lying", "max_bytes": 20_000}).reasons == {"lying/c.warc:1": "bomb"}


def pdf(pages: list[str], extra: bytes = b"", filtered: bytes | None = None) -> bytes:
    """A PDF with a line of text per page, made by hand."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>"]
    kids = b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(len(pages)))
    objects.append(b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(pages)))
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for i, text in enumerate(pages):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents %d 0 R"
            b" /Resources << /Font << /F1 3 0 R >> >> >>" % (5 + 2 * i)
        )
        stream = filtered or zlib.compress(b"BT /F1 12 Tf 50 700 Td (%s) Tj ET" % text.encode())
        objects.append(b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(stream), stream))
    held, places = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, 1):
        places.append(len(held))
        held += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(held)
    held += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    held += b"".join(b"%010d 00000 n \n" % place for place in places)
    held += b"trailer << /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, extra, start)
    return bytes(held)


def locked(data: bytes, password: str) -> bytes:
    import pypdf

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(data))
    writer.encrypt(password, "owner", algorithm="RC4-128")
    held = io.BytesIO()
    writer.write(held)
    return held.getvalue()


def test_pdf(tmp_path: Path, scanned: Scan) -> None:
    plain = pdf([ENGLISH, "The second page. It ends here."])
    bomb = zlib.compress(b"BT (x) Tj ET " * 10_000_000)
    fill(
        tmp_path,
        {
            "a.pdf": plain, "open.pdf": locked(plain, ""), "locked.pdf": locked(plain, "secret"), "cut.pdf": plain[:300],
            "no.pdf": b"hello", "scan.pdf": pdf(["", ""]), "long.pdf": pdf(["x"] * 6), "bomb.pdf": pdf([""], filtered=bomb),
            "loop.pdf": plain.replace(b"/Kids [4 0 R 6 0 R]", b"/Kids [2 0 R 2 0 R]"),
        },
    )  # fmt: skip
    start = time.monotonic()
    made = scanned(tmp_path, {**SOURCE, "max_chars": 2000, "max_pages": 5, "max_seconds": 8})
    assert time.monotonic() - start < 25
    for name in ("a.pdf", "open.pdf"):
        assert " ".join(texts(made, name)).split() == f"{ENGLISH} The second page. It ends here.".split()
    assert made.reasons["bomb.pdf"] in ("bomb", "too_slow")
    assert {w: r for w, r in made.reasons.items() if w != "bomb.pdf"} == {
        "loop.pdf": "unreadable_document",
        "locked.pdf": "encrypted", "cut.pdf": "unreadable_document", "no.pdf": "unreadable_document",
        "scan.pdf": "no_text", "long.pdf": "too_many_pages",
    }  # fmt: skip
