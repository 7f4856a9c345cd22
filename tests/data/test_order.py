"""The order: a permutation with no table, quotas, phases."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm.config import parse
from mmlm.data.config import DataConfig
from mmlm.data.order import PERIOD, Order, Quotas, key_of, share, shuffle
from mmlm.errors import ConfigError


def mixture(**given: object):
    return parse(DataConfig, {"mixture": given}, "test").mixture


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63))
def test_shuffle_is_a_permutation(size: int, seed: int):
    assert sorted(shuffle(np.arange(size), size, key_of(seed))) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**60), st.integers(0, 2**63), st.data())
def test_shuffle_sends_different_places_to_different_places_whatever_the_size(size: int, seed: int, data):
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True)))
    found = shuffle(places, size, key_of(seed))
    assert len(set(found.tolist())) == len(places) and found.min() >= 0 and found.max() < size
    assert [int(shuffle(places[i : i + 1], size, key_of(seed))[0]) for i in range(len(places))] == found.tolist()


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_all_permutations_of_few_things_are_as_likely(size: int):
    draws = 200 * math.factorial(size)
    keys = key_of(7, np.arange(draws))
    found = np.stack([shuffle(np.full(draws, place), size, keys) for place in range(size)], 1)
    counts = Counter(map(tuple, found.tolist()))
    assert counts.keys() == set(itertools.permutations(range(size)))
    assert chi_square(np.array(list(counts.values()))) < 4.5  # standard deviations; one in 300,000 by chance


def chi_square(counts: np.ndarray) -> float:
    """How far counts are from being equal, in standard deviations of the chi-square statistic."""
    expected = counts.mean()
    free = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free))


def test_places_and_neighbours_are_spread_evenly():
    size, epochs = 1000, 2000
    keys = key_of(3, np.arange(epochs))
    first, second = (shuffle(np.full(epochs, place), size, keys) for place in (0, 1))
    assert chi_square(np.bincount(first // 10, minlength=100)) < 4.5
    pairs = np.bincount(first // 100 * 10 + second // 100, minlength=100)
    assert chi_square(pairs) < 4.5
    many = np.stack([shuffle(np.arange(size), size, key_of(5, epoch)) for epoch in range(300)])
    assert abs(np.corrcoef(many[:-1].ravel(), many[1:].ravel())[0, 1]) < 0.01  # from one epoch to the next
    assert abs(np.corrcoef(many[:, :-1].ravel(), many[:, 1:].ravel())[0, 1]) < 0.01  # from one place to the next
    fixed = (many == np.arange(size)).sum(1)  # a random permutation leaves one thing in its place, more or less
    assert fixed.mean() == pytest.approx(1, abs=0.25) and fixed.var() == pytest.approx(1, abs=0.4)
    rising = (np.diff(many, axis=1) > 0).mean()
    assert rising == pytest.approx(0.5, abs=0.005)


def test_every_epoch_holds_every_sample_once_and_in_another_order():
    order = Order({"all": 10}, batch=4, seed=3)
    seen = np.concatenate([order.step(s) for s in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_a_step_is_a_pure_function_of_its_number():
    forward, backward = Order({"all": 37}, 8, 1), Order({"all": 37}, 8, 1)
    steps = [forward.step(s).tolist() for s in range(30)]
    assert [backward.step(s).tolist() for s in reversed(range(30))] == steps[::-1]
    assert Order({"all": 37}, 8, 2).step(0).tolist() != steps[0]
    assert forward.digest == backward.digest != Order({"all": 37}, 8, 2).digest


def test_a_batch_larger_than_the_corpus_spans_epochs():
    found = Order({"all": 3}, batch=10, seed=0).step(0)
    assert [sorted(found[i : i + 3]) for i in (0, 3, 6)] == [[0, 1, 2]] * 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=8), st.integers(1, 300))
def test_quotas_fill_every_batch_and_keep_the_weights(weights: list[float], batch: int):
    quotas = Quotas(weights, batch)
    share = np.array(weights) / sum(weights)
    assert (quotas.table.sum(1) == batch).all() and (quotas.table >= 0).all()
    assert (abs(quotas.table - batch * share) <= 1 + 1 / PERIOD).all()
    for step in (1, 7, 100, PERIOD, 3 * PERIOD + 17):
        assert quotas.before(step).sum() == step * batch
        # as even as a coin that is never thrown: a random choice would be off by √step
        assert (abs(quotas.before(step) - step * batch * share) < 6 + step / PERIOD).all()
    assert quotas.before(2500).tolist() == sum(quotas.at(s) for s in range(2500)).tolist()  # type: ignore[union-attr]


SIZES = {"small": 7, "large": 100}


def test_a_small_stream_is_gone_through_more_often():
    order = Order(SIZES, 10, 1, mixture(kind="weighted", weights={"small": 0.25, "large": 0.75}))
    seen = [order.step(s) for s in range(56)]
    small = [int((row < 7).sum()) for row in seen]
    assert set(small) == {2, 3} and sum(small) in (140, 139, 141)
    flat = np.concatenate(seen)
    assert np.ptp(np.bincount(flat[flat < 7], minlength=7)) <= 1 and np.ptp(np.bincount(flat, minlength=107)[7:]) <= 1
    assert order.epochs(56) == {"small": sum(small) / 7, "large": (560 - sum(small)) / 100}
    places = np.concatenate([np.flatnonzero(row < 7) for row in seen])
    assert np.bincount(places, minlength=10).min() > 3  # the small stream is not always the first rank's


def test_phases_follow_each_other_and_count_on():
    phased = mixture(
        kind="phases",
        phases=[
            {"share": 1, "weights": {"small": 1, "large": 0}},
            {"share": 3, "weights": {"small": 0.5, "large": 0.5}},
        ],
    )
    order = Order(SIZES, 4, 1, phased, steps=100)
    assert [int((order.step(s) < 7).sum()) for s in (0, 24, 25, 99)] == [4, 4, 2, 2]
    flat = np.concatenate([order.step(s) for s in range(100)])
    counts = np.bincount(flat, minlength=107)
    assert np.ptp(counts[:7]) <= 1 and np.ptp(counts[7:]) <= 1
    assert order.taken(100).tolist() == [100 + 150, 150]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"small": 1}, "no weight for 'large'"),
        ({"small": 1, "large": 1, "huge": 1}, "names 'huge'"),
        ({"small": 0, "large": 0}, "all of them are 0"),
        ({"small": 2, "large": -1}, "weights.large` = -1"),
        ({"small": 1, "large": float("nan")}, "weights.large` = nan: .*finite"),
        ({"small": 1, "large": float("inf")}, "weights.large` = inf: .*finite"),
        ({"small": 1, "large": 1e308}, "weights.large` = 1e.308"),
    ],
)
def test_weights_that_do_not_fit_the_streams(weights: dict[str, float], words: str):
    with pytest.raises(ConfigError, match=words):
        Order(SIZES, 4, 1, mixture(kind="weighted", weights=weights))
    if "weights" in words:  # also of a phase
        with pytest.raises(ConfigError, match=words):
            mixture(kind="phases", phases=[{"share": 1, "weights": weights}])


@pytest.mark.parametrize("share", [0, -1, float("inf"), float("nan")])
def test_a_share_of_the_steps_that_is_none(share: float):
    with pytest.raises(ConfigError, match="share` = "):
        mixture(kind="phases", phases=[{"share": share, "weights": {"small": 1}}])


def test_no_config_takes_what_is_no_finite_number():
    with pytest.raises(ConfigError, match=r"modality_dropout` = nan: .*finite"):
        parse(DataConfig, {"modality_dropout": float("nan")}, "test")


def test_step_a_million_costs_what_step_0_does():
    def seconds(step: int) -> float:
        start = time.process_time()
        order = Order({"a": 10**9, "b": 10**7}, 256, 1, mixture(kind="weighted", weights={"a": 3, "b": 1}))
        order.step(step)
        return time.process_time() - start

    seconds(0)
    near, far = (min(seconds(step) for _ in range(5)) for step in (0, 10**6))
    assert far < 2 * near + 0.01


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_share_a_batch_without_gap_or_overlap(ranks: int):
    batch = np.arange(10)
    assert np.concatenate([share(batch, r, ranks) for r in range(ranks)]).tolist() == batch.tolist()
