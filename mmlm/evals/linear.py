"""Linear models of flat rows beside sets of classes and numbers, as `baselines.Logistic` is beside single classes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from mmlm.evals.config import LogisticConfig
from mmlm.evals.flat import Decode, flat_rows
from mmlm.evals.predictions import Prediction
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec, TaskSpec


class ManyLogistic:
    """A logistic regression for each class of a task of which several may hold; the strength that gives the likelier
    sets in the validation split."""

    def __init__(self, task: TaskSpec, kept: frozenset[str], spec: FeatureSpec, decode: Decode) -> None:
        self.labels, self.kept, self.spec, self.decode = task.labels, kept, spec, decode
        self.models: list[Any] = []

    def fit(self, train: Sequence[Sample], val: Sequence[Sample], config: LogisticConfig) -> ManyLogistic:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        rows, held = self._rows(train), self._held(train)
        val_rows, val_held = (self._rows(val), self._held(val)) if val else (rows, held)
        best = -np.inf
        for strength in config.strengths if val else config.strengths[:1]:
            models: list[Any] = []
            for column in held.T:
                if column.all() or not column.any():
                    models.append(float(column.mean()))
                    continue
                model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200, tol=1e-3))
                with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
                    warnings.simplefilter("ignore")  # a baseline that has not quite converged is still one
                    models.append(model.fit(rows, column))
            share = np.clip(_shares(models, val_rows), 1e-6, 1 - 1e-6)
            reached = float(np.where(val_held, np.log(share), np.log1p(-share)).sum())
            if reached > best:
                best, self.models = reached, models
        return self

    def predict(self, samples: Sequence[Sample]) -> list[Prediction]:
        found = []
        for row in _shares(self.models, self._rows(samples)):
            scores = dict(zip(self.labels, map(float, row), strict=True))
            held = [label for label, p in scores.items() if p > 0.5]
            found.append(Prediction(None, scores, None, float(np.maximum(row, 1 - row).prod()), held))
        return found

    def _rows(self, samples: Sequence[Sample]) -> np.ndarray:
        return flat_rows(samples, self.kept, self.spec, self.decode)

    def _held(self, samples: Sequence[Sample]) -> np.ndarray:
        return np.array([[label in (held_of(s) or ()) for label in self.labels] for s in samples])


def _shares(models: list[Any], rows: np.ndarray) -> np.ndarray:
    columns = [np.full(len(rows), m) if isinstance(m, float) else m.predict_proba(rows)[:, 1] for m in models]
    return np.stack(columns, 1)


def held_of(sample: Sample) -> list[str] | None:
    """The classes that hold, where several may; None where it was not asked."""
    if sample.labels is not None:
        return sample.labels
    return None if sample.label is None else [sample.label]


class Ridge:
    """Ridge regression (Hoerl & Kennard 1970), its strength chosen by leave-one-out over the training records."""

    def __init__(self, kept: frozenset[str], spec: FeatureSpec, decode: Decode) -> None:
        self.kept, self.spec, self.decode = kept, spec, decode
        self.model: Any = None

    def fit(self, train: Sequence[Sample]) -> Ridge:
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        with threadpool_limits(1, user_api="blas"):
            self.model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 5, 13)))
            self.model.fit(self._rows(train), np.array([s.number for s in train]))
        return self

    def predict(self, samples: Sequence[Sample]) -> list[Prediction]:
        said = self.model.predict(self._rows(samples))
        return [Prediction(None, {}, format(n, ".6g"), None, number=float(n)) for n in said]

    def _rows(self, samples: Sequence[Sample]) -> np.ndarray:
        return flat_rows(samples, self.kept, self.spec, self.decode)
