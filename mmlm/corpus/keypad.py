"""The built-in corpus: keypad. Noisy handwritten digits, the telephone's tones for them, questions in two languages.

Pictures are scikit-learn's 8 x 8 digits, white on black, enlarged to 32-128 pixels, with additive Gaussian noise of
0 to 3 times the pixel range at the enlarged size, clipped. Sounds are the standard's two sine waves (ITU-T Q.23) for
0.3-0.8 s at 8, 16 or 44.1 kHz, with Gaussian noise of 0 to 15 times the tone's root mean square. A tenth of each is
nearly clean. So each modality alone errs now and then, and both together hardly do.

Written as raw files (`images/*.png`, `sounds/*.wav`, `keypad.jsonl` of chat messages), then read like any corpus.
Everything about a record is drawn from a generator seeded with (seed, digit's number, rendering).
"""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import shutil
import threading
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmlm.config import resolved
from mmlm.corpus.config import KeypadSource, SplitConfig
from mmlm.corpus.splits import Splitter
from mmlm.errors import DataError
from mmlm.progress import Progress
from mmlm.storage import sha256_json, write_bytes, write_json
from mmlm.world import cores

FOLDER = "keypad"
TABLE = "keypad.jsonl"
COMPLETE = ".complete"
RECIPE = 1
"""Bumped by hand when the files made of the same config change."""

DTMF = {
    "1": (697, 1209), "2": (697, 1336), "3": (697, 1477), "4": (770, 1209), "5": (770, 1336), "6": (770, 1477),
    "7": (852, 1209), "8": (852, 1336), "9": (852, 1477), "0": (941, 1336),
}  # fmt: skip
"""Low and high frequency of each key, Hz."""
WORDS = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "zh": ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九"),
}
QUESTIONS = {
    "en": (
        "Which number is it?",
        "Which digit is this?",
        "What number do you see or hear?",
        "Which key was pressed?",
        "Name the digit.",
        "Tell me the number, please.",
    ),
    "zh": (
        "这是哪个数字？",
        "这是几？",
        "按的是哪个键？",
        "请说出这个数字。",
        "你看到或听到的是什么数字？",
        "请问是几号键？",
    ),
}
RATES = (8_000, 16_000, 44_100)
"""Sample rates, Hz."""
CLEAN = 0.1
"""Share of each modality that is nearly clean."""
_CHUNK = 16


