"""Pictures and spectrograms with what speaks for the answer in orange and what speaks against it in blue."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np

from mmlm.evals.explain import PicturePart, SoundPart

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOR, AGAINST = (213, 94, 0), (0, 114, 178)
"""Okabe & Ito 2008: told apart with every kind of colour vision."""
ROLLED = (0, 130, 90)


def largest(values: np.ndarray) -> float:
    """What the full colour stands for."""
    return float(np.abs(values).max(initial=0.0)) or 1.0


def colour_of(values: np.ndarray) -> np.ndarray:
    """(…, 3) in 0-255: which way each value points."""
    return np.where(values[..., None] >= 0, np.array(FOR), np.array(AGAINST)).astype(np.float64)


def blend(grey: np.ndarray, values: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: `grey` in 0-1, made pale, under colours that are the stronger the larger the value."""
    strength = (0.9 * np.abs(values) / largest(values))[..., None]
    base = (90 + 150 * grey)[..., None]
    return np.clip(base * (1 - strength) + colour * strength, 0, 255).astype(np.uint8)


def draw_picture(part: PicturePart, unit: str) -> bytes:
    """PNG of `picture_figure`."""
    return _png(picture_figure(part, unit))


def picture_figure(part: PicturePart, unit: str) -> Figure:
    """The picture as the model sees it, its patches, its pixels, and the roll-out; attributions have this `unit`, or none."""
    grey = part.picture_HWC.astype(np.float64).mean(-1) / 255
    wide = _enlarged(part.patches, len(grey))
    panels: list[tuple[str, np.ndarray, float | None]] = [
        ("as the model sees it", _rgb(part.picture_HWC), None),
        (
            f"patches (sum {_of(part.attribution, '+.2f', unit)})",
            blend(grey, wide, colour_of(wide)),
            largest(part.patches),
        ),
    ]
    if part.pixels_HW is not None:
        panels.append(("pixels", blend(grey, part.pixels_HW, colour_of(part.pixels_HW)), largest(part.pixels_HW)))
    if part.rollout is not None:
        rolled = _enlarged(part.rollout, len(grey))
        panels.append(("attention roll-out", blend(grey, rolled, np.array(ROLLED, float)), None))
    figure = Figure(figsize=(2.7 * len(panels), 3.0), dpi=110, layout="constrained")
    for n, (title, pixels, scale) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), n)
        axes.imshow(pixels, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set(xticks=[], yticks=[])
        if scale is not None:
            axes.set_xlabel(f"full colour: {_of(scale, '.2g', unit)}", fontsize=8, color="#555555")
    return figure


def draw_sound(part: SoundPart, unit: str) -> bytes:
    """PNG of `sound_figure`."""
    return _png(sound_figure(part, unit))


def sound_figure(part: SoundPart, unit: str) -> Figure:
    """The spectrogram, what its bins speak for, each frame's sum, and the roll-out over time; units as of a picture."""
    mel_MF = part.mel_FM.astype(np.float64).T
    grey = (mel_MF - mel_MF.min()) / (float(np.ptp(mel_MF)) or 1.0)
    values_MF = np.broadcast_to(part.frames, mel_MF.shape) if part.bins_FM is None else part.bins_FM.T
    name = "frames" if part.bins_FM is None else "bins"
    over = blend(grey, values_MF, colour_of(values_MF))
    F, seconds = len(part.mel_FM), len(part.mel_FM) * part.frame_seconds
    rows = 3 if part.rollout is None else 4
    ratios = [2, 2, 1, 1][:rows]
    figure = Figure(figsize=(9, 1.2 * sum(ratios)), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, gridspec_kw={"height_ratios": ratios})
    extent = (0.0, seconds, 0.0, float(len(mel_MF)))
    axes[0].imshow(grey, origin="lower", aspect="auto", cmap="magma", extent=extent, interpolation="nearest")
    _name(axes[0], "as the model hears it", "mel bin")
    axes[1].imshow(over, origin="lower", aspect="auto", extent=extent, interpolation="nearest")
    _name(
        axes[1], f"{name} (sum {_of(part.attribution, '+.2f', unit)}; full colour: {largest(values_MF):.2g})", "mel bin"
    )
    middle = (np.arange(F) + 0.5) * part.frame_seconds
    axes[2].bar(middle, part.frames, part.frame_seconds, color=colour_of(part.frames) / 255)
    axes[2].axhline(0, color="#555555", lw=0.7)
    _name(axes[2], "frames", unit or "of the number")
    if part.rollout is not None:
        each = F / max(len(part.rollout), 1)
        edges = np.minimum(np.arange(len(part.rollout) + 1) * np.ceil(each), F) * part.frame_seconds
        axes[3].stairs(part.rollout, edges, fill=True, color=np.array(ROLLED) / 255)
        _name(axes[3], "attention roll-out", "share")
    axes[-1].set_xlabel("seconds", fontsize=8)
    axes[-1].set_xlim(0, seconds)
    return figure


def _of(value: float, form: str, unit: str) -> str:
    return f"{value:{form}} {unit}".rstrip()


def _name(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(labelsize=7)


def _enlarged(grid: np.ndarray, side: int) -> np.ndarray:
    """(side, side): the cells of a square grid, each as wide as it is in the picture."""
    cell = np.arange(side) * len(grid) // side
    return grid[np.ix_(cell, cell)]


def _rgb(picture_HWC: np.ndarray) -> np.ndarray:
    return picture_HWC.repeat(3, 2) if picture_HWC.shape[2] == 1 else picture_HWC


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": ""}, facecolor="white")
    return buffer.getvalue()
