"""Class folders become records."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmlm.corpus.guess import look
from mmlm.errors import DataError
from tests.corpus.samples import Scan, png, wav

SOURCE = {"kind": "folders"}


def fill(folder: Path, names: dict[str, bytes]) -> None:
    for name, data in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_pictures_sounds_and_texts(tmp_path: Path, scanned: Scan) -> None:
    fill(
        tmp_path,
        {
            "big cats/holiday 1.png": png(1),
            "big cats/deeper/2.png": png(2),
            "猫/叫.wav": wav(5),
            "猫/note.txt": "一只猫".encode(),
            "猫/no ending": png(3),
            "猫/broken.png": b"\x89PNG broken",
            "猫/silent.wav": wav(1, 0),
            "猫/empty.txt": b" \n",
            "猫/latin.txt": b"\xff\xfe\xfa",
            "猫/table.xlsx": b"PK\x03\x04",
            "猫/sound.png": wav(7),
            "README.txt": b"about",
            ".DS_Store": b"x",
            "猫/.hidden.png": png(4),
            "猫/Thumbs.db": b"x",
            "__MACOSX/a/._1.png": b"x",
        },
    )
    made = scanned(tmp_path, SOURCE)
    labels = {i: r.target.label for i, r in made.records.items()}
    assert labels == {
        "big cats/holiday 1.png": "big cats", "big cats/deeper/2.png": "big cats",
        "猫/叫.wav": "猫", "猫/note.txt": "猫", "猫/no ending": "猫",
    }  # fmt: skip
    assert made.reasons == {
        "猫/broken.png": "unreadable_image", "猫/silent.wav": "empty_sound", "猫/empty.txt": "no_parts",
        "猫/latin.txt": "bad_encoding", "猫/table.xlsx": "unknown_format", "猫/sound.png": "wrong_kind",
        "README.txt": "no_class",
    }  # fmt: skip
    assert [p.kind for p in made.records["big cats/holiday 1.png"].parts] == ["image", "text"]
    assert [p.text for p in made.records["猫/note.txt"].parts] == ["一只猫"]
    task = made.artifact.extra["tasks"][0]
    assert (task["name"], task["has_text"]) == ("category", False)


def test_nested_classes(tmp_path: Path, scanned: Scan) -> None:
    fill(
        tmp_path, {f"data/birds/{name}/{i}.png": png(10 * i + len(name)) for i in range(3) for name in ("owl", "raven")}
    )
    made = scanned(tmp_path, {**SOURCE, "path": "data", "nested": True})
    assert made.records["data/birds/owl/0.png"].target.label == "birds/owl"


def test_given_splits_are_kept(tmp_path: Path, scanned: Scan) -> None:
    names = {"train": "train", "valid": "val", "test": "test"}
    fill(tmp_path, {f"{s}/{c}/{i}.png": png(hash_of(s, c, i)) for s in names for c in "ab" for i in range(3)})
    made = scanned(tmp_path, SOURCE)
    assert all(r.split == names[i.split("/")[0]] for i, r in made.records.items())
    assert {r.target.label for r in made.records.values()} == {"a", "b"}


def test_a_folder_beside_the_splits_is_left_out_by_name(tmp_path: Path, scanned: Scan) -> None:
    names = {"train": "train", "valid": "val"}
    fill(tmp_path, {f"{s}/{c}/{i}.png": png(hash_of(s, c, i)) for s in names for c in ("cat", "dog") for i in range(3)})
    fill(tmp_path, {f"unlabeled/{i}.png": png(900 + i) for i in range(5)})
    fill(tmp_path, {"extra/cat/1.png": png(99)})
    made = scanned(tmp_path, SOURCE, error_budget=0.0)
    assert {r.target.label for r in made.records.values()} == {"cat", "dog"}
    assert {r.split for i, r in made.records.items() if i.startswith("valid")} == {"val"}
    assert made.reasons == {**{f"unlabeled/{i}.png": "no_split" for i in range(5)}, "extra/cat/1.png": "no_split"}
    guess = look(tmp_path)
    assert guess.tasks == {"category": ["cat", "dog"]} and guess.counts["val"] == 6
    assert "Left out, since they lie in no split: 1 in extra, 5 in unlabeled." in guess.says


def test_a_class_that_is_called_train_is_one(tmp_path: Path, scanned: Scan) -> None:
    fill(
        tmp_path,
        {f"{c}.png": png(i) for i, c in enumerate(("train/steam/1", "train/fast/1", "bus/city/1", "bus/old/1"))},
    )
    made = scanned(tmp_path, SOURCE)
    assert {r.target.label for r in made.records.values()} == {"train", "bus"}


def hash_of(*words: object) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate("".join(map(str, words)))) % 2**31


def test_identical_pictures_never_cross_splits(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {f"{c}/{i}.png": png(i % 10) for c in "ab" for i in range(40)})
    made = scanned(tmp_path, SOURCE)
    by_group: dict[str, set[str]] = {}
    for record in made.records.values():
        by_group.setdefault(record.group, set()).add(record.split)
    assert len(by_group) == 10
    assert all(len(s) == 1 for s in by_group.values())


def test_names_that_are_not_unicode_and_loops_of_links(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {"a/1.png": png(1), "b/2.png": png(2)})
    (tmp_path / "a/round").symlink_to(tmp_path)
    with open(os.fsencode(tmp_path) + b"/a/\xff.png", "wb") as f:
        f.write(png(3))
    made = scanned(tmp_path, SOURCE)
    assert set(made.records) == {"a/1.png", "b/2.png"}
    assert [r["reason"] for r in made.refused] == ["bad_name"]


def test_links_to_folders_are_followed_within_the_data_and_refused_by_name_beyond(
    tmp_path: Path, scanned: Scan
) -> None:
    data = tmp_path / "data"
    fill(data, {f"corpus/{c}/{i}.png": png(10 * i + ord(c)) for c in "ab" for i in range(3)})
    fill(data, {f"pool/{i}.png": png(500 + i) for i in range(3)})
    fill(tmp_path, {"outside/1.png": png(700), "more/2.png": png(701)})
    (data / "corpus/c").symlink_to("../pool")
    (data / "pool/round").symlink_to(data)
    (data / "corpus/d").symlink_to(tmp_path / "outside")
    (data / "corpus/a/gone.png").symlink_to(tmp_path / "nothing.png")
    (data / "corpus/a/self").symlink_to("self")
    (data / "corpus/a/file.png").symlink_to(tmp_path / "more/2.png")
    made = scanned(data, {**SOURCE, "path": "corpus"})
    assert {i: r.target.label for i, r in made.records.items() if "/c/" in i} == {
        f"corpus/c/{i}.png": "c" for i in range(3)
    }
    assert "corpus/a/file.png" in made.records and made.counts["kept"] == 10
    assert made.reasons == {
        "corpus/d": "unsafe_path",
        "corpus/a/gone.png": "missing_file",
        "corpus/a/self": "missing_file",
    }
    (said,) = [s for s in look(data / "corpus").says if s.startswith("Left out")]
    assert "outside the data folder" in said and "leads nowhere" in said


def test_folders_that_link_to_one_another_come_to_an_end(tmp_path: Path, scanned: Scan) -> None:
    names = "abcdef"
    fill(tmp_path, {f"{c}/1.png": png(ord(c)) for c in names})
    for one in names:
        for other in set(names) - {one}:
            (tmp_path / one / other).symlink_to(tmp_path / other)
    made = scanned(tmp_path, SOURCE)
    assert {"a/1.png", "a/b/1.png", "a/b/c/1.png", "a/b/c/d/1.png"} <= made.records.keys()
    assert max(name.count("/") for name in made.records) == 4
    assert set(made.reasons.values()) == {"unsafe_path"}


def test_a_folder_of_links_is_told(tmp_path: Path) -> None:
    fill(tmp_path, {f"pool/{c}/1.png": png(ord(c)) for c in "ab"})
    (tmp_path / "data").mkdir()
    for c in "ab":
        (tmp_path / "data" / c).symlink_to(tmp_path / "pool" / c)
    with pytest.raises(DataError, match=r"nothing but links that are not followed: a: .*outside"):
        look(tmp_path / "data")


def test_links_beside_captions_and_documents_are_refused_too(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {"data/1.png": png(1), "data/1.txt": b"a cat", "outside/2.txt": b"x"})
    (tmp_path / "data/deep").symlink_to(tmp_path / "outside")
    assert scanned(tmp_path / "data", {"kind": "sidecar"}).reasons == {"deep": "unsafe_path"}
    fill(tmp_path, {"texts/1.txt": b"One sentence is here. Another sentence follows it, longer than the first."})
    (tmp_path / "texts/deep").symlink_to(tmp_path / "outside")
    assert scanned(tmp_path / "texts", {"kind": "documents"}).reasons == {"deep": "unsafe_path"}
