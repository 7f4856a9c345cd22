"""Whole corpora of hostile files with good ones beside them, written below a folder.

Each writer returns what must become of each file or row: its id, or where it stands when it has none → `kept`,
`refused REASON` or `quarantine REASON`.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.pictures import SIGNATURE, encode, ihdr, picture_cases, png
from tests.hostile.sounds import sound_cases, wav

Expected = dict[str, str]


class Touch:
    """Unpickling it writes the file `canary`."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.canary}",))


def write_folders(data: Path, canary: Path) -> Expected:
    """Class folders: every hostile picture and sound, files that are something else, and odd names."""
    folder = data / "folders" / "hostile"
    folder.mkdir(parents=True)
    expected: Expected = {}
    evil = pickle.dumps(Touch(canary))
    held = io.BytesIO()
    np.save(held, np.array([Touch(canary)], dtype=object), allow_pickle=True)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("../../evil", b"x")
    script = f"#!/bin/sh\ntouch {canary}\n".encode()
    media: dict[str | bytes, tuple[bytes, str]] = {}
    media.update({**picture_cases(str(canary)), **sound_cases()})
    cases: dict[str | bytes, tuple[bytes, str]] = {
        **media,
        # files that would run something if somebody loaded them the easy way
        "objects.npy": (held.getvalue(), "refused unknown_format"),
        "features.pkl": (evil, "refused unknown_format"),
        "model.pth": (evil, "refused unknown_format"),
        "weights.pyd": (evil, "refused unknown_format"),
        "pickle.png": (evil, "refused unreadable_image"),
        "pickle.wav": (evil, "refused unreadable_audio"),
        "script.jpg": (script, "refused unreadable_image"),
        "program.png": (b"\x7fELF\2\1\1" + bytes(64), "refused unreadable_image"),
        "page.png": (b"<html><script>alert(1)</script></html>", "refused unreadable_image"),
        # two formats in one file
        "picture_and_archive.png": (encode("PNG") + archive.getvalue(), "kept"),
        "picture_and_script.jpg": (encode("JPEG") + b"<?php system('touch x'); ?>", "kept"),
        "picture_and_pickle.png": (encode("PNG") + evil, "kept"),
        "document_and_picture.png": (b"%PDF-1.7\n" + encode("PNG"), "refused unreadable_image"),
        "sound_and_archive.wav": (wav() + archive.getvalue(), "kept"),
        # texts
        "empty.txt": (b"", "refused no_parts"),
        "blank.txt": (b" \n\t\n", "refused no_parts"),
        "not_utf8.txt": (b"caf\xe9 \xff\xfe", "refused bad_encoding"),
        "utf16.txt": ("词".encode("utf-16"), "kept"),
        "surrogates.txt": (b"\xed\xa0\x80 half a pair", "refused bad_encoding"),
        "overlong.txt": (b"\xe0\x80\xaf\xff\xff", "refused bad_encoding"),
        "two_megabytes.txt": (b"a " * (1 << 20), "refused too_large"),
        "marks_of_the_model.txt": (b"<eos><answer> hostile <image><image>", "kept"),
        "packed.txt": (gzip.compress(bytes(1 << 20)), "refused bad_encoding"),
        "long.txt": (" ".join(map(str, range(9000))).encode(), "quarantine too_long"),
        # names
        b"not_\xff\xfe_utf8.png": (encode("PNG"), "refused bad_name"),
        "line\nbreak.png": (encode("PNG"), "kept"),
        "--rf $(touch canary) `id`.png": (encode("PNG"), "kept"),
        "\u202egnp.exe.png": (encode("PNG"), "kept"),
        "a#t=0,999999999.wav": (wav(), "kept"),
        "%2e%2e%2fpasswd.png": (encode("PNG"), "kept"),
        ("n" * 251) + ".png": (encode("PNG"), "kept"),
        "a..png.png": (encode("PNG"), "kept"),
        "no_ending": (encode("PNG"), "kept"),
        "endless.ending.": (b"?", "refused unknown_format"),
    }  # fmt: skip
    for name, (content, told) in cases.items():
        raw = os.fsencode(name) if isinstance(name, str) else name
        (folder / os.fsdecode(raw)).write_bytes(content)
        shown = f"folders/hostile/{os.fsdecode(raw)}"
        expected[shown if isinstance(name, str) else ascii(shown)] = told
    (folder / "link_to_a_secret.png").symlink_to("/etc/passwd")
    expected["folders/hostile/link_to_a_secret.png"] = "refused unreadable_image"
    with (folder / "sparse_600_megabytes.png").open("wb") as sparse:
        sparse.write(encode("PNG"))
        sparse.truncate(600 << 20)
    expected["folders/hostile/sparse_600_megabytes.png"] = "refused unreadable_file"
    (data / "folders" / "stray.png").write_bytes(encode("PNG"))
    expected["folders/stray.png"] = "refused no_class"
    return expected


