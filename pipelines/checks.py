"""Checks: the one that stands between a report and the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from mmlm.story import NOUNS
from pipelines.assets import score_table
from pipelines.resources import StoryRun


@dg.asset_check(
    asset=NOUNS["evaluate"],
    blocking=True,
    description="The model to be registered reaches the majority answer's score, and the threshold if one is set.",
)
def good_enough(run: StoryRun) -> dg.AssetCheckResult:
    """Blocking: when it fails, `registered` is not made."""
    story = run.load()
    model = "student" if story.register.model == "student" and story.distill else "teacher"
    headline = run.noun("evaluate").extra["headline"]
    problems = shortcomings(headline, model, run.threshold)
    return dg.AssetCheckResult(
        passed=not problems,
        severity=dg.AssetCheckSeverity.ERROR,
        description="; ".join(problems) or f"the {model} is good enough on every task",
        metadata={"scores": dg.MetadataValue.md(score_table(headline))},
    )


def shortcomings(headline: Mapping[str, Mapping[str, Any]], model: str, threshold: float | None) -> list[str]:
    """Why `model` may not be registered; empty when it may. `headline` is `{model: {task: score row}}`."""
    if not headline.get(model):
        return [f"the report has no scores of the {model}"]
    found = []
    for task, row in headline[model].items():
        value, majority = row["value"], headline.get("majority", {}).get(task)
        if majority and value < majority["value"]:
            found.append(f"{task}: {row['metric']} {value:.3f} is below the majority answer's {majority['value']:.3f}")
        if threshold is not None and value < threshold:
            found.append(f"{task}: {row['metric']} {value:.3f} is below the threshold {threshold:.3f}")
    return found
