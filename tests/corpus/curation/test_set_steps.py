"""Exact copies, what train knows of test, and balance: independent of order, of workers and of retries."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mmlm.corpus.curation.balance import caps
from mmlm.corpus.curation.config import BalanceConfig
from mmlm.corpus.curation.set_steps import Drops
from mmlm.errors import DataError
from tests.corpus.curation.curated import altered, drops, encoded, orders, painting, row, sentences


def why(found: Drops) -> dict[str, str]:
    return {i: e.reason for i, e in found.events.items()}


# --- exact


def test_of_equal_records_the_held_out_one_stays_then_the_smallest_id(tmp_path: Path) -> None:
    rows = [row("a", "hello"), row("b", "hello"), row("c", "hello", split="val"), row("d", "hello", split="test"),
            row("e", "hello", split="test"), row("f", "other"), row("g", "other"), row("h", "hello", task="t2"),
            row("i", "hello", label="x"), row("j", "hello", pictures=[b"1"]), row("k", "hello", pictures=[b"2"])]  # fmt: skip
    for order in orders(rows):
        found = drops(order, tmp_path, exact={})
        assert why(found) == {
            "a": "duplicate_of_test", "b": "duplicate_of_test", "c": "duplicate_of_test", "e": "duplicate", "g": "duplicate",
        }  # fmt: skip
        assert found.events["g"].detail == "like f" and found.events["a"].detail == "like d"


def test_the_hash_of_the_content_decides_where_there_is_one(tmp_path: Path) -> None:
    rows = [row("a", "x", content_hash="1"), row("b", "y", content_hash="1"), row("c", "x", content_hash="2")]
    assert set(drops(rows, tmp_path, exact={}).events) == {"b"}


# --- contamination


def test_training_records_of_a_held_out_group_go(tmp_path: Path) -> None:
    rows = [row("a", "one", group="g"), row("b", "two", group="g", split="test"), row("c", "three", group="h"),
            row("d", "four", group="i", split="val"), row("e", "five", group="i")]  # fmt: skip
    assert why(drops(rows, tmp_path, contamination={})) == {"a": "group_in_test", "e": "group_in_val"}
    assert why(drops(rows, tmp_path, contamination={"groups": False})) == {}


@pytest.mark.parametrize("chinese", [False, True])
def test_a_held_out_text_inside_a_longer_training_text_is_found(chinese: bool, tmp_path: Path) -> None:
    texts = sentences(0, 40, 60, chinese=chinese)
    joint = "" if chinese else " "
    rows = [row(f"test{k}", texts[k], split="test") for k in range(10)]
    rows += [row(f"train{k}", texts[k]) for k in range(20, 40)]
    rows += [row("inside", joint.join([texts[11], texts[12], texts[3], texts[13]]))]
    half = texts[4][: len(texts[4]) // 4]
    rows += [row("quote", joint.join([texts[14], half, texts[15]]))]
    off = {"near_text": None, "near_images": None}
    for order in orders(rows):
        found = drops(order, tmp_path, contamination=off)
        assert why(found) == {"inside": "shared_runs_in_test"}
        assert found.events["inside"].detail == "like test3"
    assert why(drops(rows, tmp_path, contamination={**off, "share": 0.03})).keys() == {"inside", "quote"}
    assert why(drops(rows, tmp_path, contamination={**off, "ngram": None})) == {}


def test_shared_runs_are_those_of_the_brute_force(tmp_path: Path) -> None:
    rng = random.Random(4)
    texts = sentences(4, 60, 40)
    pieces = [" ".join(t.split()[k : k + 13]) for t in texts[:30] for k in (0, 13, 26)]
    rows = [row(f"test{k:02d}", texts[k], split=rng.choice(["val", "test"])) for k in range(30)]
    rows += [
        row(f"train{k:02d}", " ".join([texts[30 + k % 30], *rng.sample(pieces, rng.randint(0, 3))])) for k in range(60)
    ]

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[k : k + 6]) for k in range(len(words) - 5)}

    held = {r["id"]: runs(r["parts"][0]["text"]) for r in rows if r["split"] != "train"}
    seen: dict[tuple[str, ...], int] = {}
    for r in rows:
        for run in runs(r["parts"][0]["text"]):
            seen[run] = seen.get(run, 0) + 1
    common = 4
    content = {i: {x for x in s if seen[x] <= common} for i, s in held.items()}
    expected = set()
    for r in rows:
        mine = {x for x in runs(r["parts"][0]["text"]) if not (seen[x] > common and any(x in s for s in held.values()))}
        shares = [len(mine & s) / min(len(mine), len(s)) for s in content.values() if s and mine]
        if r["split"] == "train" and max(shares) >= 0.2:
            expected.add(r["id"])
    assert 10 < len(expected) < 50
    for order in orders(rows):
        found = drops(order, tmp_path, contamination={"ngram": 6, "share": 0.2, "common": common, "near_text": None})
        assert set(found.events) == expected


def test_wording_that_many_records_share_is_no_contamination(tmp_path: Path) -> None:
    prompt = "please read the following review with care and tell me whether the author of it liked the film or not"
    texts = sentences(1, 30, 12)
    rows = [row(f"r{k:02d}", f"{prompt} {t}", split="test" if k < 5 else "train") for k, t in enumerate(texts)]
    off = {"near_text": None, "near_images": None}
    assert why(drops(rows, tmp_path, contamination={**off, "share": 0.3})) == {}
    few = drops(rows[:9], tmp_path, contamination={**off, "share": 0.3})
    assert len(few.events) == 4  # in nine records a run shared by all of them still counts as content


def test_the_same_question_about_other_pictures_is_no_contamination(tmp_path: Path) -> None:
    question = (
        "what can be seen in this picture that was taken a long time ago by somebody whom nobody remembers any more"
    )
    files = {f"{k}.png": encoded(painting(k)) for k in range(6)}
    rows = [row(f"r{k}", question, pictures=[f"{k}.png"], split="test" if k < 2 else "train") for k in range(6)]
    assert why(drops(rows, tmp_path, files, contamination={})) == {}


def test_near_duplicates_of_held_out_texts_and_pictures_go_whatever_the_task(tmp_path: Path) -> None:
    rng = random.Random(0)
    text = sentences(0, 1, 100)[0]
    files = {"a.png": encoded(painting(1)), "b.jpg": encoded(painting(1), "JPEG", quality=70),
             "c.png": encoded(painting(2))}  # fmt: skip
    rows = [
        row("test", text, split="test", task="t1"), row("near", altered(text, rng, 1), task="t2"),
        row("far", altered(text, rng, 60)), row("picture", "what?", pictures=["a.png"], split="val", task="t1"),
        row("copy", "who?", pictures=["c.png", "b.jpg"], task="t2"), row("another", "who?", pictures=["c.png"]),
    ]  # fmt: skip
    found = drops(rows, tmp_path, files, contamination={"ngram": None})
    assert why(found) == {"near": "near_text_in_test", "copy": "near_image_in_val"}
    assert why(drops(rows, tmp_path, files, contamination={"near_text": None, "ngram": None})).keys() == {"copy"}


def test_no_step_looks_at_what_an_earlier_one_dropped(tmp_path: Path) -> None:
    """b goes as a copy of a; c, which is near to b only by its exact text, stays what it was."""
    text = sentences(3, 1, 60)[0]
    rows = [
        row("a", text, content_hash="same"),
        row("b", "nothing like it", content_hash="same"),
        row("c", "nothing like it!"),
    ]
    found = drops(rows, tmp_path, exact={}, near_text={})
    assert why(found) == {"b": "duplicate"}
    assert found.figures["near_text"][""] == {"kept": 2, "dropped": 0, "changed": 0}


# --- balance


def test_at_most_so_many_of_a_source_and_the_choice_depends_on_ids_alone(tmp_path: Path) -> None:
    rows = [row(f"r{k:03d}", f"text {k}", source="big" if k % 3 else "small") for k in range(90)]
    rows += [row(f"t{k}", "x", source="big", split="test") for k in range(40)]
    found = drops(rows, tmp_path, balance={"records": 20})
    assert found.figures["balance"] == {
        "big": {"kept": 60, "dropped": 40, "changed": 0}, "small": {"kept": 20, "dropped": 10, "changed": 0},
    }  # fmt: skip
    assert {e.reason for e in found.events.values()} == {"over_cap"}
    assert not any(i.startswith("t") for i in found.events)
    for order in orders(rows):
        assert drops(order, tmp_path, balance={"records": 20}) == found
    # another record changes at most who is the last to stay
    fewer = drops(rows[1:], tmp_path, balance={"records": 20})
    assert len(set(found.events) ^ set(fewer.events)) <= 2
    assert drops(rows, tmp_path, balance={"records": 20, "salt": "x"}).events.keys() != found.events.keys()
    own = drops(rows, tmp_path, balance={"sources": {"small": 5}})
    assert own.figures["balance"]["small"]["kept"] == 5 and own.figures["balance"]["big"]["dropped"] == 0


def test_the_share_holds_for_what_is_left() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        sizes = {f"s{k}": rng.randint(1, 200) for k in range(rng.randint(2, 6))}
        share = rng.uniform(1.01 / len(sizes), 1)
        found = caps(sizes, BalanceConfig(share=share))
        total = sum(found.values())
        assert all(n <= sizes[s] for s, n in found.items())
        assert all(n <= share * total + 1 for n in found.values())
        cut = {n for s, n in found.items() if n < sizes[s]}
        assert len(cut) <= 1
        if cut:  # one more of each that was cut would be too many
            most = cut.pop() + 1
            larger = sum(min(n, most) for n in sizes.values())
            assert most > share * larger - 1
    assert caps({"a": 900, "b": 100}, BalanceConfig(share=0.5)) == {"a": 100, "b": 100}
    assert caps({"a": 900, "b": 100}, BalanceConfig(share=0.75)) == {"a": 300, "b": 100}
    assert caps({"a": 900, "b": 100, "c": 0}, BalanceConfig(records=50)) == {"a": 50, "b": 50}


def test_a_share_that_cannot_hold_is_an_error(tmp_path: Path) -> None:
    rows = [row("a", "x", source="one"), row("b", "y", source="two")]
    with pytest.raises(DataError, match=r"at least 0\.50"):
        drops(rows, tmp_path, balance={"share": 0.3})
    with pytest.raises(DataError, match="no source of the corpus"):
        drops(rows, tmp_path, balance={"sources": {"three": 1}})


# --- all of them


def test_everything_at_once_is_independent_of_order_and_can_be_repeated(tmp_path: Path) -> None:
    rng = random.Random(9)
    texts = sentences(9, 40, 50) + sentences(9, 20, 60, chinese=True)
    texts += texts[:6] + [altered(t, rng, 1) for t in texts[6:12] + texts[40:46]]
    files = {f"{k}.png": encoded(painting(k % 9), blur=k // 9) for k in range(18)}
    rows: list[dict[str, Any]] = [
        row(f"t{k:02d}", t, source=rng.choice("ab"), split=rng.choice(["train"] * 5 + ["val", "test"]))
        for k, t in enumerate(texts)
    ]
    rows += [row(f"p{k:02d}", "what?", pictures=[n], source="c") for k, n in enumerate(files)]
    steps: dict[str, Any] = {s: {} for s in ("exact", "near_text", "near_images", "contamination")}
    steps["balance"] = {"records": 15}
    first = drops(rows, tmp_path, files, **steps)
    assert list(first.figures) == ["exact", "near_text", "near_images", "contamination", "balance"]
    assert {e.step for e in first.events.values()} >= {"exact", "near_text", "near_images", "balance"}
    for order in orders(rows):
        assert drops(order, tmp_path, files, workers=2, **steps) == first
    kept = [r for r in rows if r["id"] not in first.events]
    assert drops(kept, tmp_path, files, **steps).events == {}


def test_what_a_killed_run_left_behind_does_no_harm(tmp_path: Path) -> None:
    text = sentences(0, 1, 60)[0]
    rows = [row("a", text), row("b", text + " yes"), row("c", text, split="test")]
    for name in ("text-0/row", "text-0/signature", "text-0/runs", "text-0/count", "runs/hits"):
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_bytes(b"half of something")
    found = drops(rows, tmp_path, near_text={}, contamination={})
    assert why(found) == {"a": "near_duplicate_of_test", "b": "near_duplicate_of_test"}


def test_an_empty_corpus_and_a_corpus_without_words(tmp_path: Path) -> None:
    steps: dict[str, Any] = {s: {} for s in ("exact", "near_text", "near_images", "contamination", "balance")}
    assert drops([], tmp_path, **steps).events == {}
    assert drops([row("a"), row("b", "…", split="test")], tmp_path, **steps).events == {}
    assert drops([row("a", "x"), row("b", "x")], tmp_path) == Drops({}, {}, {})
