"""`mmlm new`: look at somebody's files and write a story for them, with sizes chosen from what is there and said why."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmlm.config import blank_credentials
from mmlm.corpus.guess import Guess, look
from mmlm.errors import ConfigError
from mmlm.features.spec import VideoSpec
from mmlm.storage import write_bytes

MAX_LEN = 1024
"""Positions of the longest record that is kept, unless one in twenty would be longer; then up to twice as many."""
ERROR_BUDGET = 0.1
"""Share of the records that a story of newcomers may set aside, unless more are known to be too long."""
_MARKS = 8
"""Room for `<bos>`, `<answer>` and the like."""
_SPARE = 32
"""Room for records that are longer than those of the sample."""


@dataclass(frozen=True)
class Sizes:
    """What the amount and kind of data suggest."""

    batch: int
    steps: int
    student_steps: int
    width: int
    layers: int
    vocab_size: int
    max_len: int
    typical: int
    """Positions that 95 % of the records need at most."""
    image: dict[str, Any] | None
    audio: dict[str, Any] | None
    error_budget: float
    """Share of the records that `shard` may set aside."""
    says: list[str]


def write_story(folder: Path, data: Path | str, name: str | None = None) -> list[str]:
    """Write the story folder `folder` for the files at `data`. Returns what to tell the person, a line each.

    Raises DataError when nothing there can be learnt from, ConfigError when `folder` is taken.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is already there and not empty", cure="give a new folder: nothing is overwritten")
    guess = look(data)
    if not guess.tasks:
        raise ConfigError(
            f"no task can be seen in {blank_credentials(str(data))}",
            wanted="labels or answers",
            cure="name a label or answer column",
        )
    sizes = choose(guess)
    says = [_printable(line) for line in [*guess.says, *sizes.says]]
    title = _plain(name or folder.resolve().name)
    files = {
        "story.yaml": _story(title, guess.data, says),
        "scan.yaml": _head("How your files become records. Check the roles of the columns here.", guess.scan),
        "shard.yaml": _shard(sizes),
        "train.yaml": _train(sizes, guess),
        "distill.yaml": _distill(sizes, guess),
        "evaluate.yaml": _head("Scores, intervals and the report. Nothing has to be set here.", {}),
        "register.yaml": _head("Which model is registered, and what it has to beat.", {"model": "student"}),
    }
    for file, text in files.items():
        write_bytes(folder / file, text.encode())
    minutes = estimate_minutes(sizes)
    return [
        *says,
        f"wrote {folder}/ ({', '.join(files)}): every choice is commented there",
        f"a run takes about {minutes:.0f} minute{'s' if minutes >= 1.5 else ''} on 2 cores: mmlm run {_quoted(folder)}",
    ]


