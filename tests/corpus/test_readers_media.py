"""Long sounds in pieces, spans that the data give, videos, and large files that are never held whole."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mmlm.corpus import media
from mmlm.corpus.config import PiecesConfig, TableSource
from mmlm.corpus.drafts import RefuseError
from mmlm.corpus.media import spans
from mmlm.corpus.sniff import read_header, sniff
from mmlm.storage import split_fragment
from tests.corpus.samples import Scan, png, wav, write_lines
from tests.corpus.test_folders import fill
from tests.corpus.test_readers_webdataset import tar

RATE = 8000
TABLE: dict[str, Any] = {
    "kind": "table", "files": "t.jsonl", "map": {"id": "id", "audio": "a"}, "ask": [{"task": "t", "label": "l"}],
}  # fmt: skip


def sound(seconds: float, form: str = "WAV", value: float = 0.1) -> bytes:
    held = io.BytesIO()
    soundfile.write(held, np.linspace(-value, value, round(seconds * RATE)), RATE, format=form)
    return held.getvalue()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (5, [(0, 5)]),
        (10, [(0, 10)]),
        (10.5, [(0, 10), (8, 10.5)]),
        (26, [(0, 10), (8, 18), (16, 26)]),
        (26.5, [(0, 10), (8, 18), (16, 26), (24, 26.5)]),
    ],
)
def test_where_it_is_cut(seconds: float, expected: list[tuple[float, float]]) -> None:
    assert spans(seconds, PiecesConfig(seconds=10, overlap=2, min_seconds=1)) == expected


def test_a_short_rest_is_left_out_and_a_lying_length_refused() -> None:
    assert spans(10.5, PiecesConfig(seconds=10)) == [(0, 10)]
    assert spans(10.5, PiecesConfig(seconds=10, min_seconds=0.5)) == [(0, 10), (10, 10.5)]
    with pytest.raises(RefuseError, match="too_long"):
        spans(1e9, PiecesConfig(seconds=10))
    with pytest.raises(ValueError, match="would never end"):
        PiecesConfig(seconds=10, overlap=10)


def test_a_long_sound_becomes_records_of_one_group(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {"a/long.wav": sound(7), "a/copy.flac": sound(7), "b/short.wav": sound(2), "b/x.png": png(1)})
    made = scanned(tmp_path, {"kind": "folders", "pieces": {"seconds": 3, "overlap": 1}})
    names = [f"a/long.wav#t={t}" for t in ("0,3", "2,5", "4,7")]
    assert [i for i in made.records if "long" in i] == names
    assert {i for i in made.records if "#" not in i} == {"b/short.wav", "b/x.png"}
    assert made.counts["found"] == made.counts["kept"] == 8
    longs = [made.records[n] for n in names]
    assert len({r.group for r in longs}) == 1 and len({r.content_hash for r in longs}) == 3
    assert {r.target.label for r in longs} == {"a"} and len({r.split for r in longs}) == 1
    assert [split_fragment(r.parts[0].uri or "")[:2] for r in longs] == [
        ("a/long.wav", (0, 3)), ("a/long.wav", (2, 5)), ("a/long.wav", (4, 7)),
    ]  # fmt: skip
    assert made.artifact.extra["media"]["audio_seconds"]["max"] == 3.0


@pytest.mark.parametrize(("form", "exact"), [("WAV", True), ("FLAC", True), ("OGG", False)])
def test_an_inline_sound_is_cut_to_the_sample(form: str, exact: bool, tmp_path: Path, scanned: Scan) -> None:
    whole = sound(5, form)
    import base64

    uri = "data:audio/x;base64," + base64.b64encode(whole).decode()
    write_lines(tmp_path / "t.jsonl", [{"id": "x", "a": uri, "l": "y"}])
    made = scanned(tmp_path, {**TABLE, "pieces": {"seconds": 2}})
    assert list(made.records) == ["x#t=0,2", "x#t=2,4", "x#t=4,5"]
    expected, _ = soundfile.read(io.BytesIO(whole), dtype="float64")
    for record, (start, end) in zip(made.records.values(), [(0, 2), (2, 4), (4, 5)], strict=True):
        piece, rate = soundfile.read(io.BytesIO(record.parts[0].data or b""), dtype="float64")
        assert rate == RATE
        assert np.abs(piece - expected[start * RATE : end * RATE]).max() <= (0 if exact else 2 / 2**15)
    assert len({r.content_hash for r in made.records.values()}) == 3


def test_sounds_inside_a_tar_are_cut_too(tmp_path: Path, scanned: Scan) -> None:
    (tmp_path / "a.tar").write_bytes(tar([("1.wav", sound(4)), ("1.txt", b"hello")]))
    made = scanned(tmp_path, {"kind": "webdataset", "files": "a.tar", "pieces": {"seconds": 3}})
    assert list(made.records) == ["a.tar/1#t=0,3", "a.tar/1#t=3,4"]
    bare, span, within = split_fragment(made.records["a.tar/1#t=3,4"].parts[0].uri or "")
    assert (bare, span, within) == ("a.tar", (3, 4), (512, len(sound(4))))


def test_spans_in_the_data(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {"talk.wav": sound(6), "x#t=1.wav": sound(1), "p.png": png(1)})
    cells = ["talk.wav#t=1,2.5", "talk.wav#t=2,60", "talk.wav#t=6,7", "talk.wav#t=3,3", "x#t=1.wav", "gone.wav#t=0,1"]
    write_lines(tmp_path / "t.jsonl", [{"id": str(i), "a": cell, "l": "y"} for i, cell in enumerate(cells)])
    made = scanned(tmp_path, {**TABLE, "pieces": {"seconds": 2}})
    assert set(made.records) == {"0", "1", "4"}
    assert made.reasons == {"t.jsonl:3": "bad_span", "t.jsonl:4": "bad_span", "t.jsonl:6": "missing_file"}
    assert made.records["0"].content_hash != made.records["1"].content_hash
    assert made.artifact.extra["media"]["audio_seconds"]["max"] == 4.0


def test_a_cell_that_no_path_can_be_as_long_as_is_not_looked_up(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {"talk.wav": sound(1)})
    longest = "./" * ((media.MAX_URI - 8) // 2) + "talk.wav"
    cells = [longest, "a1" * (media.MAX_URI // 2) + "b", "a1" * 500_000, "https://" * 100_000]
    write_lines(tmp_path / "t.jsonl", [{"id": str(i), "a": cell, "l": "y"} for i, cell in enumerate(cells)])
    started = time.process_time()
    made = scanned(tmp_path, TABLE)
    assert time.process_time() - started < 10  # letter by letter it took hours
    assert (set(made.records), made.reasons) == ({"0"}, {f"t.jsonl:{line}": "missing_file" for line in (2, 3, 4)})


def test_large_files_are_hashed_without_being_held(
    tmp_path: Path, scanned: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, {"a/1.wav": sound(3), "b/2.png": png(2, 200), "b/3.mp4": b"\0\0\0 ftypisom" + b"x" * 9000})
    (tmp_path / "t.tar").write_bytes(tar([("k.flac", sound(3, "FLAC")), ("k.txt", b"x")]))
    sources = ({"kind": "folders"}, {"kind": "webdataset", "files": "t.tar"})
    whole = [scanned(tmp_path, source) for source in sources]
    monkeypatch.setattr(media, "LARGE", 1000)

    def never(*_: Any) -> bytes:
        raise AssertionError("held whole")

    monkeypatch.setattr(media.MediaReader, "_bytes", never)
    (tmp_path / "t.tar").touch()
    for before, source in zip(whole, sources, strict=True):
        after = scanned(tmp_path, source)
        assert {
            i: r.content_hash for i, r in after.records.items() if "tar/" not in i or source["kind"] != "folders"
        } == {i: r.content_hash for i, r in before.records.items()}
        assert after.artifact.extra["media"] == before.artifact.extra["media"]


@pytest.mark.parametrize(
    ("head", "form"),
    [
        (b"\0\0\0 ftypisom\0\0\2\0", "mp4"),
        (b"\0\0\0\x14ftypqt  ", "mov"),
        (b"\0\0\0\x08wide\0\0\0\0mdat", "mov"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81\1B\x82\x84webm", "webm"),
        (b"\x1aE\xdf\xa3\xa3B\x86\x81\1B\x82\x88matroska", "mkv"),
        (b"RIFF\0\0\0\0AVI LIST", "avi"),
    ],
)
def test_videos_are_known_by_their_first_bytes(head: bytes, form: str) -> None:
    assert sniff(head) == ("video", form)
    assert read_header(head, "video").format == form
    with pytest.raises(RefuseError, match="unsupported_kind"):
        read_header(head, "image")


@pytest.mark.parametrize("data", [b"\0\0\0 ftypavif", b"\0\0\0 ftypM4A ", b"RIFF\0\0\0\0JUNK", b"RIFF", b"%PDF", b""])
def test_what_is_no_video(data: bytes) -> None:
    assert sniff(data)[0] != "video"
    with pytest.raises(RefuseError, match="unreadable_video"):
        read_header(data, "video")
    with pytest.raises(RefuseError, match="wrong_kind"):
        read_header(wav(1), "video")


def test_video_parts_of_chats_and_tables(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {"v/1.mp4": b"\0\0\0 ftypisom", "v/2.avi": b"RIFF\0\0\0\0AVI LIST", "v/3.mkv": b"no video"})
    film = {"role": "user", "content": [{"type": "video", "video": "v/1.mp4"}, {"type": "text", "text": "What?"}]}
    write_lines(tmp_path / "c.jsonl", [{"id": "c", "messages": [film, {"role": "assistant", "content": "A cat."}]}])
    made = scanned(tmp_path, {"kind": "chat", "files": "c.jsonl"})
    assert [p.kind for p in made.records["c"].parts] == ["video", "text"]
    made = scanned(tmp_path, {"kind": "folders", "path": "."})
    assert (set(made.records), made.reasons["v/3.mkv"]) == ({"v/1.mp4", "v/2.avi"}, "unreadable_video")
    assert TableSource(kind="table", files="x", ask=TABLE["ask"]).map.video == []
