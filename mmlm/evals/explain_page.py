"""An explanation for people and programs: one HTML file, JSON, and coloured words in a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from mmlm.evals import overlays, page
from mmlm.evals.explain import KINDS, Explanation, FieldPart, PicturePart, SoundPart, TextPart
from mmlm.storage import write_bytes, write_json

HTML, JSON = "explanation.html", "explanation.json"
STYLE = """<style>
.said { font-size: 1.25rem; line-height: 2.1; max-width: none; }
.said span { padding: .2rem .1rem; border-radius: 3px; color: #14181e; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: .35rem .8rem; max-width: 40rem; align-items: center; }
.bars i { display: block; height: .9rem; border-radius: 2px; } figure img { width: 100%; }
.plots { grid-template-columns: 1fr; }
</style>"""


def as_json(explained: Explanation) -> dict[str, Any]:
    """All figures. Attributions are nats, or those of a number as it is; `patches` are rows of a picture, `rest` what falls on an
    encoder's tokens of the whole picture, `frames` one after the other."""
    parts: list[dict[str, Any]] = []
    for part in explained.parts:
        row: dict[str, Any] = {"kind": KINDS[type(part)], "attribution": _figure(part.attribution)}
        if isinstance(part, TextPart):
            row |= {"text": part.text, "tokens": part.tokens}
        elif isinstance(part, FieldPart):
            row |= {"name": part.name, "value": part.value}
        elif isinstance(part, PicturePart):
            row |= {"patches": _figures(part.patches), "rest": _figure(part.rest)}
        else:
            row |= {"frames": _figures(part.frames), "frame_seconds": part.frame_seconds}
        row["rollout"] = None if part.rollout is None else _figures(np.asarray(part.rollout))
        parts.append(row)
    return {
        "answer": explained.answer,
        "of": explained.of,
        "score": _figure(explained.score),
        "start": _figure(explained.start),
        "difference": _figure(explained.score - explained.start),
        "by_modality": {name: _figure(value) for name, value in explained.by_modality.items()},
        "completeness": {
            "complete": explained.complete, "delta": _figure(explained.delta),
            "tolerance": _figure(explained.tolerance), "steps": explained.steps,
        },
        "parts": parts,
    }  # fmt: skip


def _figure(value: float) -> float:
    return round(float(value), 6)


def _figures(values: np.ndarray) -> Any:
    return np.round(values.astype(np.float64), 6).tolist()


def sentences(explained: Explanation) -> list[str]:
    """What was found, in words."""
    difference = explained.score - explained.start
    if explained.of == "number":
        first = f"the number is {explained.score:.6g} here, and {explained.start:.6g} where the question says nothing"
    else:
        what = {"label": "the class", "labels": "the set of classes"}.get(explained.of, "the answer")
        first = (
            f"{what} {explained.answer!r} has probability {math.exp(explained.score):.3f} here, and "
            f"{math.exp(explained.start):.2g} where the question says nothing"
        )
    kept = "they do" if explained.complete else "they do NOT: trust them only roughly"
    lines = [
        f"{first}: {difference:+.3f} {explained.unit}".rstrip(),
        f"attributions must add up to that within {explained.tolerance:.3f}: {kept} "
        f"(off by {explained.delta:+.4f} after {explained.steps} steps)",
    ]
    if not explained.rolled_out:
        lines.append("no roll-out: this model has no attention that could be followed from layer to layer")
    return lines


def words(explained: Explanation) -> Text:
    """For a terminal, coloured where it can."""
    text = Text()
    for line in sentences(explained):
        text.append(line + "\n")
    for name, value in explained.by_modality.items():
        text.append(f"  {name:<8}{value:+.3f}\n")
    said = [part for part in explained.parts if isinstance(part, TextPart)]
    scale = overlays.largest(np.array([part.attribution for part in said] or [0.0]))
    for word in said:
        text.append(word.text, style=f"#14181e on {_background(word.attribution, scale)}")
    if said:
        text.append("\n")
    for part in explained.parts:
        if isinstance(part, FieldPart):
            text.append(f"  {part.name} = {_value(part.value)}: {part.attribution:+.3f}\n")
        elif isinstance(part, PicturePart):
            row, column = np.unravel_index(np.abs(part.patches).argmax(), part.patches.shape)
            text.append(
                f"  picture {part.attribution:+.3f}, most of all its patch in row {row + 1}, column {column + 1} "
                f"({part.patches[row, column]:+.3f})\n"
            )
        elif isinstance(part, SoundPart):
            frame = int(np.abs(part.frames).argmax()) if len(part.frames) else 0
            text.append(
                f"  sound {part.attribution:+.3f}, most of all at {frame * part.frame_seconds:.2f} s "
                f"({part.frames[frame]:+.3f})\n"
            )
    return text


def _background(value: float, scale: float) -> str:
    """White to orange (for) or blue (against); pale enough for dark letters."""
    share = 0.75 * min(abs(value) / scale, 1.0)
    colour = overlays.FOR if value >= 0 else overlays.AGAINST
    return "#" + "".join(f"{round(255 + (c - 255) * share):02x}" for c in colour)


def _value(value: float | str | None) -> str:
    return "missing" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def write(explained: Explanation, question: Mapping[str, Any], folder: Path) -> Path:
    """Write the page, the JSON and the pictures into `folder`. Returns the page."""
    write_json(folder / JSON, as_json(explained))
    body = [
        STYLE,
        f"<h1>Why {escape(explained.answer)}?</h1>",
        *(f"<p class='soft'>{escape(line)}</p>" for line in sentences(explained)),
        "<p>Orange speaks for the answer, blue against it.</p>",
        "<h2>By modality</h2>",
        _bars(explained.by_modality),
    ]
    said = [part for part in explained.parts if isinstance(part, TextPart)]
    if said:
        body += ["<h2>Text</h2>", _said(said, explained.unit)]
    fields = [part for part in explained.parts if isinstance(part, FieldPart)]
    if fields:
        body += ["<h2>Fields</h2>", _bars({f"{p.name} = {_value(p.value)}": p.attribution for p in fields})]
    figures = []
    for number, part in enumerate(p for p in explained.parts if isinstance(p, PicturePart | SoundPart)):
        picture = isinstance(part, PicturePart)
        unit = explained.unit
        png = overlays.draw_picture(part, unit) if isinstance(part, PicturePart) else overlays.draw_sound(part, unit)
        write_bytes(folder / f"{number}-{'picture' if picture else 'sound'}.png", png)
        figures.append(page.figure(png, f"attribution of a {'picture' if picture else 'sound'}"))
    if figures:
        body += ["<h2>Pictures and sounds</h2>", f"<div class='plots'>{''.join(figures)}</div>"]
    body.append(f"<h2>How it was asked</h2><p class='soft'>{escape(', '.join(_asked(question)))}</p>")
    write_bytes(folder / HTML, page.page(f"Why {explained.answer}?", body).encode())
    return folder / HTML


def _asked(question: Mapping[str, Any]) -> list[str]:
    several = {key: value if isinstance(value, list) else [value] for key, value in question.items()}
    return [f"{key}: {one if isinstance(one, str) else 'given'}" for key, values in several.items() for one in values]


def _said(parts: list[TextPart], unit: str) -> str:
    unit = f" {unit}".rstrip()
    scale = overlays.largest(np.array([part.attribution for part in parts]))
    spans = []
    for part in parts:
        rolled = "" if part.rollout is None else f"; roll-out {part.rollout:.4f}"
        spans.append(
            f"<span style='background:{_background(part.attribution, scale)}' "
            f"title='{part.attribution:+.4f}{unit}{rolled}'>{escape(part.text)}</span>"
        )
    return f"<p class='said'>{''.join(spans)}</p><p class='soft'>Full colour: {scale:.3g}{unit}.</p>"


def _bars(values: Mapping[str, float]) -> str:
    scale = overlays.largest(np.array(list(values.values()) or [0.0]))
    rows = []
    for name, value in values.items():
        colour = "rgb" + str(overlays.FOR if value >= 0 else overlays.AGAINST)
        width = max(0.5, 100 * abs(value) / scale)
        rows.append(
            f"<span>{escape(name)}</span><i style='width:{width:.1f}%;background:{colour}'></i><span>{value:+.3f}</span>"
        )
    return f"<div class='bars'>{''.join(rows)}</div>"
