"""Splits: by group, stable, given ones win, small corpora get all three."""

from __future__ import annotations

import random

import pytest

from mmlm.corpus.config import SplitConfig
from mmlm.corpus.splits import Splitter
from mmlm.storage import sha256_bytes


def decide(groups: dict[str, str], **config: object) -> dict[str, str]:
    splitter = Splitter(SplitConfig.model_validate(config))
    for group, split in groups.items():
        splitter.note(group, split)
    splitter.decide()
    return {g: splitter.split_of(g, s) for g, s in groups.items()}


def test_shares_are_near_and_more_groups_do_not_move_the_old_ones() -> None:
    some = decide({f"g{i}": "" for i in range(1000)}, val=0.1, test=0.2)
    more = decide({f"g{i}": "" for i in range(2000)}, val=0.1, test=0.2)
    assert all(more[g] == s for g, s in some.items())
    assert 150 < sum(s == "test" for s in some.values()) < 250
    assert 60 < sum(s == "val" for s in some.values()) < 140


def test_order_of_groups_does_not_matter_and_salt_does() -> None:
    groups = [f"g{i}" for i in range(200)]
    assert decide(dict.fromkeys(groups, "")) == decide(dict.fromkeys(reversed(groups), ""))
    assert decide(dict.fromkeys(groups, "")) != decide(dict.fromkeys(groups, ""), salt="x")


@pytest.mark.parametrize("n", range(3, 30))
def test_every_split_gets_a_group_of_three_or_more(n: int) -> None:
    assert set(decide({f"g{i}": "" for i in range(n)}).values()) == {"train", "val", "test"}


def test_one_and_two_groups() -> None:
    assert decide({"only": ""}) == {"only": "train"}
    assert set(decide({"a": "", "b": ""}).values()) == {"train", "test"}


def test_a_share_of_nothing_stays_empty() -> None:
    assert set(decide({f"g{i}": "" for i in range(50)}, val=0.0, test=0.3).values()) == {"train", "test"}


def test_given_splits_win_and_missing_ones_are_taken_from_training() -> None:
    given = {f"g{i}": "train" for i in range(40)} | {"t": "test"}
    filled = decide(given)
    assert filled["t"] == "test"
    assert set(filled.values()) == {"train", "val", "test"}
    assert sum(s == "test" for s in filled.values()) == 1
    assert decide(given, fill=False) == given


def test_a_group_that_the_data_tear_apart_keeps_every_split_that_they_give() -> None:
    splitter = Splitter(SplitConfig())
    for i in range(20):
        splitter.note(f"g{i}", "train")
        splitter.note(f"torn{i}", "train")
        splitter.note(f"torn{i}", "test")
    splitter.decide()
    torn = [(splitter.split_of(f"torn{i}", "train"), splitter.split_of(f"torn{i}", "test")) for i in range(20)]
    assert torn == [("train", "test")] * 20
    assert {splitter.split_of(f"g{i}", "train") for i in range(20)} == {"train", "val"}


def test_records_without_a_split_follow_their_group() -> None:
    splitter = Splitter(SplitConfig())
    for split in ("", "test", ""):
        splitter.note("g", split)
    for i in range(20):
        splitter.note(f"h{i}", "train")
    splitter.decide()
    assert splitter.split_of("g", "") == "test"


def test_a_group_that_the_data_tear_apart_is_left_as_they_say_and_told() -> None:
    splitter = Splitter(SplitConfig(fill=False))
    splitter.note("g", "train")
    splitter.note("g", "test")
    splitter.decide()
    assert splitter.torn == {"g"}
    assert (splitter.split_of("g", "train"), splitter.split_of("g", "test")) == ("train", "test")


def placed(rows: list[tuple[str, str, list[str]]], **config: object) -> tuple[dict[int, str], Splitter]:
    """Split of each of `rows` ((group, split or "", media))."""
    splitter = Splitter(SplitConfig.model_validate(config))
    for group, split, media in rows:
        splitter.note(group, split, [sha256_bytes(m.encode()) for m in media])
    splitter.decide()
    return {i: splitter.split_of(group, split) for i, (group, split, _) in enumerate(rows)}, splitter


