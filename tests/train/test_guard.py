"""Which losses are bad, what is skipped, how far a roll-back goes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mmlm.errors import DataError
from mmlm.train.config import SpikesConfig
from mmlm.train.guard import Guard


def guard(out: Path, **changes: float) -> Guard:
    return Guard(SpikesConfig.model_validate(changes), out, True, "train")


def test_falling_noisy_losses_are_good_and_leaps_are_not(tmp_path: Path):
    rng = np.random.default_rng(0)
    found = guard(tmp_path)
    for step in range(400):
        loss = 8 * math.exp(-step / 100) + 0.02 + abs(rng.normal(0, 0.1))
        assert found.judge(loss) == "", step
    mean = found.mean
    assert "leapt to 9" in found.judge(9.0)
    assert found.mean == mean  # a bad loss is no part of it
    assert found.judge(mean + 0.9) == ""  # many deviations, but not a nat


def test_the_first_losses_may_be_anything_finite(tmp_path: Path):
    found = guard(tmp_path, warmup=3)
    assert [bool(found.judge(loss)) for loss in (1.0, 900.0, 2.0, math.inf, math.nan, -math.inf)] == [False] * 3 + [
        True
    ] * 3


def test_leaps_can_be_allowed(tmp_path: Path):
    found = guard(tmp_path, deviations=0, warmup=1)
    assert [found.judge(loss) for loss in (1.0, 1.0, 50.0)] == ["", "", ""]
    assert found.judge(math.nan)


def test_evidence_and_what_was_skipped_outlive_the_process(tmp_path: Path):
    found = guard(tmp_path)
    found.skip(6, "the loss is nan", {"loss": "nan", "ids": ["a", "b"]})
    row = json.loads((tmp_path / "evidence" / "step-00000007.json").read_text())
    assert row == {"step": 7, "reason": "the loss is nan", "loss": "nan", "ids": ["a", "b"]}
    later = guard(tmp_path)
    later.take(later.kept())
    assert later.skipped == {6: "the loss is nan"} and later.rollbacks == 0


def test_bad_steps_far_apart_do_not_add_up(tmp_path: Path):
    found = guard(tmp_path, rollback_after=3, window=10)
    for step in (0, 20, 40, 60):
        found.skip(step, "bad", {})
    assert not found.spoiled
    found.skip(62, "bad", {})
    assert not found.spoiled
    found.skip(65, "bad", {})
    assert found.spoiled


def test_a_roll_back_goes_before_the_first_bad_step_and_skips_what_led_there(tmp_path: Path):
    found = guard(tmp_path, rollback_after=3, give_up_after=1)
    for step in (30, 31, 33):
        found.skip(step, "bad", {})
    assert found.roll_back([10, 20, 32]) == 20
    assert sorted(found.skipped) == [27, 28, 29, 30, 31, 32, 33]
    assert not found.spoiled and found.rollbacks == 1
    for step in (34, 35, 36):
        found.skip(step, "bad", {})
    with pytest.raises(DataError, match="after 1 roll-backs"):
        found.roll_back([10, 20])


def test_what_an_earlier_attempt_skipped_is_as_bad_until_a_roll_back_settles_it(tmp_path: Path):
    changes = {"rollback_after": 3, "window": 10}
    first = guard(tmp_path, **changes)
    for step in (30, 31, 33):
        first.skip(step, "bad", {})
    killed = guard(tmp_path, **changes)  # before it rolled back
    killed.take(killed.kept())
    for step in sorted(killed.skipped):
        killed.pass_over(step)
    assert killed.bad == first.bad and killed.spoiled
    killed.roll_back([20])
    again = guard(tmp_path, **changes)
    again.take(again.kept())
    for step in sorted(again.skipped):
        again.pass_over(step)
    assert again.rollbacks == 1 and again.bad == []


def test_without_a_checkpoint_before_there_is_no_way_back(tmp_path: Path):
    found = guard(tmp_path, rollback_after=1)
    found.skip(3, "the loss is nan", {})
    with pytest.raises(DataError, match=r"no checkpoint before.*lower optimizer.lr"):
        found.roll_back([4])


def test_state_goes_through_a_checkpoint(tmp_path: Path):
    one, other = guard(tmp_path), guard(tmp_path)
    for loss in (3.0, 2.5, 2.7, 2.2):
        one.judge(loss)
    one.bad = [2]
    other.load(json.loads(json.dumps(one.state())))
    assert (other.mean, other.variance, other.seen, other.bad) == (one.mean, one.variance, one.seen, one.bad)


def test_a_kill_while_rolling_back_is_known_to_the_next_attempt(tmp_path: Path):
    found = guard(tmp_path, rollback_after=1)
    found.skip(7, "bad", {})
    assert found.roll_back([4, 8]) == 4
    killed = guard(tmp_path)
    killed.take(killed.kept())
    assert killed.going_back == 4
    found.is_back()
    again = guard(tmp_path)
    again.take(again.kept())
    assert again.going_back is None and again.rollbacks == 1