def write_keypad(config: KeypadSource, split: SplitConfig, data: Path) -> Path:
    """Write the corpus into `data/keypad` unless it lies there already; returns that folder.

    It appears whole or not at all. Another config's corpus is replaced; a folder that is not ours is refused.
    """
    folder = data / FOLDER
    wanted = sha256_json({"recipe": RECIPE, "config": resolved(config), "split": resolved(split)})
    if _marker(folder) == wanted:
        return folder
    data.mkdir(parents=True, exist_ok=True)
    with (data / f".{FOLDER}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second writer waits, and then finds the corpus there
        if _marker(folder) == wanted:
            return folder
        if folder.exists() and _marker(folder) is None:
            raise DataError(f"{folder} is not a keypad corpus", cure="choose another --data: it would be overwritten")
        part = data / f".{FOLDER}.part"
        shutil.rmtree(part, ignore_errors=True)
        (part / "images").mkdir(parents=True)
        (part / "sounds").mkdir()
        _write(config, split, part)
        write_json(part / COMPLETE, {"hash": wanted})
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(part, folder)
    return folder


def _marker(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(config: KeypadSource, split: SplitConfig, folder: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = digits.images[: config.images].astype(np.float32) / 16
    splitter = Splitter(split)
    for number in range(config.images):
        splitter.note(_group(number), "")
    splitter.decide()
    splits = [splitter.split_of(_group(n), "") for n in range(config.images)]
    renderings = [config.renderings if s == "train" else config.renderings_held_out for s in splits]
    jobs = [(n, pictures[n], str(digits.target[n]), splits[n], renderings[n]) for n in range(config.images)]
    chunks = [jobs[at : at + _CHUNK] for at in range(0, len(jobs), _CHUNK)]
    render = partial(_render_chunk, folder=folder, seed=config.seed)
    lines: list[str] = []
    with Progress("keypad", sum(renderings), "records") as progress:
        for made in _mapped(render, chunks):
            lines += made
            progress.add(len(made))
    write_bytes(folder / TABLE, ("\n".join(lines) + "\n").encode())


def _mapped(render: Any, chunks: list[Any]) -> Iterator[list[str]]:
    """The chunks rendered in order; in one process per core when there are enough of them."""
    if len(chunks) < 8 or cores() == 1:
        yield from map(render, chunks)
        return
    # spawn: this process may already have threads, and a fork of threads can hang
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(cores(), 8), mp_context=spawn, initializer=_end_with_parent) as pool:
        yield from pool.map(render, chunks)


def _end_with_parent() -> None:
    """A pool's worker does not notice that its parent was killed, and would wait for ever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _group(number: int) -> str:
    return f"digit-{number:04d}"


def _render_chunk(jobs: list[tuple[int, np.ndarray, str, str, int]], folder: Path, seed: int) -> list[str]:
    """Write the files of some digits; returns their lines of the table."""
    from PIL import Image

    lines = []
    for number, picture, digit, split, renderings in jobs:
        for rendering in range(renderings):
            rng = np.random.default_rng([seed, number, rendering])
            name = f"{number:04d}-{rendering}"
            Image.fromarray(render_digit(picture, rng)).save(folder / f"images/{name}.png", compress_level=1)
            (folder / f"sounds/{name}.wav").write_bytes(render_tone(digit, rng))
            lang = ("en", "zh")[int(rng.integers(2))]
            question = QUESTIONS[lang][int(rng.integers(len(QUESTIONS[lang])))]
            lines.append(json.dumps(_line(name, number, digit, split, lang, question), ensure_ascii=False))
    return lines


def _line(name: str, number: int, digit: str, split: str, lang: str, question: str) -> dict[str, Any]:
    asked = [
        {"type": "image", "image": f"images/{name}.png"},
        {"type": "audio", "audio": f"sounds/{name}.wav"},
        {"type": "text", "text": question},
    ]
    return {
        "id": f"keypad/{name}",
        "group": _group(number),
        "split": split,
        "lang": lang,
        "task": "digit",
        "label": digit,
        "license": "BSD-3-Clause",
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": WORDS[lang][int(digit)]},
        ],
    }


def render_digit(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`picture` (8, 8) in [0, 1] → (side, side) uint8, side 32-128: enlarged, noisy, clipped."""
    from PIL import Image

    multiple = rng.random() < 0.5
    side = 8 * int(rng.integers(4, 17)) if multiple else int(rng.integers(32, 129))
    if rng.random() < 0.5:
        at = np.arange(side) * 8 // side
        large = picture[at][:, at]
    else:
        large = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))
    sigma = rng.uniform(0, 0.1) if rng.random() < CLEAN else rng.uniform(0, 3)
    noisy = large + np.float32(sigma) * rng.standard_normal((side, side), dtype=np.float32)
    return np.round(np.clip(noisy, 0, 1) * 255).astype(np.uint8)


def render_tone(digit: str, rng: np.random.Generator) -> bytes:
    """The key tone of `digit` as a 16-bit mono WAV file: 0.3-0.8 s, noisy, at any level below clipping."""
    rate = RATES[int(rng.integers(len(RATES)))]
    time = np.arange(int(rate * rng.uniform(0.3, 0.8)), dtype=np.float32) / rate
    phases = rng.uniform(0, 2 * np.pi, 2)
    # two sines of amplitude 1 have a root mean square of 1; 32 bits are exact enough here, and twice as fast
    low, high = (
        np.sin(np.float32(2 * np.pi * hertz) * time + np.float32(phase))
        for hertz, phase in zip(DTMF[digit], phases, strict=True)
    )
    ratio = rng.uniform(0, 0.1) if rng.random() < CLEAN else rng.uniform(0, 15)
    sound = low + high + np.float32(ratio) * rng.standard_normal(len(time), dtype=np.float32)
    level = np.float32(rng.uniform(0.1, 0.95) * 32767) / np.abs(sound).max()
    held = io.BytesIO()
    with wave.open(held, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes(np.round(sound * level).astype("<i2").tobytes())
    return held.getvalue()
