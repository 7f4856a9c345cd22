"""Rows of a small corpus for curation, and the slow and plain way to find near-duplicates."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from mmlm.corpus.curation.config import CurateConfig
from mmlm.corpus.curation.set_steps import Drops, find_drops
from mmlm.corpus.records import Part, Record, Target, to_row
from mmlm.errors import TooLargeError

ORDER = {"test": 0, "val": 1, "train": 2}
HAN = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定"


def row(id: str, text: str = "", *, split: str = "train", group: str = "", **more: Any) -> dict[str, Any]:
    """A manifest row; `pictures` (names or bytes), `answer`, `label`, `task`, `source` may be given."""
    parts = [Part("image", uri=p) if isinstance(p, str) else Part("image", data=p) for p in more.pop("pictures", ())]
    if text:
        parts.append(Part("text", text=text))
    target = Target(label=more.pop("label", None), text=more.pop("answer", None))
    return to_row(Record(id, tuple(parts), target=target, split=split, group=group or f"group of {id}", **more))


def drops(
    rows: list[dict[str, Any]], folder: Path, files: dict[str, bytes] | None = None, workers: int = 1, **steps: Any
) -> Drops:
    """What the set steps drop; the rows are sorted here, as a scan does it."""
    ordered = sorted(rows, key=lambda r: r["id"])

    def read(uri: str, most: int) -> bytes:
        if uri not in (files or {}):
            raise FileNotFoundError(uri)
        if len((files or {})[uri]) > most:
            raise TooLargeError(uri)
        return (files or {})[uri]

    config = CurateConfig.model_validate(steps)
    found = find_drops(lambda: iter(ordered), config, read, folder / "work", workers)
    assert not (folder / "work").exists()
    for step in config.set_steps:
        left = found.figures[step].values()
        assert sum(f["dropped"] for f in left) == sum(e.step == step for e in found.events.values())
        reasons = found.reasons.get(step, {}).values()
        assert sum(sum(r.values()) for r in reasons) == sum(f["dropped"] for f in left)
    return found


def sentences(seed: int, count: int, words: int, chinese: bool = False) -> list[str]:
    """Texts of random words (or Han characters) that have next to nothing in common."""
    rng = random.Random(seed)
    if chinese:
        return ["".join(rng.choices(HAN, k=words)) for _ in range(count)]
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)]
    return [" ".join(rng.choices(vocabulary, k=words)) for _ in range(count)]


def altered(text: str, rng: random.Random, changes: int) -> str:
    """The text with some words (or Han characters) replaced."""
    spaced = " " in text
    words: list[str] = text.split() if spaced else list(text)
    for at in rng.sample(range(len(words)), changes):
        words[at] = "changed" + str(rng.randrange(10_000)) if spaced else rng.choice(HAN)
    return (" " if spaced else "").join(words)


@lru_cache(10_000)
def shingle_set(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+|[\u4e00-\u9fff]", text.lower())
    return {tuple(words[k : k + n]) for k in range(max(1, len(words) - n + 1))} if words else set()


def losers_by_brute_force(
    rows: list[dict[str, Any]], alike: Callable[[dict[str, Any], dict[str, Any]], bool]
) -> set[str]:
    """Every pair compared, connected components by spreading, the owner by (split, id)."""
    near: dict[str, set[str]] = {r["id"]: {r["id"]} for r in rows}
    for a in rows:
        for b in rows:
            if a["id"] < b["id"] and a["task"] == b["task"] and alike(a, b):
                near[a["id"]].add(b["id"])
                near[b["id"]].add(a["id"])
    by_id = {r["id"]: r for r in rows}
    lost: set[str] = set()
    left = set(near)
    while left:
        component, edge = set[str](), {min(left)}
        while edge:
            component |= edge
            edge = {m for n in edge for m in near[n]} - component
        left -= component
        owner = min(component, key=lambda i: (ORDER[by_id[i]["split"]], i))
        kept = (by_id[owner]["group"], by_id[owner]["split"])
        lost |= {i for i in component if (by_id[i]["group"], by_id[i]["split"]) != kept}
    return lost


def orders(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    yield rows
    yield rows[::-1]
    yield random.Random(5).sample(rows, len(rows))


def painting(seed: int, size: int = 96) -> np.ndarray:
    """(size, size, 3) uint8: soft blobs of colour, another picture for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, kind: str = "PNG", size: int | None = None, blur: float = 0.0, **how: Any) -> bytes:
    picture = Image.fromarray(pixels)
    if size:
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    held = io.BytesIO()
    picture.save(held, kind, **how)
    return held.getvalue()
