"""Data as people have them: what `mmlm new` makes of them can be scanned."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mmlm import scaffold
from mmlm.config import parse
from mmlm.corpus import columns, guess_files
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.explain import explain_files
from mmlm.corpus.guess import Guess, look
from mmlm.corpus.readers.delimited import csv_encoding
from mmlm.corpus.scan import scan
from mmlm.errors import DataError
from mmlm.story import load
from tests.corpus.samples import Scan, png, wav, write_lines
from tests.corpus.test_folders import fill

REVIEWS = ("很好看", "不喜欢", "太差了，看不下去", "值得再看一遍")


def table(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8", separator: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as f:
        writer = csv.DictWriter(f, list(rows[0]), delimiter=separator)
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gbk", "gb18030"])
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
    russian = tmp_path / "russian.csv"
    russian.write_bytes("text,label\nочень хорошо,a\nплохо,b\n".encode("cp1251"))
    mixed = tmp_path / "mixed.csv"
    mixed.write_bytes("text,label\nBétise,a\n".encode() + "la forêt,b\n".encode("latin-1"))
    broken = tmp_path / "broken.csv"
    lines = ["text,label", *(f"{REVIEWS[i % 4]}{i},{'ab'[i % 2]}" for i in range(40))]
    broken.write_bytes("\n".join(lines).encode() + b"\n\xb2\xbb\xcf\xb2,a\n")
    assert csv_encoding(latin) == "cp1252"
    assert {csv_encoding(one) for one in (broken, russian, mixed)} == {"utf-8-sig"}
    source = {"kind": "table", "files": "broken.csv", "ask": [{"task": "t", "text": "text", "label": "label"}]}
    made = scanned(tmp_path, source)
    assert (made.counts["kept"], list(made.reasons.values())) == (40, ["bad_encoding"])


def test_a_western_table_of_a_spreadsheet(tmp_path: Path, scanned: Scan) -> None:
    rows = [{"Text": f"Grüße aus „Köln“ – {i} €", "Klasse": ["grün", "weiß"][i % 2]} for i in range(20)]
    guess = look(table(tmp_path / "liste.csv", rows, "cp1252"))
    assert any("read as Windows-1252" in s for s in guess.says) and guess.tasks == {"klasse": ["grün", "weiß"]}
    made = scanned(guess.data, *guess.scan["sources"])
    assert any(p.text == "Grüße aus „Köln“ – 3 €" for r in made.records.values() for p in r.parts)


def test_a_table_in_another_encoding_is_told_why(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("Текст;Класс\nочень хорошо;да\nплохо;нет\n".encode("cp1251"))
    with pytest.raises(DataError, match=r"list\.csv:2: not UTF-8; save it as UTF-8"):
        look(tmp_path)


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


def test_several_labels_are_classes_of_which_several_hold(tmp_path: Path, scanned: Scan) -> None:
    write_lines(tmp_path / "t.jsonl", [{"text": f"thing {i}", "tags": ["red", "big"][: i % 3]} for i in range(20)])
    made = scanned(
        tmp_path, {"kind": "table", "files": "t.jsonl", "ask": [{"task": "tags", "text": "text", "labels": "tags"}]}
    )
    (task,) = made.artifact.extra["tasks"]
    assert (task["labels"], task["has_text"], task["multiple"]) == (["big", "red"], False, True)


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
    assert sizes.error_budget == scaffold.ERROR_BUDGET
    sizes = sizes_of(tmp_path, [{**r, "text": r["text"] * 500} for r in rows])
    assert sizes.max_len == 2 * scaffold.MAX_LEN and "a run stops" in sizes.says[0]
    sizes = sizes_of(tmp_path, [{**r, "text": r["text"] * (500 if i % 4 == 0 else 1)} for i, r in enumerate(rows)])
    assert 0.3 <= sizes.error_budget <= 0.4 and "error_budget" in sizes.says[0]


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


def test_a_table_sorted_by_class_is_seen_whole(tmp_path: Path) -> None:
    rows = [{"text": f"number {i}", "label": "abcdefgh"[i // 1000]} for i in range(8000)]
    guess = look(table(tmp_path / "t.csv", rows))
    assert guess.tasks == {"label": list("abcdefgh")}
    assert guess.counts["records"] == 8000


def test_large_rows_are_held_in_small_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[str, Any]] = [(f"t:{i}", {"number": i, "text": "x" * 1000}) for i in range(3000)]
    monkeypatch.setattr(columns, "MOST_HELD", 100_000)
    drawn, total = columns.drawn_rows(rows)
    numbers = [r["number"] for r in drawn]
    assert (total, numbers) == (3000, sorted(numbers))
    assert columns.LEAST <= len(drawn) <= 100
    assert 1000 < sum(numbers) / len(numbers) < 2000  # from all of the table


def test_columns_made_from_the_label_are_not_given(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {f"{i}.png": png(i) for i in range(40)})
    rows = [
        {"image": f"{i}.png", "species": (kind := ("owl", "crow", "cat", "dog")[i * 7 % 4]), "number": i * 7 % 4,
         "description": f"a {kind}", "family": "bird" if kind in ("owl", "crow") else "mammal", "weight": i / 7,
         "labels": {"note": "xy"[i % 3 == 0]}}
        for i in range(40)
    ]  # fmt: skip
    guess = look(write_lines(tmp_path / "t.jsonl", rows))
    assert guess.tasks == {"species": ["cat", "crow", "dog", "owl"]}
    assert guess.scan["sources"][0]["map"] == {"image": "image", "fields": {"weight": "weight"}}
    assert "context" not in ask_of(guess)
    assert any(s.startswith("Other answers") and "labels.note" in s for s in guess.says)
    assert scanned(guess.data, *guess.scan["sources"]).counts["kept"] == 40


def test_a_number_that_decides_is_kept_where_it_is_all_there_is(tmp_path: Path) -> None:
    guess = look(
        table(tmp_path / "t.csv", [{"level": i % 3, "label": ["low", "mid", "high"][i % 3]} for i in range(60)])
    )
    assert guess.scan["sources"][0]["map"]["fields"] == {"level": "level"}


def test_one_text_a_row_in_many_languages(tmp_path: Path, scanned: Scan) -> None:
    langs = ("en", "zh", "fr", "sw")
    rows = [
        {"id": i, "texts": {langs[i % 4]: f"{'好' * (i % 5)} text {i}"}, "topic": "ab"[i // 7 % 2]} for i in range(80)
    ]
    guess = look(write_lines(tmp_path / "t.jsonl", rows))
    assert ask_of(guess) == {"task": "topic", "each": "texts", "lang": "{key}", "text": "value", "label": "topic"}
    assert guess.sizes["text_bytes"]["max"] > 7
    made = scanned(guess.data, *guess.scan["sources"])
    assert (made.counts["found"], made.counts["kept"]) == (80, 80)
    assert made.counts["langs"] == dict.fromkeys(sorted(langs), 20)


def test_of_several_languages_a_common_one(tmp_path: Path) -> None:
    fill(tmp_path, {f"{i}.png": png(i) for i in range(20)})
    rows = [
        {"image": f"{i}.png", "label": "ab"[i % 2],
         "texts": {"de": f"ein viel längerer Text, der {i} heißt", "en": f"text {i}", "fr": f"texte {i}"}}
        for i in range(20)
    ]  # fmt: skip
    assert ask_of(look(write_lines(tmp_path / "t.jsonl", rows)))["context"] == "texts.en"


def test_too_many_classes_are_written_out(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {f"{i}.wav": wav(i) for i in range(260)})
    rows = [{"path": f"{i}.wav", "label": f"字{i}", "kind": "ab"[i % 2]} for i in range(260)]
    guess = look(table(tmp_path / "t.csv", rows))
    assert (guess.tasks, ask_of(guess)["answer"]) == ({"label": []}, "label")
    made = scanned(guess.data, *guess.scan["sources"])
    assert made.counts["kept"] == 260 and made.artifact.extra["tasks"][0]["has_text"]


def test_a_label_that_few_rows_have_is_not_asked(tmp_path: Path, scanned: Scan) -> None:
    rows = [{"text": f"tune {i}", "label": "ab"[i % 2] if i % 5 == 0 else "", "metre": "xyz"[i % 3]} for i in range(60)]
    guess = look(table(tmp_path / "t.csv", rows))
    assert guess.tasks == {"metre": ["x", "y", "z"]}
    assert "fields" not in guess.scan["sources"][0]["map"]
    assert any("only 20 % of the rows" in s for s in guess.says)
    assert scanned(guess.data, *guess.scan["sources"]).counts["kept"] == 60


def test_captions_beside_pictures(tmp_path: Path, scanned: Scan) -> None:
    fill(
        tmp_path,
        {f"a/{i}.png": png(i, 32) for i in range(12)} | {f"a/{i}.txt": f"一只猫 {i}".encode() for i in range(11)},
    )
    fill(tmp_path, {f"b/{i}.png": png(i + 50, 32) for i in range(4)} | {f"b/{i}.txt": b"a dog" for i in range(4)})
    guess = look(tmp_path)
    assert (guess.form, guess.tasks, guess.modalities) == ("sidecar", {"caption": []}, ("image", "text"))
    assert guess.sizes["image_side"]["median"] == 32
    made = scanned(guess.data, *guess.scan["sources"])
    assert (made.counts["kept"], made.counts["refused_reasons"]) == (15, {"no_partner": 1})


def test_webdataset_tars(tmp_path: Path, scanned: Scan) -> None:
    for split, n in (("train", 12), ("test", 4)):
        with tarfile.open(tmp_path / f"cats-{split}-000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(n):
                for ending, data in (("png", png(i + n, 24)), ("cls", b"%d" % (i % 2))):
                    member = tarfile.TarInfo(f"{i:03d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    guess = look(tmp_path)
    assert (guess.form, guess.tasks) == ("webdataset", {"category": ["0", "1"]})
    assert guess.sizes["image_side"]["median"] == 24
    made = scanned(guess.data, *guess.scan["sources"])
    assert (made.counts["kept"], made.counts["test"]) == (16, 4)
    alone = look(tmp_path / "cats-train-000.tar")
    assert (alone.counts["records"], alone.scan["sources"][0]["files"]) == (12, "cats-train-000.tar")


def test_a_hugging_face_data_set(tmp_path: Path, scanned: Scan) -> None:
    import pyarrow as pa

    classes = {"names": ["猫", "狗"], "_type": "ClassLabel"}
    told = {"features": {"text": {"dtype": "string", "_type": "Value"}, "label": classes}}
    for split, n in (("train", 20), ("test", 6)):
        folder = tmp_path / split
        folder.mkdir()
        batch = pa.table({"text": [f"{split} {i}" for i in range(n)], "label": [i % 2 for i in range(n)]})
        with (
            pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as f,
            pa.ipc.new_stream(f, batch.schema) as writer,
        ):
            writer.write_table(batch)
        (folder / "dataset_info.json").write_text(json.dumps(told))
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    guess = look(tmp_path)
    assert (guess.form, guess.tasks) == ("hf", {"label": ["狗", "猫"]})
    made = scanned(guess.data, *guess.scan["sources"])
    assert (made.counts["kept"], made.counts["test"]) == (26, 6)
    (source,) = explain_files(tmp_path)["sources"]
    assert [(c["column"], c["keys"], c["how"]) for c in source["columns"]] == [
        ("text", ["ask[0].text"], "inferred"),
        ("label", ["ask[0].label"], "inferred"),
    ]


def test_a_folder_of_documents(tmp_path: Path, scanned: Scan) -> None:
    page = (
        "<html><title>T</title><body><p>第一句话在这里。第二句话也在这里。</p><p>The third is long.</p></body></html>"
    )
    text = "The first sentence is short. The second one follows it. And a third one ends it.\n\n"
    fill(
        tmp_path, {f"notes/{i}.md": f"# Note {i}\n\n{text * 3}".encode() for i in range(6)} | {"p.html": page.encode()}
    )
    guess = look(tmp_path)
    assert (guess.form, guess.tasks) == ("documents", {"text": []})
    made = scanned(guess.data, *guess.scan["sources"])
    assert made.counts["kept"] == guess.counts["records"] >= 7
    assert look(tmp_path / "notes/1.md").scan["sources"] == [{"kind": "documents", "files": "1.md"}]


def test_sounds_with_their_words_are_transcribed(tmp_path: Path, scanned: Scan) -> None:
    fill(tmp_path, {f"{i}.wav": wav(i) for i in range(30)})
    rows = [{"file": f"{i}.wav", "transcript": "" if i == 7 else f"请按 {i} 号键"} for i in range(30)]
    guess = look(table(tmp_path / "t.csv", rows))
    assert (guess.tasks, ask_of(guess)["answer"]) == ({"transcript": []}, "transcript")
    assert any("3.3 % of the rows have no `transcript`" in s for s in guess.says)
    assert scanned(guess.data, *guess.scan["sources"]).counts["refused_reasons"] == {"no_target": 1}


def test_the_only_label_that_few_rows_have_is_refused_with_a_cure(tmp_path: Path) -> None:
    rows = [{"text": f"tune {i}", "label": "ab"[i % 2] if i % 5 == 0 else ""} for i in range(60)]
    with pytest.raises(DataError, match=r"`label` is empty in 80 % of the rows.*error_budget: 0.81"):
        look(table(tmp_path / "t.csv", rows))


def test_of_many_documents_some_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "第一句在这里。第二句也在这里。 And a third one ends it, which is long enough."
    fill(tmp_path, {f"{i}.txt": f"{text} {i}".encode() for i in range(30)} | {"[x].txt": b"x"})
    monkeypatch.setattr(guess_files, "LOOKED_AT", 10)
    guess = look(tmp_path)
    assert guess.scan["sources"] == [{"kind": "documents"}]
    assert guess.counts["records"] == 31 and "About 31 records." in guess.says
