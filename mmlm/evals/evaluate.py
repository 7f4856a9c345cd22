"""Verb evaluate: ShardSet + Checkpoints → Report.

A Report folder: `scores.json` (rows as in DESIGN.md's outside), `predictions.parquet` (a row per model, given
modalities and record), `report.html` (one file, pictures inside) and its plots as PNG.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.errors import DataError
from mmlm.evals.baselines import Baselines
from mmlm.evals.bench import Bench, Samples, open_bench
from mmlm.evals.config import EvaluateConfig
from mmlm.evals.given import Pass, plan_passes
from mmlm.evals.predictions import (
    Answered,
    Facts,
    Prediction,
    facts_of,
    headline_metric,
    score_rows,
    write_predictions,
)
from mmlm.evals.retrieval_rows import retrieval_rows
from mmlm.features.sample import Sample
from mmlm.progress import Progress
from mmlm.storage import sha256_json, write_json
from mmlm.tracking import NullTracker

RECIPE = 2
"""Bumped when the same config, shards and models would give other rows."""
CHUNK = 1024
"""Samples decoded at once."""


def evaluate(
    config: EvaluateConfig, shards: Artifact, models: dict[str, Artifact], *, out: Path, tracker: Any, story: str
) -> Artifact:
    """Score `models` (row name → checkpoint) and the baselines on the test records of `shards`, into folder `out`.

    Raises DataError when a split holds no record, ArtifactError when a checkpoint was made for other features.
    """
    work = artifacts.begin(out, "report", recipe=RECIPE, config=config, parents={"shards": shards, **models})
    if work.artifact:
        return work.artifact
    with (tracker or NullTracker()).run("evaluate", config, work) as run:
        return evaluate_on(open_bench(shards, models), config, work, run, shards=shards, models=models, story=story)


def evaluate_on(
    bench: Bench,
    config: EvaluateConfig,
    work: artifacts.Work,
    run: Any,
    *,
    shards: Artifact | None = None,
    models: Mapping[str, Artifact] | None = None,
    story: str = "",
) -> Artifact:
    """Everything after the opening: answer, score, draw, write, finish."""
    from mmlm.evals.report import write_report

    started = time.monotonic()
    answered: list[Answered] = []
    found: list[dict[str, Any]] = []
    baselines = Baselines(bench, config)
    test: list[Facts] = []
    for split in config.splits:
        reader = bench.read(split)
        facts = chosen_facts(reader, split, config.max_records)
        if not facts:
            raise DataError(
                f"the split `{split}` holds no record", cure="check the splits in scan.yaml, or evaluate.splits"
            )
        test += facts
        answered += answer_split(bench, config, reader, facts, baselines)
        found += retrieval_rows(bench.models, config, reader, facts, split)
    answering = time.monotonic() - started
    with threadpool_limits(1, user_api="blas"):  # narrow products: threads that wait for each other cost more
        rows = [row for one in answered for row in score_rows(one, config)] + found
    digest = test_digest(test)
    write_json(work.path / "scores.json", rows)
    write_predictions(work.path / "predictions.parquet", answered)
    files = write_report(
        work.path, story=story, config=config, bench=bench, answered=answered, rows=rows, digest=digest,
        models=models or {}, shards=shards,
    )  # fmt: skip
    run.metrics({metric_name(row): row["value"] for row in rows})
    for file in ["scores.json", "predictions.parquet", *files]:
        run.artifact(work.path / file)
    counts = {"records": len(test), "answers": sum(len(a.facts) for a in answered), "rows": len(rows)}
    counts["answering_seconds"] = round(answering)
    extra = {"headline": headline(rows, answered), "test_digest": digest, "story": story}
    return work.finish(counts=counts, digest_of=["scores.json"], extra=extra)


def chosen_facts(reader: Samples, split: str, most: int | None) -> list[Facts]:
    """The facts of a split's records, in its order; with `most`, those per task whose hashed id comes first."""
    facts = [facts_of(i, reader[i], split) for i in range(len(reader))]
    if most is None:
        return facts
    by_task: dict[str, list[Facts]] = {}
    for one in facts:
        by_task.setdefault(one.task, []).append(one)
    kept = {
        f.at
        for group in by_task.values()
        for f in sorted(group, key=lambda f: hashlib.sha256(f.id.encode()).digest())[:most]
    }
    return [f for f in facts if f.at in kept]


