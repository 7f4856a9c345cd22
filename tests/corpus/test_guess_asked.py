"""What is asked of the rows of somebody's table, and what `new` says about that choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmlm.corpus.guess import look
from mmlm.errors import DataError
from tests.corpus.samples import Scan, wav, write_lines
from tests.corpus.test_folders import fill
from tests.corpus.test_newcomers import ask_of, table


def test_the_input_of_an_instruction_becomes_context(tmp_path: Path, scanned: Scan) -> None:
    rows = [
        {"input": "" if i % 2 else f"bonjour {i}", "instruction": f"Translate sentence {i}", "output": f"hello {i}"}
        for i in range(20)
    ]
    guess = look(write_lines(tmp_path / "alpaca.jsonl", rows))
    assert ask_of(guess) == {"task": "answer", "text": "instruction", "context": "input", "answer": "output"}
    assert "context" in guess.modalities
    made = scanned(guess.data, *guess.scan["sources"])
    parts = [{p.role: p.text for p in r.parts} for r in made.records.values()]
    assert (made.counts["kept"], sum("context" in p for p in parts)) == (20, 10)


def test_an_input_without_an_instruction_is_the_question(tmp_path: Path) -> None:
    rows = [{"input": f"say {i}", "output": f"it is {i}"} for i in range(20)]
    assert ask_of(look(write_lines(tmp_path / "t.jsonl", rows))) == {
        "task": "answer",
        "text": "input",
        "answer": "output",
    }


def squad(i: int, answers: Any) -> dict[str, Any]:
    return {
        "id": f"q{i}",
        "title": "T",
        "context": f"It has {i} gates.",
        "question": f"How many {i}?",
        "answers": answers,
    }


@pytest.mark.parametrize(
    ("first", "of"),
    [
        ("answers.text[0]", lambda one: {"text": [one, "more"], "answer_start": [7, 9]}),
        ("answers[0].text", lambda one: [{"text": one, "answer_start": 7}]),
        ("answers[0]", lambda one: [one, "more"]),
    ],
)
def test_of_several_right_answers_the_first_is_written(tmp_path: Path, scanned: Scan, first: str, of: Any) -> None:
    rows = [squad(i, of(f"{i} gates")) for i in range(20)]
    guess = look(write_lines(tmp_path / "squad.jsonl", rows))
    assert ask_of(guess) == {"task": "answer", "text": "question", "context": "context", "answer": first}
    made = scanned(guess.data, *guess.scan["sources"])
    assert {r.target.text for r in made.records.values()} == {f"{i} gates" for i in range(20)}


def test_questions_of_which_many_have_no_answer_are_refused_with_a_cure(tmp_path: Path) -> None:
    rows = [squad(i, {"text": [f"{i} gates"] if i % 2 else [], "answer_start": []}) for i in range(20)]
    with pytest.raises(DataError, match=r"`answers.text\[0\]` is empty in 50 % .*error_budget: 0.51"):
        look(write_lines(tmp_path / "squad.jsonl", rows))


@pytest.mark.parametrize("speakers", [6, 15])
def test_what_is_said_in_sounds_is_asked_rather_than_the_speaker_or_the_votes(
    tmp_path: Path, scanned: Scan, speakers: int
) -> None:
    fill(tmp_path, {f"clips/{i}.wav": wav(i) for i in range(30)})
    rows = [
        {"client_id": f"c{i % speakers}", "path": f"{i}.wav", "sentence": f"Sentence {i} is read.", "up_votes": i % 3,
         "down_votes": i % 2, "gender": ("male", "female")[i % 2], "locale": "en"}
        for i in range(30)
    ]  # fmt: skip
    guess = look(table(tmp_path / "validated.tsv", rows, separator="\t"))
    assert (guess.tasks, ask_of(guess)["answer"]) == ({"transcript": []}, "sentence")
    assert "fields" not in guess.scan["sources"][0]["map"]
    assert scanned(guess.data, *guess.scan["sources"]).counts["kept"] == 30


def test_a_label_of_sounds_is_still_asked_before_their_words(tmp_path: Path) -> None:
    fill(tmp_path, {f"{i}.wav": wav(i) for i in range(20)})
    rows = [{"file": f"{i}.wav", "transcript": f"press {i} now", "intent": "ab"[i % 2]} for i in range(20)]
    assert look(table(tmp_path / "t.csv", rows)).tasks == {"intent": ["a", "b"]}


@pytest.mark.parametrize(
    "name", ["client_id", "speaker", "shop_id", "userId", "up_votes", "zip", "postcode", "year", "url", "fold"]
)
def test_what_is_never_a_label(tmp_path: Path, name: str) -> None:
    rows = [{"mood": "ab"[i % 2], "text": f"a text of its own, number {i}", name: f"k{i % 3}"} for i in range(40)]
    guess = look(table(tmp_path / "t.csv", rows))
    assert guess.tasks == {"mood": ["a", "b"]}
    with pytest.raises(DataError, match="no column to be answered"):
        look(table(tmp_path / "alone.csv", [{k: v for k, v in r.items() if k != "mood"} for r in rows]))


def test_a_choice_by_place_alone_is_told_with_the_others(tmp_path: Path) -> None:
    rows = [{"text": f"a text of its own, number {i}", "mood": "ab"[i % 2], "place": "xyz"[i % 3]} for i in range(40)]
    guess = look(table(tmp_path / "t.csv", rows))
    assert guess.tasks == {"place": ["x", "y", "z"]}
    (said,) = [s for s in guess.says if "for its place only" in s]
    assert said.startswith("`place` ") and "`mood` could be asked as well" in said
    named = look(table(tmp_path / "n.csv", [{**r, "label": "pq"[i // 2 % 2]} for i, r in enumerate(rows)]))
    assert not any("for its place only" in s for s in named.says)


@pytest.mark.parametrize("name", ["Survived", "toxic", "churn", "gold_label"])
def test_a_name_of_what_is_usually_predicted_wins_over_the_place(tmp_path: Path, name: str) -> None:
    rows = [{"Id": i, name: i // 3 % 2, "Sex": "mf"[i % 2], "Fare": i / 7} for i in range(60)]
    assert look(table(tmp_path / "t.csv", rows)).tasks == {name.lower(): ["0", "1"]}


def test_a_price_that_stands_last_is_a_number_to_be_predicted(tmp_path: Path, scanned: Scan) -> None:
    rows = [
        {"sqft": 900 + 7 * i, "view": "ab"[i % 2], "description": f"A nice home, number {i}", "price": 100_000 + 37 * i}
        for i in range(40)
    ]
    guess = look(table(tmp_path / "t.csv", rows))
    assert (guess.tasks, ask_of(guess)) == (
        {"price": []},
        {"task": "price", "text": "description", "number": "price"},
    )
    made = scanned(guess.data, *guess.scan["sources"])
    assert {r.target.number for r in made.records.values()} == {r["price"] for r in rows}


def test_a_last_column_with_fractions_is_predicted_where_nothing_else_can_be_asked(tmp_path: Path) -> None:
    rows = [{"depth": i, "speed": i / 7, "strength": i / 3} for i in range(40)]
    guess = look(table(tmp_path / "t.csv", rows))
    assert (ask_of(guess)["number"], guess.tasks) == ("strength", {"strength": []})
    assert guess.scan["sources"][0]["map"]["fields"] == {"depth": "depth", "speed": "speed"}
    mooded = look(table(tmp_path / "m.csv", [{"mood": "ab"[i % 2], **r} for i, r in enumerate(rows)]))
    assert mooded.tasks == {"mood": ["a", "b"]}


def test_a_target_of_many_numbers_is_a_quantity_and_a_label_of_many_whole_ones_is_not(tmp_path: Path) -> None:
    rows = [{"text": f"passage number {i}", "target": i / 8} for i in range(40)]
    assert ask_of(look(table(tmp_path / "t.csv", rows))) == {"task": "target", "text": "text", "number": "target"}
    rows = [{"text": f"passage number {i}", "label": i} for i in range(40)]
    with pytest.raises(DataError, match=r"`label` holds 40 different numbers.*call the column `target`"):
        look(table(tmp_path / "l.csv", rows))


@pytest.mark.parametrize("name", ["labels", "tags", "genres", "categories"])
def test_lists_of_labels(tmp_path: Path, scanned: Scan, name: str) -> None:
    rows = [
        {"text": f"abstract number {i}", name: ["bio", "math", "cs"][: i % 4], "year": 2000 + i % 5} for i in range(40)
    ]
    guess = look(write_lines(tmp_path / "t.jsonl", rows))
    assert (guess.tasks, ask_of(guess)["labels"]) == ({name: ["bio", "cs", "math"]}, name)
    made = scanned(guess.data, *guess.scan["sources"])
    assert {r.target.labels for r in made.records.values()} == {(), ("bio",), ("bio", "math"), ("bio", "cs", "math")}


@pytest.mark.parametrize("pair", [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence")])
def test_of_two_texts_the_second_is_context_even_where_it_repeats(tmp_path: Path, pair: tuple[str, str]) -> None:
    rows = [
        {pair[0]: f"A man walks dog number {i} in town.", pair[1]: f"Somebody {i % 5} is outside.", "same": i // 5 % 2}
        for i in range(40)
    ]
    guess = look(table(tmp_path / "t.csv", rows))
    assert ask_of(guess) == {"task": "same", "text": pair[0], "context": pair[1], "label": "same"}
    assert guess.scan["sources"][0]["map"] == {}


@pytest.mark.parametrize("name", ["key", "author", "time"])
def test_names_that_may_be_a_label_after_all(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"a text of its own, number {i}", name: f"k{i % 3}"} for i in range(40)]
    assert look(table(tmp_path / "t.csv", rows)).tasks == {name: ["k0", "k1", "k2"]}


def test_a_word_far_down_a_column_of_numbers_is_refused_when_scanning(tmp_path: Path, scanned: Scan) -> None:
    rows = [{"text": f"passage number {i}", "target": "n/a" if i == 700 else i / 8} for i in range(800)]
    guess = look(table(tmp_path / "t.csv", rows))
    assert ask_of(guess)["number"] == "target" and any("from 0 to 99.875" in s for s in guess.says)
    assert scanned(guess.data, *guess.scan["sources"]).counts["refused_reasons"] == {"bad_value": 1}
