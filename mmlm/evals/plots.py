"""Plots of a report, as PNG. They hold ASCII only, since many machines lack a Chinese font; the HTML has names."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from mmlm.evals import scores
from mmlm.evals.predictions import Answered, ClassView, class_view
from mmlm.storage import write_bytes

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#555555")
"""Okabe & Ito 2008: told apart with every kind of colour vision."""
GREY = ("#999999", "#C4C4C4", "#C4C4C4")
BASELINES = ("majority", "logistic", "ridge")
MAX_CLASSES = 30
"""More classes than this make no readable matrix: the report then lists the commonest mistakes only."""


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Any]]:
    style: dict[Any, Any] = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "figure.constrained_layout.use": True, "savefig.facecolor": "white", "text.parse_math": False,
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(width, height), dpi=110)
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": ""})
    write_bytes(path, buffer.getvalue())
    return path


def plain(label: str, number: int) -> str:
    """A label as it can stand in a plot: itself when it is short ASCII, else `#number`, explained in the HTML."""
    return label if label.isascii() and label.isprintable() and len(label) <= 18 else f"#{number}"


def colours_of(models: Iterable[str]) -> dict[str, str]:
    ordered = list(dict.fromkeys(models))
    trained = [m for m in ordered if m not in BASELINES]
    found = {m: COLOURS[i % len(COLOURS)] for i, m in enumerate(trained)}
    return {m: found.get(m) or GREY[BASELINES.index(m)] for m in ordered}


def draw_modalities(rows: Sequence[Mapping[str, Any]], metric: str, path: Path) -> Path:
    """Bars with intervals: one group per set of given modalities, one bar per model. `rows` are of one task."""
    givens = list(dict.fromkeys(r["modalities"] for r in rows))
    colours = colours_of(r["model"] for r in rows)
    height = max(3.0, 1.3 + 0.22 * len(rows) + 0.2 * len(givens))
    with _figure(4.8, height) as (figure, axes):
        at, ticks, seen = 0.0, [], set()
        for given in givens:
            here = [r for r in rows if r["modalities"] == given]
            ticks.append(at + (len(here) - 1) / 2)
            for row in here:
                model = row["model"]
                error = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
                label = model if model not in seen else None
                axes.barh(at, row["value"], 0.82, color=colours[model], label=label)
                axes.errorbar(row["value"], at, xerr=error, fmt="none", ecolor="black", elinewidth=1.1, capsize=2.5)
                axes.text(row["high"] + 0.012, at, f"{row['value']:.3f}", va="center", fontsize=8)
                seen.add(model)
                at += 1
            at += 0.9
        axes.set_yticks(ticks, [g.removeprefix("text+").replace("+", " + ") for g in givens])
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(0, 1.16), xlabel=f"{metric.replace('_', ' ')} (lines: confidence interval)")
        axes.set_xticks(np.arange(0, 1.01, 0.2))
        axes.invert_yaxis()
        axes.grid(axis="x", color="#e3e3e3")
        figure.legend(
            loc="outside upper left", ncols=min(len(seen), 4), columnspacing=1.2, handlelength=1.2, frameon=False
        )
        return _save(figure, path)


def draw_confusion(view: ClassView, path: Path) -> Path:
    """True classes in rows, given ones in columns; the colour is the share of the true class."""
    k = len(view.classes)
    counts = scores.confusion(view.truth, view.given, k)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(3.9, min(1.6 + 0.3 * k, 10))
    with _figure(side + 0.9, side) as (figure, axes):
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        names = [plain(c, i) for i, c in enumerate(view.classes)]
        turned = max(len(n) for n in names) > 3
        axes.set_xticks(range(k), names, rotation=90 if turned else 0)
        axes.set_yticks(range(k), names)
        axes.set(xlabel="given class", ylabel="true class")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        for i, j in zip(*np.nonzero(counts), strict=True):
            shade = "white" if shares[i, j] > 0.55 else "black"
            axes.text(j, i, f"{counts[i, j]}", ha="center", va="center", color=shade, fontsize=8 if k <= 16 else 6)
        figure.colorbar(image, label="share of the true class", shrink=0.8)
        return _save(figure, path)


def draw_roc(tables: Sequence[Answered], areas: Mapping[tuple[str, str], float], path: Path) -> Path | None:
    """ROC curves of one task with everything given: the mean of one class against the rest, or two classes'."""
    colours = colours_of(t.model for t in tables)
    grid = np.linspace(0, 1, 201)
    with _figure(4.8, 4.3) as (figure, axes):
        drawn = 0
        for table in tables:
            view = class_view(table)
            if view is None or not len(view.scores) or table.model == "majority":
                continue
            curves = []
            for k in [1] if view.scores.shape[1] == 2 else range(view.scores.shape[1]):
                positive = view.truth == k
                if positive.any() and not positive.all():
                    false, true = scores.roc_curve(positive, view.scores[:, k])
                    curves.append((false, true))
            if not curves:
                continue
            area = areas.get((table.model, table.modalities))
            label = f"{table.model} (area {area:.3f})" if area is not None else table.model
            if len(curves) == 1:
                axes.plot(*curves[0], color=colours[table.model], label=label, lw=1.6)
            else:
                mean = np.mean([np.interp(grid, f, t) for f, t in curves], axis=0)
                axes.plot(np.append(0, grid), np.append(0, mean), color=colours[table.model], label=label, lw=1.6)
            drawn += 1
        if not drawn:
            return None
        axes.plot([0, 1], [0, 1], color="#aaaaaa", lw=1, ls=":", label="chance")
        axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
        axes.set_aspect("equal")
        axes.grid(color="#eeeeee")
        axes.legend(loc="lower right", frameon=False)
        return _save(figure, path)


