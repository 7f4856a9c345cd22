"""The report of an evaluation: plots as files, and `report.html`, which holds everything and needs nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmlm.artifacts import Artifact
from mmlm.evals import page, plots
from mmlm.evals.bench import Bench, Samples
from mmlm.evals.config import EvaluateConfig
from mmlm.evals.predictions import (
    Answered,
    ClassView,
    Facts,
    Prediction,
    class_view,
    headline_metric,
    is_correct,
)
from mmlm.features.sample import Sample
from mmlm.features.spec import SPECIAL_TOKENS, TaskSpec
from mmlm.storage import write_bytes

Row = Mapping[str, Any]
COLUMNS = (
    "accuracy", "subset_accuracy", "f1_micro", "f1_macro", "roc_auc", "calibration_error", "exact_match", "chrf", "bleu",
    "r2", "mae", "rmse", "recall@1", "recall@5", "recall@10",
)  # fmt: skip
TITLES = {
    "f1_macro": "F1 (macro)",
    "f1_micro": "F1 (micro)",
    "subset_accuracy": "whole set right",
    "r2": "R²",
    "mae": "MAE",
    "rmse": "RMSE",
    "roc_auc": "ROC-AUC",
    "chrf": "chrF",
    "bleu": "BLEU",
    "calibration_error": "calibr. error",
}
MISTAKES = 10
HOW = """<ul class="soft">
<li>Intervals are percentile bootstraps over the records, or over whole groups where records share one; where every
record agrees, Wilson's bound. Resamples and confidence stand above.</li>
<li>The question is always given; what else is given is named. Records with nothing of what is named are left out, so
n differs. Languages with fewer records than the least n have no row of their own.</li>
<li>Classes come from the class head; a class that training never saw counts as wrong. ROC-AUC is one class against
the rest, averaged. Exact match compares after Unicode NFKC, without spaces at the ends and marks such as 。 or . at
the end; upper and lower case differ. chrF and BLEU are sacrebleu's, pooled over records, 0 to 100; BLEU has effective
order and cuts words by each record's language.</li>
<li>Where several classes may hold at once, each has a probability of its own and holds above one half. R² is the share
of the variance of these records that is explained; MAE and RMSE are in the number's own unit.</li>
<li><b>majority</b> always gives the most frequent training answer: each class that more than half of the records have
where several may hold, the mean of numbers. <b>logistic</b> (<b>ridge</b> for numbers) is a linear model of the same
stored features: small pictures with gradient histograms, mean, deviation and maximum of each mel bin, fields, hashed
characters.</li></ul>"""


def write_report(
    folder: Path,
    *,
    story: str,
    config: EvaluateConfig,
    bench: Bench,
    answered: Sequence[Answered],
    rows: Sequence[Row],
    digest: str,
    models: Mapping[str, Artifact],
    shards: Artifact | None,
) -> list[str]:
    """Draw and write everything into `folder`; returns the names of the files, `report.html` first."""
    split = answered[0].split
    shown = [a for a in answered if a.split == split]
    tasks = {a.task.name: a.task for a in shown}
    files: dict[str, Path] = {}
    reader = bench.read(split)
    body = _head(story, config, shown, rows, digest, models, split)
    for name, task in tasks.items():
        tables = [a for a in shown if a.task.name == name]
        suffix = "" if len(tasks) == 1 else "-" + re.sub(r"[^A-Za-z0-9_-]+", "_", name)
        drawn = draw_task(folder, suffix, task, tables, rows)
        files |= drawn
        body += _task(task, tables, [r for r in rows if r["split"] == split and r["task"] == name], drawn, suffix)
        body += _examples(tables, bench, reader, config.examples)
    body += _training(folder, models, files)
    body += _rest(rows, models, shards)
    title = f"{story or 'mmlm'}: evaluation"
    write_bytes(folder / "report.html", page.page(title, body).encode())
    return ["report.html", *(path.name for path in files.values())]


def main_given(tables: Sequence[Answered]) -> str:
    """The first row name of a task: everything together, unless the config names another set first."""
    return tables[0].modalities


def draw_task(
    folder: Path, suffix: str, task: TaskSpec, tables: Sequence[Answered], rows: Sequence[Row]
) -> dict[str, Path]:
    """PNG files of one task: name → path."""
    split, everything = tables[0].split, main_given(tables)
    here = [r for r in rows if r["task"] == task.name and r["lang"] == "all" and r["split"] == split]
    full = [t for t in tables if t.modalities == everything]

    def values(metric: str) -> dict[tuple[str, str], float]:
        return {(r["model"], r["modalities"]): r["value"] for r in here if r["metric"] == metric}

    drawn: dict[str, Path | None] = {}
    metric = headline_metric(task)
    bars = [r for r in here if r["metric"] == metric]
    if bars:
        drawn["modalities"] = plots.draw_modalities(bars, metric, folder / f"modalities{suffix}.png")
    view = class_view(full[0])
    if view is not None:
        if len(view.classes) <= plots.MAX_CLASSES:
            drawn["confusion"] = plots.draw_confusion(view, folder / f"confusion{suffix}.png")
        drawn["roc"] = plots.draw_roc(full, values("roc_auc"), folder / f"roc{suffix}.png")
        drawn["reliability"] = plots.draw_reliability(
            full, values("calibration_error"), folder / f"reliability{suffix}.png"
        )
    return {f"{name}{suffix}": path for name, path in drawn.items() if path is not None}


def _head(
    story: str, config: EvaluateConfig, tables: Sequence[Answered], rows: Sequence[Row], digest: str,
    models: Mapping[str, Artifact], split: str,
) -> list[str]:  # fmt: skip
    ids = {(f.task, f.id) for t in tables for f in t.facts}
    b = config.bootstrap
    tiles = []
    for task in {t.task.name: t.task for t in tables}.values():
        everything = main_given([t for t in tables if t.task.name == task.name])
        for r in rows:
            if (r["task"], r["metric"], r["modalities"], r["lang"], r["split"]) == (
                task.name, headline_metric(task), everything, "all", split,
            ):  # fmt: skip
                tiles.append(
                    page.tile(
                        f"{r['value']:.3f}",
                        [f"{r['model']} · {r['task']}", f"{_title(r['metric'])} [{r['low']:.3f}, {r['high']:.3f}]"],
                    )
                )
    sizes = ", ".join(
        f"{name} {artifact.counts['parameters']:,} parameters"
        for name, artifact in models.items()
        if "parameters" in artifact.counts
    )
    return [
        f"<h1>{escape(story or 'mmlm')}: evaluation</h1>",
        f'<p class="soft">{len(ids):,} records of the split <code>{escape(split)}</code>. '
        f"{b.samples:,} resamples, {100 * b.confidence:g} % intervals. "
        + (f"{escape(sizes)}. " if sizes else "")
        + f"Test-set digest <code>{digest[:16]}</code>.</p>",
        '<div class="tiles">' + "".join(tiles) + "</div>",
    ]


def _task(
    task: TaskSpec, tables: Sequence[Answered], rows: Sequence[Row], drawn: Mapping[str, Path], suffix: str
) -> list[str]:
    body = [f"<h2>Task {escape(task.name)}</h2>", _score_table(rows)]
    given = main_given(tables).replace("+", " + ")
    captions = {
        "modalities": "Each model with what is given to it.",
        "roc": f"ROC curves, given {given}; the mean over the classes.",
        "reliability": f"Confidence against being right, given {given}; the size of a dot is its share of the records.",
        "confusion": f"Answers of {tables[0].model}, given {given}, counted.",
    }
    figures = []
    for name, caption in captions.items():
        path = drawn.get(name + suffix)
        if path is not None:
            figures.append(page.figure(path.read_bytes(), f"{name} of task {task.name}", caption))
    body.append('<div class="plots">' + "".join(figures) + "</div>")
    view = class_view(tables[0])
    if view is not None:
        body += _classes(view)
    return body + _languages(rows)


def _title(metric: str) -> str:
    return TITLES.get(metric, metric.replace("_", " "))


def _cell(row: Row | None) -> str:
    if row is None:
        return '<span class="soft">–</span>'
    digits = 1 if row["metric"] in ("chrf", "bleu") else 3
    value, low, high = (f"{row[k]:.{digits}f}" for k in ("value", "low", "high"))
    return f"{value}<small>[{low}, {high}]</small>"


def _score_table(rows: Sequence[Row]) -> str:
    rows = [r for r in rows if r["lang"] == "all"]
    by_key = {(r["modalities"], r["model"], r["metric"]): r for r in rows}
    metrics = [m for m in COLUMNS if any(r["metric"] == m for r in rows)]
    if "accuracy" in metrics:
        metrics.remove("f1_micro")  # the same, where a record has just one class
    lines = []
    for given, model in dict.fromkeys((r["modalities"], r["model"]) for r in rows):
        n = max(r["n"] for r in rows if (r["modalities"], r["model"]) == (given, model))
        cells = [_cell(by_key.get((given, model, m))) for m in metrics]
        lines.append([escape(given.replace("+", " + ")), escape(model), f"{n:,}", *cells])
    return page.table(["given", "model", "n", *(_title(m) for m in metrics)], lines, numbers_from=2, group_by=0)


def _languages(rows: Sequence[Row]) -> list[str]:
    """Scores by language in the first row that has any; only when some language is large enough."""
    spoken = [r for r in rows if r["lang"] != "all"]
    if not spoken:
        return []
    given = spoken[0]["modalities"]
    spoken = [r for r in spoken if r["modalities"] == given]
    by_key = {(r["lang"], r["model"], r["metric"]): r for r in spoken}
    metrics = [m for m in ("accuracy", "exact_match", "chrf", "bleu") if any(r["metric"] == m for r in spoken)]
    lines = []
    for lang, model in dict.fromkeys((r["lang"], r["model"]) for r in sorted(spoken, key=lambda r: r["lang"])):
        n = max(r["n"] for r in spoken if (r["lang"], r["model"]) == (lang, model))
        cells = [_cell(by_key.get((lang, model, m))) for m in metrics]
        lines.append([escape(lang), escape(model), f"{n:,}", *cells])
    head = ["language", "model", "n", *(_title(m) for m in metrics)]
    table = page.table(head, lines, numbers_from=2, group_by=0)
    return [f"<h3>By language, given {escape(given.replace('+', ' + '))}</h3>", _fold(table, len(lines))]


def _fold(table: str, lines: int) -> str:
    """Long tables stay closed until they are wanted."""
    return table if lines <= 24 else f"<details><summary>{lines} rows</summary>{table}</details>"


def _classes(view: ClassView) -> list[str]:
    """What the numbers in a plot stand for, and the commonest mistakes."""
    hidden = [(i, c) for i, c in enumerate(view.classes) if plots.plain(c, i) != c]
    body = []
    if hidden:
        names = " · ".join(f"#{i} {escape(c)}" for i, c in hidden[:200])
        body.append(f'<p class="soft">Classes in the plots: {names}</p>')
    wrong = Counter(
        (int(t), int(g)) for t, g in zip(view.truth, view.given, strict=True) if t != g and g >= 0
    )  # fmt: skip
    if wrong:
        pairs = [
            [escape(view.classes[t]), escape(view.classes[g]), f"{count:,}"]
            for (t, g), count in sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:MISTAKES]
        ]
        body += ["<h3>Commonest mistakes</h3>", page.table(["true", "given", "records"], pairs, numbers_from=2)]
    return body


def _examples(tables: Sequence[Answered], bench: Bench, reader: Samples, most: int) -> list[str]:
    """Questions with their media, answers and verdicts of the first model, wrong ones first."""
    if not most:
        return []
    table = next(t for t in tables if t.modalities == main_given(tables))
    pairs = sorted(
        zip(table.facts, table.predictions, strict=True), key=lambda fp: (is_correct(*fp), -_gravity(*fp), fp[0].id)
    )
    wrong = sum(not is_correct(f, p) for f, p in pairs)
    # two thirds mistakes, so that a page of a bad model also shows what it can do
    chosen = pairs[: min(wrong, most - most // 3)]
    rest = pairs[wrong:]
    step = max(1, len(rest) // max(1, most - len(chosen)))
    chosen = [*chosen, *rest[::step][: most - len(chosen)]]
    cards = [_example(reader[f.at], f, p, bench) for f, p in chosen]
    return [
        f"<h3>Questions and answers of {escape(table.model)}</h3>",
        f'<p class="soft">{wrong:,} of {len(pairs):,} are wrong; the surest of them come first. '
        "Right and wrong go by the class where the task has classes.</p>",
        '<div class="examples">' + "".join(cards) + "</div>",
    ]


def _gravity(facts: Facts, prediction: Prediction) -> float:
    """How sure an answer is; of a number, how far off it is."""
    if facts.number is not None and prediction.number is not None:
        return abs(prediction.number - facts.number)
    return prediction.score or 0.0


def _example(sample: Sample, facts: Facts, prediction: Any, bench: Bench) -> str:
    media = [page.thumbnail("picture", plots.picture_png(picture)) for picture in sample.images[:2]]
    media += [page.thumbnail("sound", plots.sound_png(sound)) for sound in sample.sounds[:1]]
    question, context = prompt_texts(sample, bench)
    lines = [("question", question)]
    if context:
        lines.append(("context", context))
    if sample.fields:
        lines.append(("fields", ", ".join(f"{k} {v}" for k, v in sorted(sample.fields.items()) if v is not None)[:300]))
    if prediction.label is not None and prediction.label != prediction.answer:
        lines.append(("class", f"{prediction.label}, expected {facts.label}"))
    if prediction.answer is not None:
        lines.append(("answer", prediction.answer or "(nothing)"))
    lines.append(("expected", facts.expected or facts.label or ""))
    right = is_correct(facts, prediction)
    verdict = f"{'right' if right else 'wrong'}, confidence {prediction.score or 0.0:.2f}"
    if facts.number is not None and prediction.number is not None:
        verdict = f"off by {prediction.number - facts.number:+.4g}"
    items = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in lines)
    return (
        f'<div class="example{"" if right else " wrong"}"><div class="media">{"".join(media)}</div>'
        f'<div class="verdict">{verdict}</div>'
        f'<dl>{items}</dl><div class="soft"><code>{escape(facts.id)}</code></div></div>'
    )


def prompt_texts(sample: Sample, bench: Bench) -> tuple[str, str]:
    """(question, context) of a sample as text, without marks and slots."""
    special = len(SPECIAL_TOKENS)
    inside = {i for first, last in sample.context_spans for i in range(first, last)}
    tokens = [(i, int(t)) for i, t in enumerate(sample.tokens[: sample.answer_at]) if int(t) >= special]
    question = bench.tokenizer.decode([t for i, t in tokens if i not in inside])
    context = bench.tokenizer.decode([t for i, t in tokens if i in inside])
    return question.strip()[:600], context.strip()[:600]


def _training(folder: Path, models: Mapping[str, Artifact], files: dict[str, Path]) -> list[str]:
    figures = []
    for name, artifact in models.items():
        curves = plots.read_curves(artifact.path)
        if curves:
            files[f"training-{name}"] = path = plots.draw_training(curves, folder / f"training-{name}.png")
            figures.append(page.figure(path.read_bytes(), f"training of {name}", name))
    return ["<h2>Training</h2>", '<div class="plots">' + "".join(figures) + "</div>"] if figures else []


def _rest(rows: Sequence[Row], models: Mapping[str, Artifact], shards: Artifact | None) -> list[str]:
    head = ["model", "task", "metric", "given", "language", "split", "n", "value", "low", "high"]
    keys = ["model", "task", "metric", "modalities", "lang", "split"]
    lines = [
        [*(escape(str(r[k])) for k in keys), f"{r['n']:,}", *(f"{r[k]:.4g}" for k in ("value", "low", "high"))]
        for r in rows
    ]
    nouns = {**({"shards": shards} if shards else {}), **models}
    made = "".join(f"<li>{escape(name)} <code>{a.digest[:16]}</code></li>" for name, a in nouns.items())
    return [
        "<h2>All scores and how they were measured</h2>",
        HOW,
        f"<details><summary>{len(rows)} rows</summary>{page.table(head, lines, numbers_from=6)}</details>",
        f"<p class='soft'>Made from:</p><ul class='soft'>{made}</ul>" if made else "",
    ]
