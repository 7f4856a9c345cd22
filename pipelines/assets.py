"""Assets: one per verb of a story, named like its noun. Each calls the same verb as the command line does."""

# no `from __future__ import annotations`: Dagster looks at the annotation of `context` itself
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import dagster as dg

from mmlm.artifacts import NAME, Artifact
from mmlm.story import NOUNS, VERBS, Story
from pipelines.resources import StoryRun

UPSTREAM = {
    "scan": [],
    "shard": ["scan"],
    "train": ["shard"],
    "distill": ["shard", "train"],
    "evaluate": ["train", "distill"],
    "register": ["distill", "evaluate"],
}
"""verb → the verbs whose nouns it reads, less those that come along with another: the picture stays readable."""
KINDS = {
    "scan": {"parquet"},
    "shard": {"ray", "webdataset"},
    "train": {"deepspeed", "pytorch"},
    "distill": {"deepspeed", "pytorch"},
    "evaluate": {"html", "sklearn"},
    "register": {"mlflow"},
}
ABOUT = {
    "scan": "What is in the raw corpora: ids, hashes, splits, labels, and what was refused.",
    "shard": "Feature shards (WebDataset tars) with their FeatureSpec and quarantine table.",
    "train": "The teacher: a fused Transformer.",
    "distill": "The student: smaller, taught by the teacher.",
    "evaluate": "Scores with intervals beside baselines, as a table and as an HTML report.",
    "register": "A version of the registered model; the alias `champion` moves when the gate lets it.",
}


def story_assets(story: Story) -> list[dg.AssetsDefinition]:
    """The assets of one story, in order of its verbs."""
    return [_asset(verb, story.verbs) for verb in story.verbs]


def _asset(verb: str, present: list[str]) -> dg.AssetsDefinition:
    @dg.asset(
        name=NOUNS[verb],
        deps=[NOUNS[upstream] for upstream in UPSTREAM[verb] if upstream in present],
        group_name="story",
        kinds=KINDS[verb],
        description=ABOUT[verb],
        code_version="1",
    )
    def noun(context: dg.AssetExecutionContext, run: StoryRun) -> dg.MaterializeResult:  # type: ignore[type-arg]
        started = time.time()
        artifact = run.perform(verb)
        there = (artifact.path / NAME).stat().st_mtime < started
        context.log.info("%s: %s", verb, "already there" if there else f"{time.time() - started:.1f} s")
        return dg.MaterializeResult(
            metadata=metadata(verb, artifact, there), data_version=dg.DataVersion(artifact.digest[:16])
        )

    return noun


def metadata(verb: str, artifact: Artifact, there: bool) -> dict[str, Any]:
    """What Dagster's page shows of a noun: its counts, where it lies, its MLflow run, and for some what they say."""
    found: dict[str, Any] = {}
    if verb == "evaluate":
        found["scores"] = dg.MetadataValue.md(score_table(artifact.extra["headline"]))
        found["report"] = dg.MetadataValue.path(str(artifact.path / "report.html"))
    if verb == "register":
        said = json.loads((artifact.path / "registered.json").read_text(encoding="utf-8"))
        found |= {"model": said["model_uri"], "gate": said.get("reason", ""), "promoted": bool(said.get("promoted"))}
    if artifact.run_id:
        page = os.environ.get("MMLM_MLFLOW_PAGE", "http://127.0.0.1:5000")
        found["MLflow run"] = dg.MetadataValue.url(f"{page}/#/runs/{artifact.run_id}")
    found |= {k: v for k, v in artifact.counts.items() if isinstance(v, int | float | str)}
    return found | {
        "seconds": artifact.seconds,
        "already there": there,
        "fingerprint": artifact.fingerprint[:12],
        "folder": dg.MetadataValue.path(str(artifact.path)),
    }


def score_table(headline: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """`{model: {task: score row}}` as a Markdown table, a row per model and a column per task."""
    tasks = list(dict.fromkeys(task for rows in headline.values() for task in rows))
    first = next(iter(headline.values()))
    lines = [
        "| model | " + " | ".join(f"{t}, {first[t]['metric']} ({first[t]['modalities']})" for t in tasks) + " |",
        "|---|" + "---|" * len(tasks),
    ]
    for model, rows in headline.items():
        cells = [f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" if (r := rows.get(t)) else "" for t in tasks]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


assert set(UPSTREAM) == set(VERBS)
