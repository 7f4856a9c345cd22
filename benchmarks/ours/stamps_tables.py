"""The tables of `benchmarks.stamps`: accuracy beside majority and logistic regression, paired; recall beside chance and CCA."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ours.stamps import FOLDS, LANGUAGES, fold_of, read_all, training_set
from benchmarks.peers.hog_logistic import fit_and_say
from mmlm.artifacts import Artifact
from mmlm.evals.answer import Answerer
from mmlm.evals.baselines import Logistic, fit_majority
from mmlm.evals.config import LogisticConfig
from mmlm.evals.embed import embed
from mmlm.evals.flat import flat_rows
from mmlm.evals.retrieval import DEPTHS, LinearCca, chance, ranks, recalls
from mmlm.evals.statistics import Resamples, compare, interval
from mmlm.features.sample import Sample

GIVEN = {
    "picture": frozenset({"image"}), "spoken caption": frozenset({"audio"}), "written caption": frozenset({"context"}),
    "all three": frozenset({"image", "audio", "context"}),
}  # fmt: skip
STRENGTHS = LogisticConfig(strengths=[0.003, 0.03])
NAMES = {"image": "picture", "audio": "sound", "context": "caption"}


def tables(shards: Artifact, names: Artifact, out: Path) -> dict[str, Any]:
    samples = read_all(shards)
    found = {
        "category": categories(samples, out), "retrieval": retrieval(samples, out), "names": naming(read_all(names), out)
    }  # fmt: skip
    _head(
        [
            "category, five folds",
            "n",
            "model",
            "logistic regression",
            "HOG + colours, logistic",
            "majority",
            "model - logistic",
            "model - HOG + colours",
            "model - majority",
        ]
    )
    for row in found["category"]:
        cells = [row["given"], str(row["n"])]
        cells += [_cell(row[k]) if k in row else "" for k in ("model", "logistic", "hog", "majority")]
        cells += [_cell(row[k], True) if k in row else "" for k in ("over_logistic", "over_hog", "over_majority")]
        print("| " + " | ".join(cells) + " |")
    _head(["retrieval, test split", "n", *(f"R@{k}: model, CCA, chance" for k in DEPTHS)])
    for row in found["retrieval"]:
        cells = [f"{_cell(row[f'model@{k}'])}, {row[f'cca@{k}'][0]:.3f}, {row[f'chance@{k}']:.3f}" for k in DEPTHS]
        print(f"| {row['from']} → {row['to']} | {row['n']} | " + " | ".join(cells) + " |")
    _head(["naming a picture, test split", "n", *(f"R@{k}: model, chance" for k in DEPTHS)])
    for row in found["names"]:
        cells = [f"{_cell(row[f'model@{k}'])}, {row[f'chance@{k}']:.3f}" for k in DEPTHS]
        print(f"| {row['lang']} | {row['n']} | " + " | ".join(cells) + " |")
    return found


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows in the form of all benchmarks, with intervals: the model over the logistic regression, and over linear CCA."""
    rows = []
    for row in found["category"]:
        ours, peer = row["model"], row["logistic"]
        rows.append(_row(f"category from {row['given']}", "accuracy", ours, peer, "logistic regression", row["n"]))
        if "hog" in row:
            peer = row["hog"]
            rows.append(
                _row(f"category from {row['given']}", "accuracy", ours, peer, "HOG + colours, logistic", row["n"])
            )
    for row in found["retrieval"]:
        for k in DEPTHS:
            name = f"{row['from']} finds {row['to']}"
            rows.append(_row(name, f"recall@{k}", row[f"model@{k}"], row[f"cca@{k}"], "linear CCA", row["n"]))
    for row in found["names"]:
        by_lot = [row["chance@5"]]
        rows.append(_row(f"naming in {row['lang']}", "recall@5", row["model@5"], by_lot, "chance", row["n"]))
    return rows


def _row(name: str, unit: str, ours: list[float], peer: list[float], peer_name: str, n: int) -> dict[str, Any]:
    ratio = ours[0] / peer[0] if peer[0] else None
    return {
        "name": name, "unit": unit, "ours": ours[0], "low": ours[1], "high": ours[2], "peer": peer[0], "peer_name": peer_name,
        "ratio": ratio, "goal": None, "runs": 1, "n": n,
    }  # fmt: skip


def _head(cells: list[str]) -> None:
    print("\n| " + " | ".join(cells) + " |\n" + "|---" * len(cells) + "|")


def _cell(value: list[float], signed: bool = False) -> str:
    form = "{:+.3f} [{:+.3f}, {:+.3f}]" if signed else "{:.3f} [{:.3f}, {:.3f}]"
    return form.format(*value)


