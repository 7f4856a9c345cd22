"""Retrieval: ranks and their chance level against a count, and linear CCA against what two tables were made of."""

from __future__ import annotations

import numpy as np
import pytest

from mmlm.evals.retrieval import LinearCca, chance, ranks, recalls


def test_ranks_are_places_of_the_first_of_its_own_group():
    candidates = np.eye(4)
    queries = np.array([[1.0, 0.5, 0.2, 0.0], [0.0, 0.0, 0.0, 2.0], [0.9, 0.8, 0.0, 0.1]])
    found = ranks(queries, candidates, ["b", "d", "z"], ["a", "b", "c", "d"])
    assert found.tolist() == [2, 1, 5]
    twice = ranks(queries[:1], candidates, ["c"], ["c", "b", "c", "d"])
    assert twice.tolist() == [1], "the better of two that belong"
    score = recalls(found, (1, 2))["recall@2"]
    assert score(np.ones((1, 3), np.float32))[0] == pytest.approx(2 / 3)


def test_rows_that_are_all_alike_are_no_find():
    found = ranks(np.ones((10, 3)), np.ones((10, 3)), [str(i) for i in range(10)], [str(i) for i in range(10)])
    assert (found == 6).all()


def test_embeddings_that_are_not_finite_find_nothing():
    groups, broken = list("abcde"), np.full((5, 4), np.nan, np.float32)
    assert (ranks(broken, broken, groups, groups) == 6).all()
    for value in (np.nan, np.inf):
        rows = np.eye(5, dtype=np.float32)
        rows[1, 3] = value
        assert ranks(np.eye(5, dtype=np.float32), rows, groups, groups).tolist() == [1, 6, 1, 1, 1], "behind all others"
        assert ranks(rows, np.eye(5, dtype=np.float32), groups, groups).tolist() == [1, 6, 1, 1, 1]


def test_chance_is_that_of_shuffled_candidates():
    rng = np.random.default_rng(0)
    groups = ["a", "a", "b", "c", "d", "e"]
    hits = []
    for _ in range(4000):
        order = rng.permutation(6)[:2]
        hits.append(np.mean([any(groups[i] == g for i in order) for g in groups]))
    assert chance(groups, groups, 2) == pytest.approx(np.mean(hits), abs=0.01)


def test_linear_cca_finds_what_two_tables_have_in_common():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(300, 4))
    a = common @ rng.normal(size=(4, 30)) + 0.3 * rng.normal(size=(300, 30))
    b = common @ rng.normal(size=(4, 20)) + 0.3 * rng.normal(size=(300, 20))
    cca = LinearCca(components=12, size=4, ridge=1e-3).fit(a[:200], b[:200])
    names = [str(i) for i in range(100)]
    found = ranks(cca.transform(0, a[200:]), cca.transform(1, b[200:]), names, names)
    assert (found <= 5).mean() > 0.8 > 5 * chance(names, names, 5)
