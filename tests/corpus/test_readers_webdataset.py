"""Existing WebDataset tars: members are read in place, and nothing else that a tar may hold is."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmlm.corpus.drafts import RefuseError
from mmlm.corpus.readers.tar import read_members
from mmlm.corpus.readers.webdataset import split_in_name, split_key
from mmlm.errors import DataError
from mmlm.storage import read_uri, split_fragment
from tests.corpus.samples import Scan, png, wav

SOURCE = {"kind": "webdataset", "files": "*.tar"}


def tar(
    members: Sequence[tuple[str, bytes] | tarfile.TarInfo], form: int = tarfile.USTAR_FORMAT, headers: Any = None
) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=form, pax_headers=headers) as t:
        for one in members:
            if isinstance(one, tarfile.TarInfo):
                t.addfile(one)
            else:
                info = tarfile.TarInfo(one[0])
                info.size = len(one[1])
                t.addfile(info, io.BytesIO(one[1]))
    return held.getvalue()


def odd(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_media_lie_in_place_and_texts_are_read(form: int, tmp_path: Path, scanned: Scan) -> None:
    long = "d" * 90 + "/" + ("猫" * 60 if form != tarfile.USTAR_FORMAT else "x" * 60)
    members = [(f"{k}.{e}", d) for k, i in ((long, 1), ("a/two", 2)) for e, d in (("png", png(i)), ("txt", b"a cat"))]
    (tmp_path / "a.tar").write_bytes(tar([odd("a", tarfile.DIRTYPE), ("a/._x.png", b"x"), *members], form))
    made = scanned(tmp_path, SOURCE)
    assert set(made.records) == {f"a.tar/{long}", "a.tar/a/two"}
    record = made.records["a.tar/a/two"]
    assert [(p.kind, p.role) for p in record.parts] == [("image", "user"), ("text", "user")]
    assert record.target.text == "a cat" and record.task == "caption"
    uri = record.parts[0].uri or ""
    assert split_fragment(uri)[0] == "a.tar" and read_uri(uri, tmp_path) == png(2)


def test_what_is_what_is_inferred_or_told(tmp_path: Path, scanned: Scan) -> None:
    sample = [
        ("1.jpg", png(1)),
        ("1.left.ogg", wav(3)),
        ("1.cls", b"7\n"),
        ("1.JSON", b'{"name": "owl", "n": {"age": 3}}'),
    ]
    (tmp_path / "train-0.tar").write_bytes(tar(sample))
    record = scanned(tmp_path, SOURCE).records["train-0.tar/1"]
    assert (record.task, record.target.label, record.split) == ("category", "7", "train")
    assert [p.kind for p in record.parts] == ["image", "audio", "text"]
    told = {
        **SOURCE, "map": {"id": "json.name", "image": ["webp", "jpg"], "fields": {"age": "json.n.age"}},
        "ask": [{"task": "name", "question": "Who?", "answer": "json.name", "audio": []}],
    }  # fmt: skip
    record = scanned(tmp_path, told).records["owl"]
    assert [p.kind for p in record.parts] == ["image", "fields", "text"] and record.target.text == "owl"
    (tmp_path / "train-0.tar").write_bytes(tar([("1.jpg", png(1)), ("1.npy", b"x")]))
    with pytest.raises(DataError, match="say in `ask`"):
        scanned(tmp_path, SOURCE)


def test_hostile_members_refuse_their_sample_alone(tmp_path: Path, scanned: Scan) -> None:
    good = [("ok.png", png(1)), ("ok.txt", b"fine")]
    sparse = tarfile.TarInfo("sparse.png")
    sparse.pax_headers = {"GNU.sparse.realsize": "99"}
    members: list[Any] = [
        ("climbs/../../x.png", png(2)), ("/etc/passwd.png", png(3)),
        odd("link.png", tarfile.SYMTYPE, "/etc/passwd"), ("link.txt", b"x"),
        odd("hard.png", tarfile.LNKTYPE, "ok.png"), odd("device.png", tarfile.CHRTYPE), odd("pipe.png", tarfile.FIFOTYPE),
        *good, sparse, ("twice.png", png(4)), ("twice.png", png(5)), ("twice.txt", b"x"),
        ("pickle.png", png(6)), ("pickle.pyd", b"cos\nsystem\n"), ("json.png", png(7)), ("json.json", b"[" * 100_000),
        ("text.png", png(8)), ("text.txt", b"\xff\xfe\xfa"), ("long.png", png(9)), ("long.txt", b"x" * (1 << 20) + b"y"),
        ("empty.png", b""), ("empty.txt", b"nothing there"), ("lone.png", png(10)),
    ]  # fmt: skip
    data = tar(members, tarfile.PAX_FORMAT)
    (tmp_path / "a.tar").write_bytes(data)
    made = scanned(tmp_path, SOURCE)
    assert set(made.records) == {"a.tar/ok"}
    assert {k.removeprefix("a.tar/"): v for k, v in made.reasons.items()} == {
        "climbs/../../x": "unsafe_path", "/etc/passwd": "unsafe_path", "link": "link_member", "hard": "link_member",
        "device": "device_member", "pipe": "device_member", "sparse": "sparse_member", "twice": "duplicate_member",
        "pickle": "pickle", "json": "bad_json", "text": "bad_encoding", "long": "too_large", "empty": "unreadable_image",
        "lone": "no_target",
    }  # fmt: skip
    passed_over = scanned(tmp_path, {**SOURCE, "ignore": ["pyd"]})
    assert passed_over.reasons["a.tar/pickle"] == "no_target"  # as it would be without the pickle


def test_names_that_are_no_text(tmp_path: Path, scanned: Scan) -> None:
    data = tar([("ok.png", png(1)), ("ok.txt", b"x"), ("bad?.png", png(2)), ("nul?.png", png(3))], tarfile.PAX_FORMAT)
    raw = bytearray(data)
    at = raw.index(b"bad?.png")
    raw[at + 3] = 0xFF
    raw[at + 148 : at + 156] = b"%06o\0 " % (sum(raw[at : at + 148]) + 256 + sum(raw[at + 156 : at + 512]))
    (tmp_path / "a.tar").write_bytes(bytes(raw))
    made = scanned(tmp_path, SOURCE)
    assert made.reasons["a.tar/bad\\xff"] == "bad_name"


@pytest.mark.parametrize(
    ("name", "change", "reason", "kept"),
    [
        ("truncated within a member", lambda d: d[: 512 * 5 + 10], "truncated_tar", 1),
        ("truncated within a header", lambda d: d[: 512 * 4 + 10], "truncated_tar", 0),
        ("without an end mark", lambda d: d[: 512 * 8], "truncated_tar", 1),
        ("a flipped bit in a header", lambda d: d[:2060] + b"~" + d[2061:], "bad_tar", 1),
        ("gzip", lambda d: b"\x1f\x8b" + d, "compressed_tar", 0),
        ("no tar", lambda d: b"hello" * 1000, "bad_tar", 0),
        ("empty", lambda d: b"", "bad_tar", 0),
        ("two tars in one", lambda d: d + d, "data_after_end", 2),
        ("a size below nothing", lambda d: resized(d, b"-0000000001\0"), "bad_tar", 1),
        ("a size of exabytes", lambda d: resized(d, b"\x80" + b"\x7f" * 11), "truncated_tar", 1),
    ],
)
def test_a_broken_tar_keeps_what_came_before(
    name: str, change: Any, reason: str, kept: int, tmp_path: Path, scanned: Scan
) -> None:
    whole = tar([(f"{i}.{e}", d) for i in (1, 2) for e, d in (("png", png(i)), ("txt", b"x" * i))])
    (tmp_path / "a.tar").write_bytes(change(whole))
    (tmp_path / "b.tar").write_bytes(tar([("9.png", png(9)), ("9.txt", b"nine")]))
    made = scanned(tmp_path, SOURCE)
    assert made.reasons["a.tar"] == reason
    assert sum(r.startswith("a.tar/") for r in made.records) == kept
    assert "b.tar/9" in made.records


def resized(data: bytes, size: bytes) -> bytes:
    """The second sample's first member with another size in its header."""
    head = bytearray(data[2048:2560])
    head[124:136] = size
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 256 + sum(head[156:]))
    return data[:2048] + bytes(head) + data[2560:]