def write_good(data: Path) -> Expected:
    """Class folders of good files, which must be kept whatever lies beside them."""
    expected: Expected = {}
    for name, content in {"a.png": encode("PNG"), "b.jpg": encode("JPEG"), "c.wav": wav(), "d.txt": b"good"}.items():
        path = data / "folders" / "good" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        expected[f"folders/good/{name}"] = "kept"
    return expected


def write_chat(data: Path, canary: Path) -> Expected:
    """JSON lines: rows that are none, that nest, that reach elsewhere, that carry bombs."""
    (data / "chat").mkdir(parents=True)
    (data / "chat" / "good.png").write_bytes(encode("PNG"))
    (data / "chat" / "folder.png").mkdir()
    (data / "chat" / "bad\udcff.png").write_bytes(encode("PNG"))  # a name that is not UTF-8
    os.mkfifo(data / "chat" / "pipe.png")
    bomb = base64.b64encode(SIGNATURE + ihdr(100_000, 100_000)).decode()
    evil = base64.b64encode(pickle.dumps(Touch(canary))).decode()

    def row(name: str, content: Any = "What?", **more: Any) -> bytes:
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "an answer"}]
        return json.dumps({"id": name, "messages": turns, **more}).encode()

    def shows(name: str, url: Any) -> bytes:
        return row(name, [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}])

    lines: list[tuple[bytes, str, str]] = [  # line, its id or "", what becomes of it
        (b'{"id": "cut off', "", "refused bad_json"),
        (b"[" * 200_000, "", "refused bad_json"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "", "refused bad_json"),
        (b'{"id": "\xff\xfe"}', "", "refused bad_json"),
        (b'{"id": 1' + b"0" * 10_000 + b"}", "", "refused bad_json"),
        (b"\x00\x01\x02", "", "refused bad_json"),
        (b'{"id": "20 million lists", "messages": [' + b"[]," * 20_000_000 + b"[]]}", "", "refused too_large"),
        (b"null", "", "refused bad_row"),
        (b"[1, 2]", "", "refused bad_row"),
        (b'{"id": "no messages"}', "no messages", "refused no_messages"),
        (row("role", messages=[{"role": "root", "content": "x"}]), "role", "refused bad_role"),
        (b'{"id": "silent", "messages": [{"role": "user", "content": "?"}]}', "silent", "refused no_target"),
        (row("surrogate", "half \ud800 a pair"), "surrogate", "refused bad_encoding"),
        (row("number", number="1e999"), "number", "refused bad_value"),
        (row("split", split="../../etc"), "split", "refused bad_split"),
        (row("label", label={"$ne": None}), "label", "refused bad_value"),
        (row("program", [{"type": "program", "program": "rm"}]), "program", "refused unsupported_kind"),
        (row("placeholder", "<image>", images=[]), "placeholder", "refused media_mismatch"),
        (shows("climbs", "../../../etc/passwd"), "climbs", "refused unsafe_path"),
        (shows("climbs back", "..\\..\\secret.png"), "climbs back", "refused unsafe_path"),
        (shows("nul", "good.png\0.txt"), "nul", "refused unsafe_path"),
        (shows("secret", "/etc/passwd"), "secret", "refused unreadable_image"),
        (shows("missing", "nowhere.png"), "missing", "refused missing_file"),
        (shows("long name", "n" * 5000 + ".png"), "long name", "refused missing_file"),
        (shows("zero", "/dev/zero"), "zero", "refused unreadable_file"),
        (shows("random", "file:///dev/urandom"), "random", "refused unreadable_file"),
        (shows("memory", "/proc/self/mem"), "memory", "refused unreadable_file"),
        (shows("folder", "folder.png"), "folder", "refused unreadable_file"),
        (shows("pipe", "pipe.png"), "pipe", "refused unreadable_file"),
        (shows("shell", f"pipe:touch {canary}"), "shell", "refused missing_file"),
        (shows("elsewhere", "http://127.0.0.1:9/a.png"), "elsewhere", "refused remote_uri"),
        (shows("chained", "simplecache::file:///etc/passwd"), "chained", "refused remote_uri"),
        (shows("archive", "zip://x.png::http://127.0.0.1:9/a.zip"), "archive", "refused remote_uri"),
        (shows("not utf8", "bad\udcff.png"), "not utf8", "refused bad_name"),
        (shows("surrogate inside", "data:,\ud800"), "surrogate inside", "refused bad_data_uri"),
        (shows("no comma", "data:image/png;base64"), "no comma", "refused bad_data_uri"),
        (shows("no base64", "data:image/png;base64,@@@@"), "no base64", "refused bad_data_uri"),
        (shows("inline bomb", f"data:image/png;base64,{bomb}"), "inline bomb", "refused unreadable_image"),
        (shows("inline pickle", f"data:image/png;base64,{evil}"), "inline pickle", "refused unreadable_image"),
        (shows("number for a path", 7), "number for a path", "refused bad_value"),
        (shows("bytes of", "good.png#bytes=0+999999999999999999"), "bytes of", "refused unreadable_file"),
        (row("long", " ".join(map(str, range(9000)))), "long", "quarantine too_long"),
        (row("marks", "<eos><image><answer> zero \u0000 byte"), "marks", "kept"),
        (row("keys twice").replace(b'"id"', b'"id": "first", "id"'), "keys twice", "kept"),
        (shows("good", "good.png"), "good", "kept"),
        (row("twice"), "twice", "kept"),
    ]  # fmt: skip
    (data / "chat" / "chat.jsonl").write_bytes(b"\n".join(line for line, _, _ in lines) + b"\n")
    return {name or f"chat/chat.jsonl:{i}": told for i, (_, name, told) in enumerate(lines, 1)}


