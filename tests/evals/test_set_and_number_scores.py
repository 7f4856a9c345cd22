"""Scores of sets of classes and of numbers, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from mmlm.evals.number_scores import number_scores
from mmlm.evals.set_scores import set_scores


def test_scores_of_sets_are_scikit_learns():
    rng = np.random.default_rng(0)
    truth = rng.random((60, 5)) < [0.5, 0.2, 0.7, 0.1, 0.0]
    table = np.clip(truth * 0.3 + rng.random((60, 5)) * 0.7, 0, 1)
    given = table > 0.5
    found = {
        name: float(s(np.ones((1, 60), np.float32))[0])
        for name, s in set_scores(truth, given, table, list("abcde")).items()
    }
    occurs = truth.any(0) | given.any(0)
    for ratio, of in (
        ("f1", metrics.f1_score),
        ("precision", metrics.precision_score),
        ("recall", metrics.recall_score),
    ):
        assert found[f"{ratio}_micro"] == pytest.approx(of(truth, given, average="micro", zero_division=0), abs=1e-6)
        each = of(truth, given, average=None, zero_division=0)
        assert found[f"{ratio}_macro"] == pytest.approx(each[occurs].mean(), abs=1e-6)
    assert found["subset_accuracy"] == pytest.approx(metrics.accuracy_score(truth, given))
    areas = [metrics.roc_auc_score(truth[:, k], table[:, k]) for k in range(4)]
    assert [found[f"roc_auc/{label}"] for label in "abcd"] == pytest.approx(areas, abs=1e-6)
    assert found["roc_auc"] == pytest.approx(np.mean(areas), abs=1e-6)
    assert "roc_auc/e" not in found, "a class that no record has is no question of rank"


def test_scores_of_numbers_are_scikit_learns_also_with_weights_and_far_from_zero():
    rng = np.random.default_rng(1)
    truth = 1e6 + rng.normal(0, 3, 80)
    said = truth + rng.normal(0.5, 1, 80)
    w = rng.integers(0, 4, (3, 80)).astype(np.float32)
    found = number_scores(truth, said)
    for n, weights in enumerate(w):
        assert found["mae"](w)[n] == pytest.approx(metrics.mean_absolute_error(truth, said, sample_weight=weights))
        assert found["rmse"](w)[n] == pytest.approx(metrics.root_mean_squared_error(truth, said, sample_weight=weights))
        assert found["r2"](w)[n] == pytest.approx(metrics.r2_score(truth, said, sample_weight=weights))
