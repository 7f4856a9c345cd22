"""Intervals cover, and tests agree with scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from mmlm.evals.scores import share
from mmlm.evals.statistics import Resamples, compare, interval, mcnemar, wilson


def test_bootstrap_covers_a_known_share() -> None:
    rng, inside, tries = np.random.default_rng(0), 0, 200
    for i in range(tries):
        right = rng.random(150) < 0.8
        found = interval(share(right), Resamples(150, None, 400, i), 0.95)
        assert found.low <= found.value <= found.high
        inside += found.low <= 0.8 <= found.high
    assert 0.88 <= inside / tries <= 0.99


def test_bootstrap_is_close_to_wilson() -> None:
    right = np.arange(1440) < 1380
    found = interval(share(right), Resamples(1440, None, 2000, 1), 0.95)
    low, high = wilson(1380, 1440)
    assert abs(found.low - low) < 0.004
    assert abs(found.high - high) < 0.004


def test_groups_widen_the_interval() -> None:
    rng = np.random.default_rng(4)
    right = np.repeat(rng.random(60) < 0.7, 10)  # ten renderings that stand or fall together
    groups = [f"g{i // 10}" for i in range(600)]
    alone = interval(share(right), Resamples(600, None, 1000, 0), 0.95)
    together = interval(share(right), Resamples(600, groups, 1000, 0), 0.95)
    assert together.high - together.low > 2.5 * (alone.high - alone.low)


def test_records_without_a_group_stand_alone() -> None:
    assert Resamples(4, ["", "", "a", "a"], 10, 0).units == 3


def test_all_right_is_not_certainty() -> None:
    found = interval(share(np.ones(63, bool)), Resamples(63, None, 200, 0), 0.95, share=True)
    assert found.value == found.high == 1
    assert found.low == pytest.approx(wilson(63, 63)[0])
    assert 0.9 < found.low < 0.96


def test_resamples_in_pieces_keep_their_size() -> None:
    resamples = Resamples(2_000_000, None, 17, 0)
    rows = [w.shape[0] for w in resamples.weights()]
    assert sum(rows) == 17
    assert len(rows) > 1


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 9), (9, 3), (40, 61), (5, 5), (300, 420)])
def test_mcnemar_is_the_binomial_test(first: int, second: int) -> None:
    wanted = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(wanted, rel=1e-9)


def test_compare_sees_a_better_and_an_equal_challenger() -> None:
    rng = np.random.default_rng(6)
    champion = rng.random(800) < 0.80
    better = champion | (rng.random(800) < 0.3)
    found = compare(champion, better, [f"g{i}" for i in range(800)])
    assert found["low"] > 0
    assert found["probability_better"] > 0.999
    assert found["p_value"] < 1e-6
    assert found["difference"] == pytest.approx(better.mean() - champion.mean(), abs=1e-6)
    same = compare(champion, champion)
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0, "probability_better": 0.5, "p_value": 1.0}
    worse = compare(better, champion)
    assert worse["high"] < 0
    assert worse["probability_better"] < 0.001


def test_compare_refuses_other_records() -> None:
    with pytest.raises(ValueError, match="equally long"):
        compare([1, 0], [1, 0, 1])
