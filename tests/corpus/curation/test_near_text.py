"""Near-duplicate texts: the fast way against the plain one, whatever the order and the number of workers."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmlm.corpus.curation import columns, minhash
from mmlm.corpus.curation.minhash import candidate_pairs, signatures
from mmlm.corpus.curation.shingles import shingles
from mmlm.corpus.records import Part, Record, to_row
from tests.corpus.curation.curated import altered, drops, losers_by_brute_force, orders, row, sentences, shingle_set


def corpus(seed: int) -> list[dict[str, Any]]:
    """English and Chinese texts, exact copies, chains of small changes, loose relatives, all splits."""
    rng = random.Random(seed)
    texts = sentences(seed, 60, 80) + sentences(seed, 40, 90, chinese=True) + sentences(seed + 1, 20, 4)
    for text in texts[:20] + texts[60:80]:
        close = altered(text, rng, 1)  # similarity around 0.88
        texts += [close, altered(close, rng, 1)]  # a chain: the third is near to the second only
    texts += [altered(t, rng, 8) for t in texts[20:40]]  # similarity around 0.35: relatives, no duplicates
    texts += texts[40:50] + [t.upper() + "!!" for t in texts[50:55]] + texts[100:105]
    rng.shuffle(texts)
    splits = rng.choices(["train", "val", "test"], [8, 1, 1], k=len(texts))
    return [row(f"r{k:04d}", t, split=s) for k, (t, s) in enumerate(zip(texts, splits, strict=True))]


def jaccard(a: str, b: str, n: int = 5) -> float:
    one, other = shingle_set(a, n), shingle_set(b, n)
    return len(one & other) / len(one | other) if one | other else 0.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_drops_are_those_of_the_brute_force(seed: int, tmp_path: Path) -> None:
    rows = corpus(seed)
    expected = losers_by_brute_force(rows, lambda a, b: jaccard(a["parts"][0]["text"], b["parts"][0]["text"]) >= 0.8)
    assert 40 < len(expected) < 120
    for order in orders(rows):
        found = drops(order, tmp_path, near_text={})
        assert set(found.events) == expected
    assert {e.reason for e in found.events.values()} == {
        "near_duplicate", "near_duplicate_of_test", "near_duplicate_of_val",
    }  # fmt: skip


def test_the_number_of_workers_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "ALONE", 1)
    monkeypatch.setattr("mmlm.corpus.curation.near_text.PIECE", 4_000)
    rows = corpus(3)
    steps: dict[str, Any] = {"exact": {}, "near_text": {}, "contamination": {"ngram": 8}}
    alone = drops(rows, tmp_path, **steps)
    assert alone == drops(rows, tmp_path, workers=2, **steps)
    assert len(alone.events) > 40


def test_a_held_out_record_is_never_dropped_for_a_training_record(tmp_path: Path) -> None:
    text = sentences(0, 1, 60)[0]
    rows = [row("a", text), row("b", text + " indeed", split="val"), row("c", text + " yes", split="test")]
    found = drops(rows, tmp_path, near_text={})
    assert {i: e.reason for i, e in found.events.items()} == {
        "a": "near_duplicate_of_test", "b": "near_duplicate_of_test",
    }  # fmt: skip
    assert found.events["a"].detail == "like c"
    assert found.figures["near_text"][""] == {"kept": 1, "dropped": 2, "changed": 0}


def test_other_tasks_media_and_questions_of_one_group_are_no_duplicates(tmp_path: Path) -> None:
    text = sentences(0, 1, 60)[0]
    rows = [
        row("a", text), row("b", text, task="other"), row("c", text, pictures=["x.png"]),
        row("d", text, pictures=["y.png"]), row("e", text + " who", group="one"), row("f", text + " why", group="one"),
    ]  # fmt: skip
    assert set(drops(rows, tmp_path, near_text={}).events) == {"e", "f"}
    assert set(drops(rows[1:], tmp_path, near_text={}).events) == set()


def test_a_medium_is_known_by_its_bytes_wherever_it_lies(tmp_path: Path) -> None:
    """The hash that the scan stored tells, and the seconds that are meant; inline bytes are the same medium too."""
    text = sentences(0, 1, 60)[0]

    def beside(id: str, medium: Part) -> dict[str, Any]:
        return to_row(Record(id, (medium, Part("text", text=f"{text} {id}")), split="train", group=id))

    same = hashlib.sha256(b"sound").hexdigest()
    rows = [
        beside("a", Part("audio", uri="here/1.wav", sha256=same)),
        beside("b", Part("audio", uri="there/2.wav", sha256=same)),
        beside("c", Part("audio", uri="here/1.wav#t=0,5", sha256=same)),
        beside("d", Part("audio", uri="there/2.wav#t=0,5", sha256=same)),
        beside("e", Part("audio", data=b"sound")),
        beside("f", Part("audio", uri="here/1.wav", sha256="0" * 64)),
        beside("g", Part("audio", uri="here/1.wav")),
        beside("h", Part("image", uri="here/1.wav", sha256=same)),
    ]
    found = drops(rows, tmp_path, near_text={})
    assert {i: e.detail for i, e in found.events.items()} == {"b": "like a", "d": "like c", "e": "like a"}


def test_chinese_texts_are_compared_by_characters(tmp_path: Path) -> None:
    base = "图书馆在学校的东边，每天早上八点开门，晚上十点关门，周末也对学生开放，欢迎大家来看书学习。"
    rows = [row("a", base), row("b", base.replace("八点", "九点")), row("c", "今天的天气真好，我们一起去公园散步吧。")]
    assert set(drops(rows, tmp_path, near_text={"threshold": 0.6}).events) == {"b"}
    assert set(drops(rows, tmp_path, near_text={"threshold": 0.9}).events) == set()


def test_case_accents_width_and_punctuation_do_not_matter() -> None:
    same = ["Der Fluß, café au lait: 12 dogs!", "der fluß cafe\u0301 AU lait １２ ｄｏｇｓ"]
    found = shingles([*same, "", "!?…", "one", "a bc d e f", "ab c d e f"], 5)
    runs = [found.hashes[a:b].tolist() for a, b in zip(found.starts[:-1], found.starts[1:], strict=True)]
    assert runs[0] == runs[1] and len(runs[0]) == 3
    assert runs[2] == runs[3] == []
    assert len(runs[4]) == 1
    assert runs[5] != runs[6]
    assert found.words.tolist() == [7, 7, 0, 0, 1, 5, 5]


def test_runs_are_equal_exactly_where_the_words_are() -> None:
    texts = (
        sentences(0, 20, 30) + sentences(1, 20, 30, chinese=True) + ["a b a b a b a b", "你好 hello 你好 world", "x"]
    )
    texts += [t[: len(t) // 2] for t in texts]
    found = shingles(texts, 3)
    numbers: dict[int, tuple[str, ...]] = {}
    for k, text in enumerate(texts):
        mine = set(found.hashes[found.starts[k] : found.starts[k + 1]].tolist())
        expected = shingle_set(text, 3)
        assert len(mine) == len(expected)
        numbers |= dict.fromkeys(mine, ())
    assert len(numbers) == len(set().union(*(shingle_set(t, 3) for t in texts)))


def test_signatures_estimate_the_similarity() -> None:
    rng = random.Random(0)
    texts = sentences(7, 150, 120)
    others = [altered(t, rng, k % 12) for k, t in enumerate(texts)]
    first, second = signatures(texts), signatures(others)
    estimate = (first == second).mean(axis=1)
    truth = np.array([jaccard(a, b) for a, b in zip(texts, others, strict=True)])
    errors = (estimate - truth)[truth < 1] / np.sqrt(truth * (1 - truth) / 112)[truth < 1]
    assert (estimate[truth == 1] == 1).all()
    assert abs(errors.mean()) < 0.3 and 0.8 < errors.std() < 1.2


def test_signatures_do_not_depend_on_what_is_hashed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*sentences(3, 50, 70), "", "one", *sentences(4, 3, 3000)]
    whole = signatures(texts)
    assert np.array_equal(whole, np.concatenate([signatures([t]) for t in texts]))
    monkeypatch.setattr(minhash, "BLOCK", 97)
    assert np.array_equal(whole, signatures(texts))
    assert (whole[50] == 0xFFFFFFFF).all()


def test_candidate_pairs_are_those_that_share_a_band() -> None:
    rng = random.Random(2)
    texts = sentences(5, 60, 60)
    texts += [altered(t, rng, 4) for t in texts[:40]] + texts[:5] + texts[:5]
    signature = signatures(texts)
    expected = sorted(
        (i, j)
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
        if any((signature[i, b : b + 8] == signature[j, b : b + 8]).all() for b in range(0, 112, 8))
    )
    assert len(expected) > 20
    assert candidate_pairs(signature).tolist() == [list(p) for p in expected]
