"""Data as people have them: what `mmlm new` makes of them can be scanned."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest

from mmlm import scaffold
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.guess import Guess, look
from mmlm.corpus.readers.rows import csv_encoding
from mmlm.corpus.scan import scan
from mmlm.errors import DataError
from mmlm.story import load
from tests.corpus.samples import Scan, png, write_lines
from tests.corpus.test_folders import fill

REVIEWS = ("很好看", "不喜欢", "太差了，看不下去", "值得再看一遍")


def table(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def ask_of(guess: Guess) -> dict[str, Any]:
    return guess.scan["sources"][0]["ask"][0]


def test_a_path_with_dots_is_no_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "pictures", {f"{c}/{i}.png": png(i, 40) for c in "ab" for i in range(4)})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert look(Path("../pictures")).sizes["image_side"]["median"] == 40


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030"])
def test_short_chinese_reviews_in_any_encoding(tmp_path: Path, scanned: Scan, encoding: str) -> None:
    rows = [{"评论": f"{REVIEWS[i % 4]}{i}", "情感": "负正"[i % 2]} for i in range(40)]
    guess = look(table(tmp_path / "t.csv", rows, encoding))
    assert (ask_of(guess)["text"], guess.tasks) == ("评论", {"情感": ["正", "负"]})
    assert any("GB18030" in s for s in guess.says) == encoding.startswith("gb")
    made = scanned(guess.data, *guess.scan["sources"])
    assert made.counts["kept"] == 40
    assert any(p.text == "很好看0" for r in made.records.values() for p in r.parts)


def test_what_is_not_chinese_is_not_read_as_such(tmp_path: Path, scanned: Scan) -> None:
    latin = tmp_path / "latin.csv"
    latin.write_bytes("text,label\nBétise et naïveté,a\nla forêt,b\n".encode("latin-1"))
    broken = tmp_path / "broken.csv"
    lines = ["text,label", *(f"{REVIEWS[i % 4]}{i},{'ab'[i % 2]}" for i in range(40))]
    broken.write_bytes("\n".join(lines).encode() + b"\n\xb2\xbb\xcf\xb2,a\n")
    assert csv_encoding(latin) == csv_encoding(broken) == "utf-8-sig"
    source = {"kind": "table", "files": "broken.csv", "ask": [{"task": "t", "text": "text", "label": "label"}]}
    made = scanned(tmp_path, source)
    assert (made.counts["kept"], list(made.reasons.values())) == (40, ["bad_encoding"])


def test_texts_that_repeat_and_have_no_telling_name(tmp_path: Path, scanned: Scan) -> None:
    rows = [{"said": ("转账", "余额", "开户", "挂失")[i % 4], "intent": "abcd"[i % 4]} for i in range(40)]
    guess = look(table(tmp_path / "t.csv", rows))
    assert ask_of(guess)["text"] == "said"
    assert scanned(guess.data, *guess.scan["sources"]).counts["kept"] == 40


def test_a_label_alone_cannot_be_learnt(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column to learn `label` from"):
        look(table(tmp_path / "t.csv", [{"label": "ab"[i % 2]} for i in range(20)]))


def test_the_index_of_pandas_and_odd_names_are_left_out(tmp_path: Path, scanned: Scan) -> None:
    rows = [{"": i, "No.": i, "a{b": i, "text": f"number {i}", "label": "ab"[i % 2]} for i in range(20)]
    guess = look(table(tmp_path / "t.csv", rows))
    assert guess.scan["sources"][0]["map"] == {}
    assert "Not used: `column_1`, `No.`, `a{b`." in guess.says
    assert scanned(guess.data, *guess.scan["sources"]).counts["kept"] == 20


def test_a_table_without_answers_is_left_out(tmp_path: Path, scanned: Scan) -> None:
    rows = [{"PassengerId": i, "Age": i / 3, "Sex": "mf"[i % 2], "Survived": i // 3 % 2} for i in range(60)]
    table(tmp_path / "train.csv", rows[:40])
    table(tmp_path / "test.csv", [{k: v for k, v in r.items() if k != "Survived"} for r in rows[40:]])
    table(tmp_path / "gender_submission.csv", [{k: r[k] for k in ("PassengerId", "Survived")} for r in rows[40:]])
    guess = look(tmp_path)
    assert guess.tasks == {"survived": ["0", "1"]}
    assert guess.counts["records"] == 40
    assert any("test.csv" in s and s.startswith("Left out") for s in guess.says)
    assert guess.scan["sources"][0]["map"] == {"id": "PassengerId", "fields": {"age": "Age", "sex": "Sex"}}
    made = scanned(guess.data, *guess.scan["sources"])
    assert made.counts["kept"] == 40 and made.counts["test"] > 0


def test_an_empty_column_of_labels_is_none(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", [{"text": f"number {i}", "label": "ab"[i % 2]} for i in range(20)])
    table(tmp_path / "test.csv", [{"text": f"number {i}", "label": ""} for i in range(20)])
    assert look(tmp_path).scan["sources"][0]["files"] == "train.csv"


def test_several_labels_are_answered_as_text(tmp_path: Path, scanned: Scan) -> None:
    write_lines(tmp_path / "t.jsonl", [{"text": f"thing {i}", "tags": ["red", "big"][: i % 3]} for i in range(20)])
    made = scanned(
        tmp_path, {"kind": "table", "files": "t.jsonl", "ask": [{"task": "tags", "text": "text", "labels": "tags"}]}
    )
    (task,) = made.artifact.extra["tasks"]
    assert (task["labels"], task["has_text"]) == ([], True)


def test_what_is_made_may_not_lie_among_the_class_folders(tmp_path: Path) -> None:
    fill(tmp_path, {f"{c}/{i}.png": png(i) for c in "ab" for i in range(4)})
    config = parse(ScanConfig, {"sources": [{"kind": "folders"}]}, "test")
    with pytest.raises(DataError, match=r"lies inside the data folder .*give --out elsewhere"):
        scan(config, data=tmp_path, out=tmp_path / "runs/s/manifest")


def test_a_class_folder_that_is_not_utf8(tmp_path: Path) -> None:
    for name in ("狗".encode("gbk"), b"cat"):
        os.mkdir(os.fsencode(tmp_path) + b"/" + name)
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)) / "1.png").write_bytes(png(1))
    with pytest.raises(DataError, match="not named in UTF-8"):
        look(tmp_path)


def sizes_of(folder: Path, rows: list[dict[str, Any]]) -> scaffold.Sizes:
    return scaffold.choose(look(table(folder / "t.csv", rows)))


def test_max_len_has_room_for_the_longest_record_up_to_a_cap(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"{REVIEWS[i % 4]}{i}", "label": "ab"[i % 2]} for i in range(40)]
    assert sizes_of(tmp_path, rows).max_len == 96
    rows[3]["text"] = "看" * 200  # 600 bytes
    sizes = sizes_of(tmp_path, rows)
    assert 1.6 * 200 < sizes.max_len < 700 and sizes.typical < 100 and not sizes.says
    rows[3]["text"] = "看" * 2000
    sizes = sizes_of(tmp_path, rows)
    assert sizes.max_len == scaffold.MAX_LEN and "set aside" in sizes.says[0]
    sizes = sizes_of(tmp_path, [{**r, "text": r["text"] * 500} for r in rows])
    assert sizes.max_len == 2 * scaffold.MAX_LEN and "a run stops" in sizes.says[0]


def test_max_len_counts_answers_and_fields(tmp_path: Path) -> None:
    rows = [{"question": f"what is {i}?", "answer": "it is " + "so " * 60 + str(i)} for i in range(20)]
    assert sizes_of(tmp_path, rows).max_len >= 220
    wide = [{**{f"x{k}": i + k / 7 for k in range(150)}, "label": "ab"[i % 2]} for i in range(20)]
    assert sizes_of(tmp_path, wide).max_len >= 150 + 20


def test_names_that_mlflow_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = table(tmp_path / "t.csv", [{"text": f"number {i}", "label": "ab\a"[i % 3] + "!"} for i in range(30)])
    scaffold.write_story(tmp_path / "one", data, "my story: 50% @home/猫?")
    assert load(str(tmp_path / "one")).name == "my-story-50-home-猫"
    (tmp_path / "我的 故事").mkdir()
    monkeypatch.chdir(tmp_path / "我的 故事")
    told = scaffold.write_story(Path("."), data)
    assert load(str(tmp_path / "我的 故事")).name == "我的-故事"
    assert all(line.isprintable() for line in told)