def write_table(data: Path) -> Expected:
    """A CSV of text, label and number."""
    lines: list[tuple[bytes, str]] = [
        (b"good,yes,1", "kept"),
        (b"too few", "refused bad_row"),
        (b"too,many,1,cells", "refused bad_row"),
        (b"caf\xe9\x81,yes,1", "refused bad_encoding"),
        (b"not finite,yes,nan", "refused bad_value"),
        (b"too large,yes,1e400", "refused bad_value"),
        (b"no number,yes,0x41", "refused bad_value"),
        (b"=cmd|' /C calc'!A0,yes,2", "kept"),
        (b"no label,,2", "refused no_target"),
        (b",yes,1", "refused no_parts"),
        (b"nul \x00 byte,yes,3", "kept"),
        (b'"a quote that never ends,yes,1', "refused bad_row"),
        (b"swallowed by none,no,1", "kept"),
    ]
    (data / "table").mkdir(parents=True)
    (data / "table" / "rows.csv").write_bytes(b"text,label,number\n" + b"\n".join(line for line, _ in lines) + b"\n")
    wheres = [f"table/rows.csv:{i}" for i in range(2, len(lines) + 2)]
    return dict(zip(wheres, (told for _, told in lines), strict=True))


def header(name: bytes, size: int, kind: bytes = b"0", *, field: bytes | None = None, wrong: bool = False) -> bytes:
    """A ustar header block; `field` stands where the size is written, `wrong` breaks the checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = b"%011o\0" % size if field is None else field
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) + wrong)
    return bytes(block)


def member(name: str | bytes, content: bytes, kind: bytes = b"0") -> bytes:
    raw = name.encode() if isinstance(name, str) else name
    return header(raw, len(content), kind) + content + bytes(-len(content) % 512)


def _pax(key: str, value: bytes) -> bytes:
    rest = b" " + key.encode() + b"=" + value + b"\n"
    length = len(rest) + len(str(len(rest) + 3))
    return member("pax", str(length).encode() + rest, b"x")


Tars = dict[str, tuple[bytes, Expected]]
"""Name → its bytes, and what becomes of each of its records."""
END = bytes(1024)
"""Of a tar."""


def sample(key: str, picture: bytes | None = None, text: bytes = b"a caption") -> bytes:
    return member(f"{key}.png", encode("PNG") if picture is None else picture) + member(f"{key}.txt", text)


def _tars_of_odd_members() -> Tars:
    """Members that are no plain files, or that would be written elsewhere."""
    linked = io.BytesIO()
    with tarfile.open(fileobj=linked, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, kind in (("soft", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("fifo", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"{key}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
            tar.addfile(_info(f"{key}.txt", 1), io.BytesIO(b"x"))
    return {
        "links.tar": (
            linked.getvalue(),
            {"/soft": "refused link_member", "/hard": "refused link_member", "/fifo": "refused device_member"},
        ),
        "device.tar": (member("d.png", b"", b"3") + member("d.txt", b"x") + END, {"/d": "refused device_member"}),
        "sparse.tar": (
            member("s.png", b"x" * 512, b"S") + member("s.txt", b"x") + sample("next") + END,
            {"/s": "refused sparse_member", "/next": "kept"},
        ),
        "sparse_pax.tar": (
            _pax("GNU.sparse.size", b"99999999999") + sample("s") + END, {"/s": "refused sparse_member"},
        ),
        "climbing.tar": (
            sample("../../evil") + sample("/tmp/evil") + sample("a/../../b") + END,
            {"/../../evil": "refused unsafe_path", "//tmp/evil": "refused unsafe_path",
             "/a/../../b": "refused unsafe_path"},
        ),
        "pax_nul.tar": (_pax("path", b"a\0b.png") + sample("n") + END, {"/a\\0b": "refused unsafe_path", "/n": "*"}),
    }  # fmt: skip


def _damaged_tars() -> Tars:
    """They break off, or say what is not so."""
    good = encode("PNG")
    whole = sample("first") + sample("second")
    return {
        "name_not_utf8.tar": (
            member(b"\xff\xfe.png", good) + member(b"\xff\xfe.txt", b"x") + END, {"/\\xff\\xfe": "refused bad_name"},
        ),
        "broken_pax.tar": (member("pax", b"99999999 path=x\n", b"x") + sample("n") + END, {"": "refused bad_tar"}),
        "name_of_a_gigabyte.tar": (
            sample("n") + header(b"././@LongLink", 1 << 30, b"L") + END, {"/n": "kept", "": "refused bad_tar"},
        ),
        "size_of_exabytes.tar": (
            sample("n") + header(b"x.png", 0, field=b"\x80" + b"\xff" * 11) + END,
            {"/n": "kept", "/x": "refused truncated_tar", "": "refused truncated_tar"},
        ),
        "size_below_zero.tar": (
            sample("n") + header(b"x.png", 0, field=b"-0000000001\0") + END, {"/n": "kept", "": "refused bad_tar"},
        ),
        "wrong_sum.tar": (sample("n") + header(b"x.png", 0, wrong=True) + END, {"/n": "kept", "": "refused bad_tar"}),
        "cut_off.tar": (whole[:-700], {"/first": "kept", "/second": "refused truncated_tar", "": "refused truncated_tar"}),
        "two_in_one.tar": (sample("n") + END + sample("m") + END, {"/n": "kept", "": "refused data_after_end"}),
        "packed.tar": (gzip.compress(bytes(8 << 20)), {"": "refused compressed_tar"}),
        "packed_tightly.tar": (bz2.compress(bytes(8 << 20)), {"": "refused compressed_tar"}),
        "empty.tar": (b"", {"": "refused bad_tar"}),
        "no_tar.tar": (b"<html>" * 200, {"": "refused bad_tar"}),
    }  # fmt: skip


def _tars_of_odd_contents(canary: Path) -> Tars:
    """Plain members in which something is wrong, and one tar in which nothing is."""
    good = encode("PNG")
    evil = pickle.dumps(Touch(canary))
    deep = b"[" * 100_000
    return {
        "a_good.tar": (sample("one") + sample("two") + END, {"/one": "kept", "/two": "kept"}),
        "pickles.tar": (
            sample("p") + member("p.pyd", evil) + sample("q") + member("q.pth", evil) + sample("r")
            + member("r.npy", evil) + END,
            {"/p": "refused pickle", "/q": "refused pickle", "/r": "kept"},  # what nobody asked for is not read
        ),
        "crowd.tar": (
            sample("c") + b"".join(member(f"c.{i}.png", b"") for i in range(1100)) + END,
            {"/c": "refused too_many_members"},
        ),
        "deep.tar": (
            member("d.json", deep) + member("d.png", good) + member("d.txt", b"x") + END, {"/d": "refused bad_json"},
        ),
        "not_utf8.tar": (sample("n", text=b"\xff\xff\x80") + END, {"/n": "refused bad_encoding"}),
        "bombs.tar": (
            sample("pixels", png(100_000, 100_000, b"")) + sample("half", good[: len(good) // 2])
            + sample("none", b"") + END,
            {"/pixels": "refused too_many_pixels", "/half": "quarantine unreadable_image",
             "/none": "refused unreadable_image"},
        ),
        "twice.tar": (sample("t") + member("t.png", good) + END, {"/t": "refused duplicate_member"}),
        "same_key_later.tar": (sample("t") + sample("u") + sample("t") + END, {"/t": "refused duplicate_id", "/u": "kept"}),
    }  # fmt: skip


def write_tars(data: Path, canary: Path) -> Expected:
    """WebDataset tars that lie; the tar's name and the key make the id."""
    told = {**_tars_of_odd_contents(canary), **_tars_of_odd_members(), **_damaged_tars()}
    (data / "tars").mkdir(parents=True)
    expected: Expected = {}
    for name, (content, outcomes) in told.items():
        (data / "tars" / name).write_bytes(content)
        expected |= {f"tars/{name}{key}": outcome for key, outcome in outcomes.items() if outcome != "*"}
    return expected


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def _pdf(*objects: bytes, root: int = 1, trailer: bytes = b"") -> bytes:
    """A PDF of numbered objects with a right table of where they stand."""
    out, places = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n" % number + content + b"\nendobj\n"
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + b"".join(
        b"%010d 00000 n \n" % p for p in places
    )
    end = b"trailer\n<< /Size %d /Root %d 0 R %s >>\nstartxref\n%d\n%%%%EOF\n"
    return out + table + end % (len(objects) + 1, root, trailer, len(out))


