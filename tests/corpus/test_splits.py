"""Splits: by group, stable, given ones win, small corpora get all three."""

from __future__ import annotations

import pytest

from mmlm.corpus.config import SplitConfig
from mmlm.corpus.splits import Splitter


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
