from __future__ import annotations

from pathlib import Path

import pytest

from mmlm.errors import DataError, explain_os_error
from mmlm.storage import atomic_write, read_uri, split_fragment


@pytest.mark.parametrize(
    ("uri", "bare", "span", "within"),
    [
        ("talk.wav", "talk.wav", None, None),
        ("talk.wav#t=30,60", "talk.wav", (30.0, 60.0), None),
        ("s3://b/talk.wav#t=0.5,1.25", "s3://b/talk.wav", (0.5, 1.25), None),
        ("a.tar#bytes=1024+512", "a.tar", None, (1024, 512)),
        ("a.tar#bytes=1024+512#t=0,3", "a.tar", (0.0, 3.0), (1024, 512)),
        ("song #1.mp3", "song #1.mp3", None, None),
        ("a#t=1,2.wav", "a#t=1,2.wav", None, None),
        ("a.wav#t=1", "a.wav#t=1", None, None),
        ("a.wav#t=1.2.3,4", "a.wav#t=1.2.3,4", None, None),
        ("a.wav#t=1,2\n", "a.wav#t=1,2\n", None, None),
        ("a.tar#bytes=-5+5", "a.tar#bytes=-5+5", None, None),
        ("a.tar#bytes=1" + "0" * 30 + "+5", "a.tar#bytes=1" + "0" * 30 + "+5", None, None),
    ],
)
def test_fragments(uri: str, bare: str, span: object, within: object) -> None:
    assert split_fragment(uri) == (bare, span, within)


def test_bytes_of_a_file_are_read_in_place(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    uri = "a.tar"
    assert read_uri(f"{uri}#bytes=3+4", tmp_path) == b"3456"
    assert read_uri(f"{uri}#bytes=3+4#t=1,2", tmp_path) == b"3456"
    assert read_uri(f"{uri}#t=1,2", tmp_path) == b"0123456789"
    assert read_uri(f"{uri}#bytes=10+0", tmp_path) == b""
    with pytest.raises(DataError, match="ends before them"):
        read_uri(f"{uri}#bytes=8+4", tmp_path)
    with pytest.raises(DataError, match="larger than 3 bytes"):
        read_uri(f"{uri}#bytes=0+4", tmp_path, limit=3)
    with pytest.raises(DataError, match="no file"):
        read_uri(f"{uri}x#bytes=0+4", tmp_path)


def test_bytes_of_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read_uri("#bytes=0+4", tmp_path)
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError):
        read_uri("d#bytes=0+4", tmp_path)
    with pytest.raises(DataError, match="climbs out"):
        read_uri("../x#bytes=0+4", tmp_path)


def test_a_full_disk_is_named_by_the_file_that_found_no_room(tmp_path: Path):
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "model.safetensors"):
        Path("/dev/full").write_bytes(b"x")  # as `f` says it where there is no room: without a name
    assert caught.value.filename == str(tmp_path / "model.safetensors") and not list(tmp_path.iterdir())
    assert f"the disk is full at {tmp_path / 'model.safetensors'}; " in str(explain_os_error(caught.value))