def present_modalities(facts: Sequence[Facts]) -> dict[str, frozenset[str]]:
    """task → the modalities, beside the question, that any of its records has."""
    present: dict[str, frozenset[str]] = {}
    for one in facts:
        present[one.task] = present.get(one.task, frozenset()) | frozenset(one.modalities)
    return present


def answer_split(
    bench: Bench, config: EvaluateConfig, reader: Samples, facts: list[Facts], baselines: Baselines
) -> list[Answered]:
    """Answers of every model and baseline under every set of given modalities."""
    present = present_modalities(facts)
    wanted = [[str(m) for m in entry] for entry in config.given] if config.given else None
    passes = plan_passes(present, wanted)
    found: list[Answered] = []
    with Progress("evaluate", None, "answers") as progress:
        for chosen in passes:
            taken = [f for f in facts if chosen.takes(f.task, f.modalities)]
            tables: dict[tuple[str, str], Answered] = {}
            for first in range(0, len(taken), CHUNK):
                part = taken[first : first + CHUNK]
                samples = [reader[f.at] for f in part]
                for model, predictions in _predict(bench, config, baselines, chosen, present, part, samples):
                    _collect(tables, bench, chosen, model, part, predictions)
                    progress.add(len(part), model)
            found += tables.values()
    return found


def _collect(
    tables: dict[tuple[str, str], Answered], bench: Bench, chosen: Pass,
    model: str, part: list[Facts], predictions: Sequence[Prediction | None],
) -> None:  # fmt: skip
    """Sort answers into one table per model and task."""
    for one, prediction in zip(part, predictions, strict=True):
        if prediction is not None:
            table = tables.get((model, one.task))
            if table is None:
                task = bench.spec.task(one.task)
                table = tables[model, one.task] = Answered(model, task, chosen.names[one.task], one.split, [], [])
            table.facts.append(one)
            table.predictions.append(prediction)


def _predict(
    bench: Bench, config: EvaluateConfig, baselines: Baselines, chosen: Pass,
    present: dict[str, frozenset[str]], part: list[Facts], samples: list[Sample],
) -> Iterator[tuple[str, list[Prediction | None]]]:  # fmt: skip
    """(model, one prediction or None per sample), for the models, then the baselines."""
    for name, model in bench.models.items():
        answers = model.answer(samples, batch_size=config.batch_size, given=chosen.kept, generation=config.generation)
        said = ["" if a.error else a.answer for a in answers]  # half a JSON document is no answer
        yield (
            name,
            [
                Prediction(a.label, a.label_scores, words, a.score, a.labels, a.number)
                for a, words in zip(answers, said, strict=True)
            ],
        )
    for name in baselines.names:
        predictions: list[Prediction | None] = [None] * len(samples)
        for task in sorted({f.task for f in part}):
            fitted = baselines.fitted(name, task, chosen.kept_of(present[task]))
            if fitted is not None:
                at = [i for i, f in enumerate(part) if f.task == task]
                for i, prediction in zip(at, fitted.predict([samples[i] for i in at]), strict=True):
                    predictions[i] = prediction
        yield name, predictions


def test_digest(facts: Sequence[Facts]) -> str:
    """Hash of which records were asked and what was expected; two reports are comparable when it is the same."""
    return sha256_json(sorted([f.split, f.task, f.id, f.label, f.expected] for f in facts))  # labels, numbers: as text


def metric_name(row: Mapping[str, Any]) -> str:
    """`teacher.digit.accuracy.image-audio`, with the split and the language where they are not `test` and `all`."""
    given = row["modalities"].removeprefix("text+").replace("+", "-")
    parts = [row["model"], row["task"], row["metric"], given]
    parts += [row["split"]] if row["split"] != "test" else []
    parts += [row["lang"]] if row["lang"] != "all" else []
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in ".".join(parts))


def headline(rows: Sequence[Mapping[str, Any]], answered: Sequence[Answered]) -> dict[str, Any]:
    """`{model: {task: row}}`: a task's one figure in its first row (everything given, unless the config
    names another set first), all languages, first split."""
    tasks = {a.task.name: a.task for a in answered}
    main: dict[str, str] = {}
    for one in answered:
        main.setdefault(one.task.name, one.modalities)
    split = answered[0].split
    found: dict[str, Any] = {}
    for row in rows:
        task = tasks[row["task"]]
        if (row["metric"], row["modalities"], row["lang"], row["split"]) == (
            headline_metric(task), main[task.name], "all", split,
        ):  # fmt: skip
            found.setdefault(row["model"], {})[task.name] = dict(row)
    return found