def draw_reliability(tables: Sequence[Answered], errors: Mapping[tuple[str, str], float], path: Path) -> Path | None:
    """Share of right answers against confidence, in ten bins; the diagonal is a model that knows what it knows."""
    colours = colours_of(t.model for t in tables)
    edges = np.linspace(0, 1, 11)
    with _figure(4.8, 4.3) as (figure, axes):
        drawn = 0
        for table in tables:
            view = class_view(table)
            if view is None or not len(view.scores) or table.model == "majority":
                continue
            sure, right = view.scores.max(1), view.truth == view.given
            bins = np.clip(np.digitize(sure, edges) - 1, 0, 9)
            there = [b for b in range(10) if (bins == b).sum() >= 5]
            points = [(sure[bins == b].mean(), right[bins == b].mean(), (bins == b).sum()) for b in there]
            if not points:
                continue
            x, y, n = (np.array(v) for v in zip(*points, strict=True))
            error = errors.get((table.model, table.modalities))
            label = f"{table.model} (error {error:.3f})" if error is not None else table.model
            axes.plot(x, y, color=colours[table.model], label=label, lw=1.4)
            axes.scatter(x, y, s=12 + 90 * n / n.sum(), color=colours[table.model], zorder=3)
            drawn += 1
        if not drawn:
            return None
        axes.plot([0, 1], [0, 1], color="#aaaaaa", lw=1, ls=":")
        axes.set(xlabel="confidence of the answer", ylabel="share of right answers", xlim=(0, 1.02), ylim=(0, 1.03))
        axes.set_aspect("equal")
        axes.grid(color="#eeeeee")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        return _save(figure, path)


def read_curves(checkpoint: Path) -> dict[str, list[tuple[int, float]]]:
    """Loss-like curves of a checkpoint's `metrics.jsonl`: name → (step, value)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    try:
        lines = (checkpoint / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        for name, value in row.get("metrics", {}).items():
            if "loss" in name and isinstance(value, int | float) and np.isfinite(value):
                curves.setdefault(name, []).append((int(row.get("step") or 0), float(value)))
    return {name: points for name, points in curves.items() if len(points) > 1}


def draw_training(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> Path:
    with _figure(4.8, 3.2) as (figure, axes):
        for i, (name, points) in enumerate(curves.items()):
            axes.plot(*zip(*points, strict=True), color=COLOURS[i % len(COLOURS)], lw=1.3, label=plain(name, i))
        axes.set(xlabel="step", ylabel="loss")
        axes.set_ylim(bottom=0)
        axes.grid(color="#eeeeee")
        axes.legend(frameon=False)
        return _save(figure, path)


def picture_png(picture: np.ndarray) -> bytes:
    """(H, W, C) uint8 → PNG bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, "PNG")
    return buffer.getvalue()


def sound_png(mel: np.ndarray) -> bytes:
    """(frames, mels) log-mel → PNG bytes of a spectrogram: time to the right, pitch upwards."""
    values = mel.astype(np.float32).T[::-1]
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / max(high - low, 1e-6)
    colours = matplotlib.colormaps["magma"](scaled, bytes=True)[..., :3]
    return picture_png(np.ascontiguousarray(colours))