def _page(stream: bytes, filters: bytes = b"", catalog: bytes = b"") -> bytes:
    """A PDF of one page with `stream` as what is drawn."""
    return _pdf(
        b"<< /Type /Catalog /Pages 2 0 R " + catalog + b" >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /Resources << /Font << /F 5 0 R >> >> >>",
        b"<< /Length %d %s >>\nstream\n" % (len(stream), filters) + stream + b"\nendstream",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    )


def write_documents(data: Path, canary: Path) -> Expected:
    """Texts, pages, archives of pages and PDFs that swell, loop, lie or would act."""
    sentence = "This is the first sentence of a good document. This is the second one, which ends it. "
    shown = b"BT /F 12 Tf (" + sentence.encode() + b") Tj ET"
    launch = b"/OpenAction << /S /Launch /F (/usr/bin/touch) /P (" + str(canary).encode() + b") >>"
    swelling = zlib.compress(b"BT (x) Tj ET " * 8_000_000, 9)
    twice = zlib.compress(zlib.compress(bytes(200 << 20), 9), 9)
    page = f"<html><body><p>{sentence}</p></body></html>".encode()

    def warc(body: bytes, length: int | None = None) -> bytes:
        answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + body
        head = b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.b/\r\nContent-Type: application/http\r\n"
        head += b"Content-Length: %d\r\n\r\n" % (len(answer) if length is None else length)
        return head + answer + b"\r\n\r\n"

    told: dict[str, tuple[bytes, str, str]] = {  # name → content, what stands behind the name in its id, what becomes of it
        "good.txt": (sentence.encode(), "#0001", "kept"),
        "good.html": (page, "#0001", "kept"),
        "good.pdf": (_page(shown), "#0001", "kept"),
        "good.warc": (warc(page), ":1#0001", "kept"),
        "program.txt": (b"\x7fELF\0\0" + bytes(200), "", "refused unknown_format"),
        "not_utf8.md": (b"\xff\xff\x80 " * 20, "", "refused bad_encoding"),
        "blank.txt": (b"\n" * 100_000, "", "refused too_short"),
        "quotes.md": (b"> " * 60 + b" the end of it. Truly.", "#0001", "kept"),
        "nested.html": (b"<div>" * 200_000 + sentence.encode(), "", "refused bomb"),
        "attributes.html": (b"<p " + b"".join(b"a%d=1 " % i for i in range(150_000)) + b">x", "", "refused too_slow"),
        "entities.html": (
            b'<!DOCTYPE html [<!ENTITY x SYSTEM "file:///etc/passwd">]><p>&x;' + sentence.encode(), "#0001", "kept",
        ),
        "script.html": (b"<script>alert(1)</script>" + page, "#0001", "kept"),
        "charset_lies.html": (b'<meta charset="utf-7">' + page, "#0001", "kept"),
        "no_pdf.pdf": (b"hello", "", "refused unreadable_document"),
        "cut_off.pdf": (_page(shown)[:60], "", "refused unreadable_document"),
        "launch.pdf": (_page(shown, catalog=launch), "#0001", "kept"),
        "swelling.pdf": (_page(swelling, b"/Filter /FlateDecode"), "", "refused bomb|refused too_slow"),
        "packed_twice.pdf": (
            _page(twice, b"/Filter [/FlateDecode /FlateDecode]"), "", "refused bomb|refused too_slow|refused no_text",
        ),
        "pages_in_a_circle.pdf": (
            _pdf(b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [2 0 R 2 0 R] /Count 2 >>"), "",
            "refused bomb|refused unreadable_document|refused too_slow|refused no_text",
        ),
        "a_billion_pages.pdf": (
            _pdf(b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [] /Count 999999999 >>"), "",
            "refused too_many_pages|refused no_text|refused unreadable_document",
        ),
        "nothing_inside.pdf": (_page(b""), "", "refused no_text"),
        "no_archive.warc": (b"hello\r\n" * 100, ":1", "refused bad_warc"),
        "cut_off.warc": (warc(page)[:-60], ":1", "refused bad_warc"),
        "exabytes.warc": (warc(page, 2**62), ":1", "refused bomb"),
        "length_below_zero.warc": (warc(page, -5), ":2", "refused bad_warc"),
        "zeros.warc.gz": (gzip.compress(bytes(100 << 20), 9), ":1", "refused bad_warc"),
        "swelling.warc.gz": (gzip.compress(warc(b"<p>" + b"a " * (50 << 20)), 9), ":1", "refused too_large|refused bomb"),
        "cut_off.warc.gz": (gzip.compress(warc(page))[:-30], ":1", "refused bad_warc"),
    }  # fmt: skip
    (data / "documents").mkdir(parents=True)
    expected: Expected = {}
    for name, (content, behind, outcome) in told.items():
        (data / "documents" / name).write_bytes(content)
        expected[f"documents/{name}{behind}"] = outcome
    return expected


def write_sidecars(data: Path) -> Expected:
    """Files of one name side by side."""
    picture, deep = encode("PNG"), b"[" * 100_000
    files = {
        "good.png": picture, "good.txt": b"a caption", "deep.png": picture, "deep.json": deep,
        "list.png": picture, "list.json": b"[1]", "alone.png": picture, "nobody.txt": b"a caption",
        "two.wav": wav(), "two.flac": wav(), "two.txt": b"x", "bomb.png": png(100_000, 100_000, b""),
        "bomb.txt": b"x", "bytes.png": picture, "bytes.txt": b"\xff\xff\x80", "empty.png": picture, "empty.txt": b"",
        "large.png": picture, "large.txt": b"a" * (2 << 20), "split.png": picture,
        "split.json": b'{"answer": "x", "split": "../.."}',
    }  # fmt: skip
    (data / "sidecar").mkdir(parents=True)
    for name, content in files.items():
        (data / "sidecar" / name).write_bytes(content)
    told = {
        "good": "kept", "deep": "refused bad_json", "list": "refused bad_json|refused bad_row",
        "alone": "refused no_partner", "nobody": "refused no_partner", "two": "refused duplicate_member",
        "bomb": "refused too_many_pixels", "bytes": "refused bad_encoding", "empty": "refused no_target",
        "large": "refused too_large", "split": "refused bad_split",
    }  # fmt: skip
    return {f"sidecar/{name}": outcome for name, outcome in told.items()}


def write_arrow(data: Path, canary: Path) -> Expected:
    """A data set as `save_to_disk` writes it: rows with bombs in them, a file cut off, one that is none."""
    import pyarrow as pa

    folder = data / "arrow"
    folder.mkdir(parents=True)
    evil = pickle.dumps(Touch(canary))
    rows = [
        ({"bytes": encode("PNG"), "path": None}, "kept"),
        ({"bytes": png(100_000, 100_000, b""), "path": None}, "refused too_many_pixels"),
        ({"bytes": evil, "path": "x.png"}, "refused unreadable_image"),
        ({"bytes": None, "path": "../../etc/passwd"}, "refused unsafe_path"),
        ({"bytes": None, "path": "nowhere\0.png"}, "refused unsafe_path"),
        ({"bytes": b"", "path": None}, "refused bad_value"),
    ]
    table = pa.table({"image": [row for row, _ in rows], "text": [f"caption {i}" for i in range(len(rows))]})
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    names = ["data-0.arrow", "data-1.arrow", "data-2.arrow"]
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    held = io.BytesIO()
    with pa.ipc.new_stream(held, table.schema) as writer:
        writer.write_table(table)
    (folder / names[0]).write_bytes(held.getvalue())
    (folder / names[1]).write_bytes(held.getvalue()[: len(held.getvalue()) // 2])
    (folder / names[2]).write_bytes(evil)
    told = {f"arrow/{names[0]}:{i}": outcome for i, (_, outcome) in enumerate(rows, 1) if outcome != "kept"}
    return told | {f"arrow/{name}": "refused bad_table" for name in names[1:]}
