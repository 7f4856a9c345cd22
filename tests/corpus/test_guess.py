"""Somebody's files, looked at; and what was guessed is scanned."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlm.corpus.guess import Guess, look
from mmlm.errors import DataError
from mmlm.features.spec import VideoSpec
from mmlm.scaffold import choose
from tests.corpus.samples import Scan, Scanned, png, wav, write_lines
from tests.corpus.test_folders import fill


def scan_guess(guess: Guess, scanned: Scan) -> Scanned:
    return scanned(guess.data, *guess.scan["sources"])


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_class_folders(tmp_path: Path, scanned: Scan) -> None:
    fill(
        tmp_path,
        {f"{c}/holiday {i}.png": png(i + 100 * len(c), 32) for c in ("even", "odd ones", "猫") for i in range(8)},
    )
    fill(tmp_path, {"even/broken.png": b"\x89PNG broken", "notes.json": b"{}"})
    guess = look(tmp_path)
    assert (guess.form, guess.tasks, guess.modalities) == (
        "folders",
        {"category": ["even", "odd ones", "猫"]},
        ("image", "text"),
    )
    assert guess.sizes["image_side"]["median"] == 32
    assert guess.sizes["channels"] == 1
    assert any("3 class folders" in s for s in guess.says)
    assert any("cannot be read" in s for s in guess.says)
    made = scan_guess(guess, scanned)
    assert made.counts["kept"] == 24


def test_class_folders_below_splits_with_sounds(tmp_path: Path) -> None:
    fill(tmp_path, {f"{s}/{c}/{i}.wav": wav(i) for s in ("train", "test") for c in "ab" for i in range(3)})
    guess = look(tmp_path)
    assert guess.tasks == {"category": ["a", "b"]}
    assert guess.counts["train"] == 6
    assert guess.sizes["audio_seconds"]["median"] == pytest.approx(0.1)


def test_videos_get_pictures_and_a_sound(tmp_path: Path) -> None:
    beside = {f"side/{i}.{end}": b"a clip" for i in range(6) for end in ("mp4", "txt")}
    fill(tmp_path, {f"classes/{c}/{i}.mp4": b"" for c in "ab" for i in range(3)} | beside)
    for form in ("classes", "side"):
        guess = look(tmp_path / form)
        sizes = choose(guess)
        assert "video" in guess.modalities
        assert sizes.image and sizes.audio  # without them every video would be left out of its record
        assert sizes.max_len >= VideoSpec().max_frames * (sizes.image["size"] // 8) ** 2


def test_a_table_of_reviews(tmp_path: Path, scanned: Scan) -> None:
    rows = [
        {
            "review_id": i,
            "review": f"I thought that number {i} was rather fine",
            "sentiment": ("pos", "neg")[i % 2],
            "stars": i % 5,
        }
        for i in range(40)
    ]
    guess = look(write_csv(tmp_path / "reviews.csv", rows))
    assert guess.tasks == {"sentiment": ["neg", "pos"]}
    ask = guess.scan["sources"][0]["ask"][0]
    assert (ask["text"], ask["label"]) == ("review", "sentiment")
    assert scan_guess(guess, scanned).counts["kept"] == 40


def test_a_folder_with_a_table_and_its_media(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {f"pics/{i}.png": png(i, 16) for i in range(20)} | {f"snd/{i}.wav": wav(i + 1) for i in range(20)})
    rows = [
        {"uid": f"u{i}", "file": f"pics/{i}.png", "sound": f"snd/{i}.wav", "species": ("owl", "crow")[i % 2],
         "weight": i / 3, "set": "train"}
        for i in range(20)
    ]  # fmt: skip
    write_csv(tmp_path / "index.csv", rows)
    guess = look(tmp_path)
    assert (guess.form, guess.modalities) == ("table", ("audio", "fields", "image", "text"))
    assert guess.tasks == {"species": ["crow", "owl"]}
    columns = guess.scan["sources"][0]["map"]
    assert columns == {"image": "file", "audio": "sound", "split": "set", "id": "uid", "fields": {"weight": "weight"}}
    assert scan_guess(guess, scanned).counts["kept"] == 20


def test_media_paths_may_be_relative_to_a_folder_of_media(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {f"images/{i}.png": png(i) for i in range(8)})
    write_csv(tmp_path / "labels.csv", [{"filename": f"{i}.png", "label": i % 2} for i in range(8)])
    guess = look(tmp_path / "labels.csv")
    assert guess.scan["sources"][0]["root"] == "images"
    assert scan_guess(guess, scanned).counts["kept"] == 8


def test_tables_per_split(tmp_path: Path, scanned: Scan) -> None:
    for name, n in (("train", 20), ("test", 6)):
        write_csv(
            tmp_path / f"{name}.csv", [{"text": f"this is {name} text {i}", "label": "ab"[i % 2]} for i in range(n)]
        )
    made = scan_guess(look(tmp_path), scanned)
    assert made.counts["test"] == 6
    assert made.counts["val"] > 0


def test_numbers_of_rows_are_never_given_to_the_model(tmp_path: Path, scanned: Scan) -> None:
    for name, n in (("train", 150), ("test", 60)):
        rows = [
            {
                "": i,
                "id": i,
                "customer_id": 500 - i,
                "number": i // 2,
                "text": f"a {name} text {i}",
                "label": "ab"[i % 2],
            }
            for i in range(n)
        ]
        write_csv(tmp_path / f"{name}.csv", rows)
    guess = look(tmp_path)
    assert guess.modalities == ("text",)
    assert [source["map"] for source in guess.scan["sources"]] == [{}, {}]
    assert any(line.startswith("Not used:") and "`id`" in line and "`customer_id`" in line for line in guess.says)
    assert scan_guess(guess, scanned).counts["kept"] == 210
    alone = look(tmp_path / "train.csv")
    assert alone.scan["sources"][0]["map"] == {"id": "id"}


def test_questions_and_answers(tmp_path: Path, scanned: Scan) -> None:
    rows = [{"question": f"what is {i}?", "answer": f"it is the number {i}"} for i in range(12)]
    (tmp_path / "qa.json").write_text(json.dumps({"data": rows}))
    guess = look(tmp_path / "qa.json")
    assert guess.tasks == {"answer": []}
    made = scan_guess(guess, scanned)
    assert made.artifact.extra["tasks"][0]["has_text"]


def test_records_of_numbers(tmp_path: Path, scanned: Scan) -> None:
    rows = [
        {"patient": f"p{i // 2}", "age": 20 + i, "bmi": 20 + i / 7, "sex": "mf"[i % 2], "outcome": i // 3 % 2}
        for i in range(30)
    ]
    guess = look(write_csv(tmp_path / "t.csv", rows))
    source = guess.scan["sources"][0]
    assert guess.tasks == {"outcome": ["0", "1"]}
    assert source["map"]["group"] == "patient"
    assert set(source["map"]["fields"]) == {"age", "bmi", "sex"}
    assert scan_guess(guess, scanned).counts["kept"] == 30


def test_chat_messages(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {f"m/{i}.png": png(i) for i in range(6)})
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": f"m/{i}.png"},
                                                   {"type": "text", "text": "What?"}]},
                      {"role": "assistant", "content": f"answer {i}"}]}
        for i in range(6)
    ]  # fmt: skip
    guess = look(write_lines(tmp_path / "chat.jsonl", rows))
    assert (guess.form, guess.modalities, guess.tasks) == ("chat", ("image", "text"), {"answer": []})
    assert scan_guess(guess, scanned).counts["kept"] == 6


def test_nested_json(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {f"x/{i}.png": png(i) for i in range(10)})
    rows = [
        {"id": i, "image": f"x/{i}.png", "meta": {"age": i + 0.5}, "audio": [], "label": "ab"[i % 2]} for i in range(10)
    ]
    guess = look(write_lines(tmp_path / "t.jsonl", rows))
    assert guess.scan["sources"][0]["map"]["fields"] == {"meta_age": "meta.age"}
    assert scan_guess(guess, scanned).counts["kept"] == 10


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "empty folder"),
        ({"a.png": b"x"}, "no class folder"),
        ({"one/a.png": b"x"}, "single class folder"),
        ({"a/1.xyz": b"x", "b/2.xyz": b"x"}, "no class folder"),
        ({"a/1.png": b"x", "b/2.png": b"x"}, "none of the files"),
        ({"t.csv": b"a,b\n"}, "no rows"),
        ({"t.csv": b"x,y\n1.5,2.5\n2.5,3.5\n"}, "no column to be answered"),
        ({"a.csv": b"x,label\n1,2\n", "b.csv": b"x,label\n1,2\n"}, "2 tables"),
        ({"t.csv": b"image,label\n1.png,a\n2.png,b\n3.png,a\n4.png,b\n"}, "not below"),
        ({"t.csv": b"x,label\n" + b"".join(b"%d,%d\n" % (i, i) for i in range(30))}, "different numbers"),
    ],
)
def test_what_cannot_be_learnt_from_is_told(tmp_path: Path, files: dict[str, bytes], told: str) -> None:
    fill(tmp_path, files)
    with pytest.raises(DataError, match=told):
        look(tmp_path)


def test_other_things(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing at"):
        look(tmp_path / "nowhere")
    (tmp_path / "song.mid").write_bytes(b"x")
    with pytest.raises(DataError, match=r"ends in \.mid"):
        look(tmp_path / "song.mid")


def test_a_column_that_gives_the_label_away_is_left_out_and_odd_files_beside_the_table_too(tmp_path: Path) -> None:
    rows = [
        {"size": i / 3, "path": f"{'ab'[i % 2]}/{i % 4}", "colour": "rgb"[i % 3], "label": "ab"[i % 2]}
        for i in range(40)
    ]
    write_csv(tmp_path / "t.csv", rows)
    (tmp_path / "stats.json").write_text('{"rows": 40}')
    guess = look(tmp_path)
    assert guess.scan["sources"][0]["map"]["fields"] == {"size": "size", "colour": "colour"}
    assert any("give `label` away: path" in s for s in guess.says)


def test_media_paths_may_be_relative_to_the_folder_above(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {f"media/{i}.png": png(i) for i in range(8)})
    rows = [{"image": f"media/{i}.png", "label": "ab"[i % 2]} for i in range(8)]
    guess = look(write_lines(tmp_path / "corpus/manifest.jsonl", rows))
    assert guess.data == tmp_path
    assert scan_guess(guess, scanned).counts["kept"] == 8


def test_what_img2dataset_writes_beside_its_tars_is_no_table(tmp_path: Path, scanned: Scan) -> None:
    for shard in range(2):
        stem = f"{shard:05d}"
        with tarfile.open(tmp_path / f"{stem}.tar", "w") as tar:
            for i in range(8):
                for ending, data in (("jpg", png(shard * 8 + i)), ("txt", b"a picture"), ("json", b"{}")):
                    member = tarfile.TarInfo(f"{stem}{i:04d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        pq.write_table(pa.table({"url": ["a"] * 8, "caption": ["b"] * 8}), tmp_path / f"{stem}.parquet")
        (tmp_path / f"{stem}_stats.json").write_text('{"count": 8}')
    guess = look(tmp_path)
    assert (guess.form, guess.tasks, guess.counts["records"]) == ("webdataset", {"caption": []}, 16)
    assert scan_guess(guess, scanned).counts["kept"] == 16


def test_folders_that_name_the_split_of_a_table_with_its_media_beside_it(tmp_path: Path, scanned: Scan) -> None:
    for split, n in (("train", 12), ("test", 4)):
        fill(tmp_path / split, {f"{i:03d}.png": png(i + 20 * len(split)) for i in range(n)})
        rows = [{"file_name": f"{i:03d}.png", "text": f"{split} picture number {i}"} for i in range(n)]
        write_lines(tmp_path / split / "metadata.jsonl", rows)
    guess = look(tmp_path)
    assert [(s["split"], s["root"]) for s in guess.scan["sources"]] == [("test", "test"), ("train", "train")]
    made = scan_guess(guess, scanned)
    assert (made.counts["kept"], made.counts["test"]) == (16, 4)
    assert {p.uri.split("/")[0] for r in made.records.values() for p in r.parts if p.uri} == {"train", "test"}


def test_several_tables_in_the_folder_of_a_split_stay_several_tables(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/a"):
        write_csv(tmp_path / f"{name}.csv", [{"text": f"{name} {i}", "label": "ab"[i % 2]} for i in range(6)])
    with pytest.raises(DataError, match="3 tables"):
        look(tmp_path)


def test_columns_that_differ_in_case_only_are_the_same(tmp_path: Path, scanned: Scan) -> None:
    rows = [{"text": f"this is text {i}", "label": "ab"[i % 2], "age": i / 3} for i in range(20)]
    write_csv(tmp_path / "train.csv", rows)
    write_csv(
        tmp_path / "test.csv", [{"Age": r["age"], "Text ": f"test: {r['text']}", "LABEL": r["label"]} for r in rows]
    )
    guess = look(tmp_path)
    test = next(s for s in guess.scan["sources"] if s["split"] == "test")
    assert (test["ask"][0]["text"], test["ask"][0]["label"]) == ("Text", "LABEL")
    assert test["map"]["fields"] == {"age": "Age"}
    assert any("test.csv writes" in s and "`LABEL`" in s for s in guess.says)
    made = scan_guess(guess, scanned)
    assert (made.counts["kept"], made.counts["test"]) == (40, 20)


@pytest.mark.parametrize(
    ("first", "warned"),
    [
        ("3,Title 7,Some news about 5 things", True),
        ("3,Wall St. falls,Some news that is far too long to be the name of any column", True),
        ("label,title,text", False),
        ("0,1,2", False),
        ("label,2019,text", False),
    ],
)
def test_a_first_line_that_is_a_row_is_told(tmp_path: Path, first: str, warned: bool) -> None:
    rows = [f"{i % 4},Title {i},Some news about {i} things" for i in range(40)]
    (tmp_path / "t.csv").write_text("\n".join([first, *rows]))
    guess = look(tmp_path / "t.csv")
    assert any("looks like a row" in s and "wanted the names" in s for s in guess.says) == warned
    assert "looks like a row" not in guess.says[0]  # which the story is called after


def test_a_first_line_that_is_a_row_explains_why_nothing_can_be_asked(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("\n".join(f"A-{i}|Printing {i}|Printing number {i} in words" for i in range(20)))
    with pytest.raises(DataError, match=r"`A-0`, `Printing 0`.*put such a line above it"):
        look(tmp_path / "t.csv")
    write_csv(
        tmp_path / "joined.csv", [{"text": t, "label": n} for t, n in [("a", "x"), ("text", "label"), ("b", "y")] * 9]
    )
    assert not any("looks like a row" in s for s in look(tmp_path / "joined.csv").says)


def test_media_that_would_all_be_refused_are_told_with_a_cure(tmp_path: Path) -> None:
    fill(tmp_path, {f"out/{i}.png": png(i) for i in range(8)})
    write_csv(tmp_path / "in/t.csv", [{"image": f"../out/{i}.png", "label": "ab"[i % 2]} for i in range(8)])
    (said,) = [s for s in look(tmp_path / "in/t.csv").says if "cannot be read" in s]
    assert said.startswith("8 of 8 ") and "climbs out of the data folder" in said and "without `..`" in said
