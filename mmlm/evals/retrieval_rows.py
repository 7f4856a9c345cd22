"""Rows of retrieval for models that make embeddings: each modality as the query, each other one as what is to be found."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mmlm.evals.bench import Samples
from mmlm.evals.config import EvaluateConfig
from mmlm.evals.embed import embed
from mmlm.evals.predictions import Facts
from mmlm.evals.retrieval import ranks, recalls
from mmlm.evals.statistics import Resamples, interval
from mmlm.features.sample import Sample

MOST = 2000
"""Records of a task that look for each other, at most: the first of the split. Recall falls with their number, so it is the
same for all models."""


def retrieval_rows(
    models: Mapping[str, Any], config: EvaluateConfig, reader: Samples, facts: Sequence[Facts], split: str
) -> list[dict[str, Any]]:
    """Rows as in DESIGN.md's outside, metric `recall@K`, modalities such as `image→audio`. Records of one group belong
    together, and a task of which fewer than ten have both modalities has no row."""
    able = {name: model for name, model in models.items() if _embeds(model)}
    by_task: dict[str, list[Facts]] = {}
    for one in facts if able else ():
        by_task.setdefault(one.task, []).append(one)
    rows = []
    for task, some in sorted(by_task.items()):
        samples = [reader[f.at] for f in some[:MOST]]
        for name, model in able.items():
            for query, target in itertools.permutations(sorted({m for s in samples for m in s.modalities}), 2):
                both = [s for s in samples if {query, target} <= set(s.modalities)]
                if len(both) >= 10:
                    rows += _rows(name, model, config, task, both, query, target, split)
    return rows


def _embeds(model: Any) -> bool:
    return bool(getattr(getattr(getattr(model, "model", None), "config", None), "embedding", None))


def _rows(
    name: str, model: Any, config: EvaluateConfig, task: str, samples: list[Sample], query: str, target: str, split: str
) -> list[dict[str, Any]]:
    groups = [s.group or s.id for s in samples]
    asked, candidates = (embed(model, samples, frozenset({m})) for m in (query, target))
    found = ranks(asked, candidates, groups, groups)
    resamples = Resamples(len(groups), groups, config.bootstrap.samples, config.bootstrap.seed)
    rows = []
    for metric, score in recalls(found).items():
        got = interval(score, resamples, config.bootstrap.confidence, share=True)
        rows.append(
            {
                "model": name, "task": task, "metric": metric, "modalities": f"{query}→{target}", "lang": "all",
                "split": split, "n": len(groups),
                "value": round(got.value, 6), "low": round(got.low, 6), "high": round(got.high, 6),
            }
        )  # fmt: skip
    return rows