def choose(guess: Guess) -> Sizes:
    """Sizes for a model trained from nothing on 2 cores: small data get small pictures and few, repeated steps."""
    records = max(1, guess.counts.get("records", 1))
    image = audio = None
    videos = int(guess.sizes.get("videos_each") or 1) if "video" in guess.modalities else 0
    if "image" in guess.modalities or videos:
        side = float((guess.sizes.get("image_side") or {}).get("median") or 64)
        size = 32 if side <= 48 or (records < 3000 and side <= 96) else 64
        image = {"size": size, "patch": 8, "channels": guess.sizes.get("channels") or 3, "resize": "pad"}
    if "audio" in guess.modalities or videos:
        longest = float((guess.sizes.get("audio_seconds") or {}).get("p95") or (10 if videos else 4))
        audio = {"max_seconds": float(min(30, max(0.5, round(longest * 1.1, 1))))}
        audio["frames_per_token"] = 8 if longest < 5 else 16
    text = guess.sizes.get("text_bytes") or {"p90": 40, "p95": 40, "max": 40}
    vocabulary = 1024 if text["p95"] > 80 else 400
    media = _MARKS + int(guess.sizes.get("fields") or 0)
    if image:  # `images_each` is not told of class folders, nor where there are none beside the videos
        pictures = int(guess.sizes.get("images_each") or "image" in guess.modalities)
        media += (pictures + videos * VideoSpec().max_frames) * (int(image["size"]) // 8) ** 2
    if audio:
        each = int(100 * float(audio["max_seconds"])) // int(audio["frames_per_token"]) + 1
        media += (int(guess.sizes.get("audios_each") or "audio" in guess.modalities) + videos) * each
    needs = {key: media + _positions(float(text[key]), vocabulary) for key in ("p90", "p95", "max")}
    max_len = -(-max(min(needs["max"] + _SPARE, MAX_LEN), min(needs["p95"], 2 * MAX_LEN)) // 32) * 32
    over = [media + _positions(length, vocabulary) > max_len for length in text.get("steps", ())]
    too_long = sum(over) / max(1, len(over))
    budget, says = _cuts(needs, max_len, too_long)
    batch = 64 if records >= 500 else 32
    steps = int(min(2000, max(400, 40 * records / batch)))
    long = needs["p95"] > 400
    return Sizes(
        batch=batch // 4 if needs["p95"] > MAX_LEN else batch, steps=steps // 2 if long else steps,
        student_steps=max(300, steps // (4 if long else 2)), width=128, layers=3 if records >= 2000 else 2,
        vocab_size=vocabulary, max_len=max_len, typical=min(needs["p95"], max_len), image=image, audio=audio,
        error_budget=budget, says=says,
    )  # fmt: skip


def _positions(text_bytes: float, vocabulary: int) -> int:
    """Tokens that so many bytes of text become at most, nearly always.

    Measured on English and Chinese prose with tokenizers of these sizes: 95 % of the sentences have at most 0.75
    tokens a byte with 400 and 0.7 with 1024; short texts may have a token for every byte.
    """
    return int(min(text_bytes, 128) + max(0.0, text_bytes - 128) * (0.8 if vocabulary < 1024 else 0.7)) + 1


def _cuts(needs: dict[str, int], max_len: int, too_long: float) -> tuple[float, list[str]]:
    """(error budget of `shard`, what to say about records that are too long).

    `needs` are the positions of records at quantiles of length, `too_long` the share that does not fit. Up to half of
    the records may be set aside and the story still runs; beyond that a person has to decide.
    """
    if needs["max"] <= max_len:
        return ERROR_BUDGET, []
    how = "raise features.max_len in shard.yaml (it costs time and memory), or shorten the texts"
    said = f"The longest record looked at needs about {needs['max']:,} positions; those of more than {max_len:,}"
    if too_long > 0.5:
        return ERROR_BUDGET, [f"{said} are set aside. They seem to be more than half, at which a run stops: {how}."]
    said += " are set aside (shards/quarantine.parquet, `too_long`)"
    if too_long > ERROR_BUDGET / 2:
        budget = round(too_long + ERROR_BUDGET, 2)
        said += f", about {100 * too_long:.0f} % of all, so error_budget is {budget:g} in shard.yaml"
        return budget, [f"{said}: to keep them, {how}."]
    return ERROR_BUDGET, [f"{said}: to keep them, {how}."]


def estimate_minutes(sizes: Sizes) -> float:
    """Rough minutes of a whole run on 2 cores: start-up plus steps at about 12 microseconds a position and layer pair."""
    positions = min(sizes.typical, 60 + sizes.typical // 2)
    step = sizes.batch * positions * sizes.layers / 2 * 12e-6
    return (40 + (sizes.steps + 0.6 * sizes.student_steps) * step) / 60


def _plain(name: str) -> str:
    """A name that MLflow, its URIs and shells accept: letters of any script, digits, `_`, `.` and `-`."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "story"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path)) if re.search(r"[^\w@%+=:,./-]", str(path)) else str(path)


def _printable(text: str) -> str:
    """Without what cannot stand in a YAML comment or on a terminal, such as control characters in a class's name."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _head(comment: str, content: dict[str, Any]) -> str:
    body = yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=110) if content else ""
    return "".join(f"# {line}\n" for line in comment.splitlines()) + body


def _story(title: str, data: Path | str, says: list[str]) -> str:
    comment = "Written by `mmlm new`; yours to change.\n" + "\n".join(says)
    return _head(
        comment, {"name": title, "about": says[0], "data": data if isinstance(data, str) else os.path.abspath(data)}
    )


def _shard(sizes: Sizes) -> str:
    features: dict[str, Any] = {"tokenizer": {"vocab_size": sizes.vocab_size}, "max_len": sizes.max_len}
    if sizes.image:
        features["image"] = sizes.image
    if sizes.audio:
        features["audio"] = sizes.audio
    comment = (
        "What every record is turned into. Larger pictures (size, a multiple of patch) see more and cost more;\n"
        "records longer than max_len, and files that cannot be read, go to shards/quarantine.parquet with a reason."
    )
    return _head(comment, {"features": features, "error_budget": sizes.error_budget})


def _loop(sizes: Sizes, guess: Guess, steps: int) -> dict[str, Any]:
    augment: dict[str, Any] = {}
    if sizes.image:
        augment["shift"] = max(1, sizes.image["size"] // 16)
    if sizes.audio:
        augment["time_mask"] = 0.1
    data: dict[str, Any] = {"batch": sizes.batch, "modality_dropout": 0.3}
    if augment:
        data["augment"] = augment
    return {"steps": steps, "seed": 0, "precision": "bf16", "optimizer": {"lr": 0.002}, "data": data}


def _train(sizes: Sizes, guess: Guess) -> str:
    model = {"width": sizes.width, "layers": sizes.layers, "heads": 4, "attention": "prefix", "dropout": 0.1}
    comment = "The teacher. More steps or a wider model fit better and take longer; raise `steps` first."
    return _head(comment, {**_loop(sizes, guess, sizes.steps), "model": model, "zero": {"stage": 2}})


def _distill(sizes: Sizes, guess: Guess) -> str:
    model = {"width": 80, "layers": sizes.layers, "heads": 4, "attention": "prefix", "mlp_width": 160}
    comment = (
        "The student, led by the teacher. Remove this file, and say `model: teacher` in register.yaml, to go without."
    )
    return _head(comment, {**_loop(sizes, guess, sizes.student_steps), "model": model, "temperature": 2.0, "task": 0.5})