@pytest.mark.parametrize("seed", range(20))
def test_records_that_share_a_picture_share_a_split(seed: int) -> None:
    rng = random.Random(seed)
    rows = [
        (f"g{rng.randrange(150)}", "", [f"m{rng.randrange(900)}" for _ in range(rng.choice((0, 1, 1, 2)))])
        for _ in range(200)
    ]
    found, splitter = placed(rows)
    for key in ("group", "media"):
        seen: dict[str, set[str]] = {}
        for i, (group, _, media) in enumerate(rows):
            for name in [group] if key == "group" else media:
                seen.setdefault(name, set()).add(found[i])
        assert all(len(splits) == 1 for splits in seen.values())
    assert set(found.values()) == {"train", "val", "test"}
    assert splitter.joined and not splitter.apart
    # the order changes nothing, nor do records that share nothing with those that were there
    order = rng.sample(range(200), 200)
    again, _ = placed([rows[i] for i in order])
    assert {i: again[at] for at, i in enumerate(order)} == found
    grown, _ = placed([*rows, *((f"new{k}", "", [f"other{k}"]) for k in range(100))])
    assert {i: grown[i] for i in range(200)} == found
    # groups that share nothing lie where they lay before
    plain = decide({group: "" for group, _, _ in rows})
    clumps = {
        g for i, (g, _, media) in enumerate(rows) for m in media for other in rows if m in other[2] and other[0] != g
    }
    assert all(found[i] == plain[g] for i, (g, _, _) in enumerate(rows) if g not in _reached(rows, clumps))


def _reached(rows: list[tuple[str, str, list[str]]], groups: set[str]) -> set[str]:
    media = {m for g, _, files in rows if g in groups for m in files}
    more = groups | {g for g, _, files in rows if media.intersection(files)}
    return more if more == groups else _reached(rows, more)


def test_a_shared_picture_follows_a_split_that_is_given() -> None:
    rows = [("a", "test", ["x"]), ("b", "", ["x", "y"]), ("c", "", ["y"]), ("d", "train", ["z"]), ("e", "", ["z"])]
    found, _ = placed([*rows, *((f"g{i}", "", []) for i in range(30))])
    assert [found[i] for i in range(5)] == ["test", "test", "test", "train", "train"]
    torn, _ = placed([("a", "test", ["x"]), ("b", "train", ["x"]), ("c", "", ["x"])])
    assert [torn[i] for i in range(3)] == ["test", "train", "train"]  # what the data give wins
    train = [(f"g{i}", "train", [f"m{i // 2}"]) for i in range(60)]
    filled, _ = placed([*train, ("new", "", ["m0"])])
    assert set(filled.values()) == {"train", "val", "test"}
    assert all(filled[i] == filled[i + 1] for i in range(0, 60, 2))
    assert filled[60] == filled[0]


def test_media_that_given_splits_tear_apart_are_not_counted_as_joined() -> None:
    alone: list[tuple[str, str, list[str]]] = [(f"g{i}", "", []) for i in range(30)]
    torn, splitter = placed([("a", "test", ["x"]), ("b", "train", ["x", "y"]), ("c", "", ["y"]), *alone])
    assert [torn[i] for i in range(3)] == ["test", "train", "train"]
    assert (splitter.joined, splitter.apart, splitter.across) == (0, 0, 1)
    _, splitter = placed([("a", "test", ["x"]), ("b", "", ["x"]), ("c", "train", ["y"]), ("d", "val", ["y"]), *alone])
    assert (splitter.joined, splitter.apart, splitter.across) == (2, 0, 1)
    _, splitter = placed([("a", "test", ["x"]), ("b", "train", ["x"])])
    assert (splitter.joined, splitter.apart, splitter.across) == (0, 2, 1)


def test_what_everybody_has_joins_nobody() -> None:
    logo = [(f"g{i}", "", ["logo", f"m{i}"]) for i in range(300)]
    found, splitter = placed(logo)
    assert not splitter.joined
    assert {f"g{i}": s for i, s in found.items()} == decide({f"g{i}": "" for i in range(300)})
    # a clump of most of the groups is for training; one of all of them would leave nothing to test on
    most, splitter = placed([(f"g{i}", "", ["x"] if i < 60 else []) for i in range(100)])
    assert {most[i] for i in range(60)} == {"train"} and splitter.joined == 60
    assert {"val", "test"} < set(most.values())
    every, splitter = placed([(f"g{i}", "", ["x"]) for i in range(50)])
    assert set(every.values()) == {"train", "val", "test"} and splitter.apart == 50
    apart, _ = placed([(f"g{i}", "", [f"m{i // 2}"]) for i in range(200)], shared_media=None)
    assert {f"g{i}": s for i, s in apart.items()} == decide({f"g{i}": "" for i in range(200)})
