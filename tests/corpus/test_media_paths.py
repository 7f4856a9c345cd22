"""How paths of media in tables and chats are read."""

from __future__ import annotations

import pytest

from mmlm.corpus.drafts import RefuseError, media_uri


@pytest.mark.parametrize(
    ("said", "root", "wanted"),
    [
        ("a/b.png", ".", "a/b.png"),
        ("./a/../a/b.png", ".", "a/b.png"),
        ("../images/b.png", "annotations", "images/b.png"),
        ("b.wav#t=1,2", "sounds", "sounds/b.wav#t=1,2"),
        ("../b.wav#t=1,2", "sounds", "b.wav#t=1,2"),
        ("..#t=1,2/", "sounds", ".#t=1,2"),
        ("file:///data/a%20b.png", ".", "a b.png"),
        ("FILE://localhost/data/%E7%8C%AB.png", ".", "猫.png"),
        ("file:///elsewhere/b.png", ".", "/elsewhere/b.png"),
        ("100%25.png", ".", "100%25.png"),  # no URI: the name as it stands
        ("s3://bucket/a%20b.png", ".", "s3://bucket/a%20b.png"),
    ],
)
def test_paths_are_found_where_they_lead(said: str, root: str, wanted: str) -> None:
    assert media_uri(said, root, "/data") == wanted


@pytest.mark.parametrize(
    ("said", "root"),
    [
        ("../b.png", "."), ("..", "."), ("a/../../b.png", "."), ("../../b.png", "annotations"), ("..\\b.png", "."),
        ("a\\..\\..\\b.png", "."), ("../b.png", "../shared"), ("../b.png", "s3://bucket/a"), ("file:///a%00.png", "."),
        ("file:///a%FF.png", "."), ("../b.wav#t=1,2", "."), ("..#t=1,2/", "."), ("a/../..#t=1,2", "."),
    ],
)  # fmt: skip
def test_paths_that_climb_out_are_refused(said: str, root: str) -> None:
    with pytest.raises(RefuseError) as caught:
        media_uri(said, root, "/data")
    assert caught.value.reason == "unsafe_path"