def categories(samples: list[Sample], out: Path) -> list[dict[str, Any]]:
    """A row for each set of given modalities, over the records that have any of it."""
    right: dict[str, dict[str, list[float]]] = {name: {} for name in GIVEN}
    groups: dict[str, list[str]] = {name: [] for name in GIVEN}
    for fold in range(FOLDS):
        train = training_set(f"fold-{fold}", samples)
        held = [s for s in samples if fold_of(s) == fold]
        answerer = Answerer(out / f"fold-{fold}")
        usual = fit_majority([s.label for s in train], [])
        for name, kept in GIVEN.items():
            asked = [s for s in held if not kept.isdisjoint(s.modalities)]
            fitted = _logistic(out / f"fold-{fold}", name, kept, train, asked, answerer)
            said: dict[str, Sequence[str | None]] = {
                "model": [a.label for a in answerer.answer(asked, given=kept)], "logistic": fitted,
                "majority": [usual.label] * len(asked),
            }  # fmt: skip
            if kept == GIVEN["picture"]:
                said["hog"] = fit_and_say(
                    [s.images[0] for s in train], [s.label or "" for s in train],
                    np.array([hash_fifth(s) == 0 for s in train]), [s.images[0] for s in asked],
                )  # fmt: skip
            for model, labels in said.items():
                right[name].setdefault(model, []).extend(
                    float(label == s.label) for label, s in zip(labels, asked, strict=True)
                )
            groups[name] += [s.group for s in asked]
    rows = []
    for name in GIVEN:
        resamples = Resamples(len(groups[name]), groups[name], 2000, 0)
        row: dict[str, Any] = {"given": name, "n": len(groups[name])}
        for model, values in right[name].items():
            v = np.array(values, np.float32)
            got = interval(lambda w, v=v: (w @ v) / w.sum(1), resamples, 0.95)  # type: ignore[misc]
            row[model] = [got.value, got.low, got.high]
        for other in right[name].keys() - {"model"}:
            paired = compare(right[name][other], right[name]["model"], groups[name])
            row[f"over_{other}"] = [paired[k] for k in ("difference", "low", "high")]
        rows.append(row)
    return rows


def _logistic(
    folder: Path, name: str, kept: frozenset[str], train: list[Sample], asked: list[Sample], answerer: Answerer
) -> list[str | None]:
    """What the better of two strengths, by a fifth of the training groups, says; kept in a file."""
    usable = [s for s in train if not kept.isdisjoint(s.modalities)]
    file = folder / f"logistic-{name.replace(' ', '-')}-{_digest(usable, asked, kept, answerer)}.json"
    if not file.exists():
        inner = [s for s in usable if hash_fifth(s) == 0]
        rest = [s for s in usable if hash_fifth(s) != 0]
        model = Logistic(kept, answerer.spec, answerer.tokenizer.decode).fit(rest, inner, STRENGTHS)
        file.write_text(json.dumps([p.label for p in model.predict(asked)]))
    said: list[str | None] = json.loads(file.read_text())
    return said


def _digest(train: list[Sample], asked: list[Sample], kept: frozenset[str], answerer: Answerer) -> str:
    """Of all that a regression is fitted on and asked: it changes when flat rows are made otherwise."""
    made = hashlib.sha256(json.dumps([STRENGTHS.strengths, [(s.label, s.group) for s in train]]).encode())
    for samples in (train, asked):
        made.update(flat_rows(samples, kept, answerer.spec, answerer.tokenizer.decode).tobytes())
    return made.hexdigest()[:12]


def hash_fifth(sample: Sample) -> int:
    """Another cut into fifths than the folds."""
    return sum(sample.group.encode()) % 5


def retrieval(samples: list[Sample], out: Path) -> list[dict[str, Any]]:
    answerer = Answerer(out / "retrieval")
    held = [s for s in samples if s.split == "test" and set(NAMES) <= set(s.modalities)]
    train = [s for s in samples if s.split != "test" and set(NAMES) <= set(s.modalities)]
    groups = [s.group for s in held]
    vectors = {m: embed(answerer, held, frozenset({m})) for m in NAMES}
    flat = {
        m: [flat_rows(part, frozenset({m}), answerer.spec, answerer.tokenizer.decode) for part in (train, held)]
        for m in NAMES
    }
    resamples = Resamples(len(groups), groups, 2000, 0)
    rows = []
    for a, b in itertools.permutations(NAMES, 2):
        row: dict[str, Any] = {"from": NAMES[a], "to": NAMES[b], "n": len(held)}
        cca = LinearCca(components=64, size=24, ridge=0.05).fit(flat[a][0], flat[b][0])
        for model, q, c in (
            ("model", vectors[a], vectors[b]),
            ("cca", cca.transform(0, flat[a][1]), cca.transform(1, flat[b][1])),
        ):
            for name, score in recalls(ranks(q, c, groups, groups)).items():
                got = interval(score, resamples, 0.95, share=True)
                row[f"{model}@{name.removeprefix('recall@')}"] = [got.value, got.low, got.high]
        row |= {f"chance@{k}": chance(groups, groups, k) for k in DEPTHS}
        rows.append(row)
    return rows


def naming(samples: list[Sample], out: Path) -> list[dict[str, Any]]:
    """For each language: the picture is the query, the names of all test things in that language are the candidates."""
    answerer = Answerer(out / "names")
    rows = []
    for lang in LANGUAGES:
        held = [
            s for s in samples if s.split == "test" and s.lang == lang and {"image", "context"} <= set(s.modalities)
        ]
        groups = [s.group for s in held]
        pictures, names = (embed(answerer, held, frozenset({m})) for m in ("image", "context"))
        resamples = Resamples(len(groups), groups, 2000, 0)
        row: dict[str, Any] = {"lang": lang, "n": len(held)}
        for name, score in recalls(ranks(pictures, names, groups, groups)).items():
            got = interval(score, resamples, 0.95, share=True)
            row[f"model@{name.removeprefix('recall@')}"] = [got.value, got.low, got.high]
        rows.append(row | {f"chance@{k}": chance(groups, groups, k) for k in DEPTHS})
    return rows