def test_global_headers_may_comment_but_not_rename() -> None:
    good = tar([("a.txt", b"x")], tarfile.PAX_FORMAT, {"comment": "made by git"})
    assert [m.name for m in read_members(io.BytesIO(good), len(good))] == ["a.txt"]
    bad = tar([("a.txt", b"x")], tarfile.PAX_FORMAT, {"path": "b.txt"})
    with pytest.raises(RefuseError, match="global header"):
        list(read_members(io.BytesIO(bad), len(bad)))


def test_members_are_where_tarfile_says() -> None:
    data = tar([("a/" + "n" * 300 + ".png", png(1)), ("b.txt", b""), ("c.json", b"{}" * 400)], tarfile.GNU_FORMAT)
    with tarfile.open(fileobj=io.BytesIO(data)) as t:
        expected = [(m.name, m.offset_data, m.size) for m in t.getmembers()]
    assert [(m.name, m.offset, m.size) for m in read_members(io.BytesIO(data), len(data))] == expected


def test_brace_ranges(tmp_path: Path, scanned: Scan) -> None:
    for i in range(12):
        (tmp_path / f"s-{i:03d}.tar").write_bytes(tar([("k.png", png(i)), ("k.txt", b"x")]))
    made = scanned(tmp_path, {**SOURCE, "files": "s-{002..004}.tar"})
    assert set(made.records) == {f"s-{i:03d}.tar/k" for i in (2, 3, 4)}
    with pytest.raises(DataError, match=r"s-012\.tar"):
        scanned(tmp_path, {**SOURCE, "files": "s-{010..012}.tar"})


def test_names() -> None:
    assert split_key("a.b/c.left.JPG") == ("a.b/c", "left.jpg")
    assert split_key("a/.hidden") == ("a/.hidden", "")
    assert [split_in_name(n) for n in ("cats-train-000.tar", "validation/0.tar", "train-test.tar", "trained.tar")] == [
        "train", "val", "", "",
    ]  # fmt: skip
