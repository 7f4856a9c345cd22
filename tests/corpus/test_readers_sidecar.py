"""Files of one name side by side make one record."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.corpus.samples import Scan, png, wav
from tests.corpus.test_folders import fill

SOURCE = {"kind": "sidecar"}


def test_captions_beside_pictures_and_sounds(tmp_path: Path, scanned: Scan) -> None:
    fill(
        tmp_path,
        {
            "a/x.png": png(1), "a/x.txt": "树上有一只很大的猫。".encode("gb18030"), "a/x.ogg": wav(3), "a/x-1.png": png(2),
            "a/x-1.txt": b"a dog", "b/x.png": png(3), "b/x.TXT": b"an owl\n", "b/photo.v2.webp": png(4),
            "b/photo.v2.txt": b"a toad", "c/film.mp4": b"\0\0\0 ftypisom", "c/film.txt": b"a film",
            "README.md": b"about", "b/lone.png": png(5), "b/empty.png": png(6), "b/empty.txt": b" ",
            "b/two.txt": b"one", "b/two.md": b"two", "b/two.png": png(7), "b/pair.png": png(8), "b/pair.wav": wav(9),
            "b/odd.png": png(10), "b/odd.txt": b"odd", "b/odd.xmp": b"<x/>",
        },
    )  # fmt: skip
    made = scanned(tmp_path, SOURCE)
    assert {i: r.target.text for i, r in made.records.items()} == {
        "a/x": "树上有一只很大的猫。", "a/x-1": "a dog", "b/x": "an owl", "b/photo.v2": "a toad", "c/film": "a film",
        "b/odd": "odd",
    }  # fmt: skip
    assert [p.kind for p in made.records["a/x"].parts] == ["image", "audio", "text"]
    assert [p.kind for p in made.records["c/film"].parts] == ["video", "text"]
    assert made.reasons == {
        "README.md": "no_partner", "b/lone.png": "no_partner", "b/empty.png": "no_target", "b/two.md": "duplicate_member",
        "b/pair.png": "no_target", "b/odd.xmp": "unknown_format",
    }  # fmt: skip
    assert "b/odd.xmp" not in scanned(tmp_path, {**SOURCE, "ignore": ["xmp"]}).reasons
    assert scanned(tmp_path, SOURCE, allow_video=False).reasons["c/film.mp4"] == "unsupported_kind"


def test_json_beside_them_says_the_rest(tmp_path: Path, scanned: Scan) -> None:
    said = {
        "label": "owl", "fields": {"age": 3, "sex": "f"}, "task": "bird", "lang": "fr", "group": "g", "split": "valid",
        "question": "Quel oiseau ?", "license": "CC0",
    }  # fmt: skip
    fill(
        tmp_path,
        {
            "1.png": png(1), "1.json": json.dumps(said).encode(), "1.txt": b"seen at night", "2.png": png(2),
            "2.json": b"[" * 100_000, "3.png": png(3), "3.json": b"[1]", "4.json": b'{"question": "2+2?", "answer": 4}',
            "5.png": png(5), "5.json": b'{"fields": 3, "label": "x"}', "6.png": png(6), "6.json": b'{"label": "toad"}',
        },
    )  # fmt: skip
    made = scanned(tmp_path, {**SOURCE, "text": "context"})
    record = made.records["1"]
    assert (record.target.label, record.target.text, record.task, record.lang) == ("owl", None, "bird", "fr")
    assert (record.split, record.group, record.license) == ("val", "g", "CC0")
    assert [(p.kind, p.role, p.text) for p in record.parts] == [
        ("image", "user", None), ("fields", "user", None), ("text", "context", "seen at night"),
        ("text", "user", "Quel oiseau ?"),
    ]  # fmt: skip
    assert made.reasons == {
        "2.json": "bad_json", "3.json": "bad_row", "4.json": "no_partner", "5.json": "bad_row",
    }  # fmt: skip
    alone = scanned(tmp_path, {**SOURCE, "text": "question", "alone": True})
    assert [p.text for p in alone.records["4"].parts] == ["2+2?"] and alone.records["4"].target.text == "4"
    assert [p.text for p in alone.records["1"].parts if p.kind == "text"] == ["seen at night", "Quel oiseau ?"]


def test_splits_and_hostile_names(tmp_path: Path, scanned: Scan) -> None:
    for n, split in enumerate(("train", "dev", "test")):
        fill(tmp_path, {f"{split}/{i}.{e}": d for i in range(3) for e, d in (("png", png(10 * n + i)), ("txt", b"t"))})
    with open(os.fsencode(tmp_path) + b"/train/\xff.png", "wb") as f:
        f.write(png(3))
    made = scanned(tmp_path, SOURCE)
    assert {r.split for i, r in made.records.items() if i.startswith("dev/")} == {"val"}
    assert {r.split for i, r in made.records.items() if i.startswith("train/")} == {"train"}
    assert [r["reason"] for r in made.refused] == ["bad_name"]


def test_same_pictures_share_a_group_whatever_they_are_called(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {f"{i}.{e}": d for i in range(6) for e, d in (("png", png(i % 2)), ("txt", b"caption %d" % i))})
    made = scanned(tmp_path, SOURCE)
    assert len({r.group for r in made.records.values()}) == 2
    assert len({r.content_hash for r in made.records.values()}) == 6
