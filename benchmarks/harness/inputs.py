"""Inputs made on the spot, the same for everybody: photographs, clips of sound, texts, texts with copies.

Nothing is fetched. Each input is made once for its size below `environments.home()`, and is the same on every machine.
"""

from __future__ import annotations

import itertools
import json
import os
import pydoc_data.topics
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.harness.environments import home

VERSION = 6
"""Bump when any input changes."""
PHOTO_SIDE = 1024
RATE = 16_000
VOCABULARY = 16_384
_DONE = "done"


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of inputs, filled by `make` if it is not there yet."""
    folder = home() / f"inputs-{VERSION}" / name
    if not (folder.parent / f"{name}.{_DONE}").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        (folder.parent / f"{name}.{_DONE}").touch()
    return folder


def photographs(count: int) -> Path:
    """`count` JPEGs of 1024 × 1024 pixels, about 100 to 250 kB each, in ten class folders."""

    def make(folder: Path) -> None:
        import simplejpeg

        rng = np.random.default_rng(7)
        for number in range(count):
            if number % 8 == 0:
                scene = _scene(rng, PHOTO_SIDE)
            place = folder / f"class{number % 10}"
            place.mkdir(exist_ok=True)
            jpeg = simplejpeg.encode_jpeg(_photograph(rng, scene, number % 8), 85, "RGB", "420")
            (place / f"{number:06d}.jpg").write_bytes(jpeg)

    return _made(f"photographs-{count}", make)


def _photograph(rng: np.random.Generator, scene: np.ndarray, view: int) -> np.ndarray:
    """A scene seen one of eight ways (turned and mirrored), in a light of its own and with the grain of a sensor."""
    seen = np.rot90(scene, view % 4)
    seen = seen[:, ::-1] if view >= 4 else seen
    grain = rng.standard_normal((*scene.shape[:2], 1), np.float32) * np.float32(rng.uniform(2.0, 7.0))
    return np.clip(seen + np.float32(rng.uniform(-20, 20)) + grain, 0, 255).astype(np.uint8)


def _scene(rng: np.random.Generator, side: int) -> np.ndarray:
    """(side, side, 3) float32 with the spectrum of a photograph: noise that falls off with frequency (Field 1987), light
    from one side, a few shapes with sharp edges."""
    import cv2

    picture = np.zeros((side, side, 3), np.float32)
    for octave in range(1, 9):
        cells = 2**octave
        noise = rng.standard_normal((cells + 1, cells + 1, 3), np.float32)
        noise = 0.5 * noise + 0.5 * noise.mean(axis=2, keepdims=True)
        picture += cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC) * np.float32(70 / 1.75**octave)
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    tilt = rng.uniform(-40, 40, 2).astype(np.float32)
    picture += (ramp[:, None] * tilt[0] + ramp[None] * tilt[1])[..., None] + np.float32(rng.uniform(90, 160))
    for _ in range(int(rng.integers(4, 12))):
        centre, axes = rng.integers(0, side, 2).tolist(), rng.integers(20, side // 5, 2).tolist()
        mask = np.zeros((side, side), np.float32)
        cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1, cv2.LINE_AA)
        picture += mask[..., None] * rng.uniform(-60, 60, 3).astype(np.float32)
    return picture


def clips(count: int, ending: str) -> Path:
    """`count` clips of 1 to 5 s, 16 kHz, one channel: voiced sounds with moving pitch and formants, and breath.

    `clips.jsonl` lists them.
    """

    def make(folder: Path) -> None:
        import soundfile

        rng = np.random.default_rng(11)
        for number in range(count):
            wave = _clip(rng, float(rng.uniform(1.0, 5.0)))
            subtype = "VORBIS" if ending == "ogg" else "PCM_16"
            soundfile.write(folder / f"{number:06d}.{ending}", wave, RATE, subtype=subtype)
        rows = [{"id": f"{n:06d}", "sound": f"{n:06d}.{ending}", "label": "clip"} for n in range(count)]
        (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return _made(f"clips-{ending}-{count}", make)


def _clip(rng: np.random.Generator, seconds: float) -> np.ndarray:
    time = np.arange(int(seconds * RATE)) / RATE
    pitch = rng.uniform(90, 240) * (1 + 0.15 * np.sin(2 * np.pi * rng.uniform(0.5, 3) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    wave = np.zeros_like(time)
    formants = rng.uniform((300, 900, 2200), (900, 2200, 3200))
    for harmonic in range(1, 30):
        loud = sum(np.exp(-((harmonic * 160 - f) ** 2) / (2 * 150.0**2)) for f in formants) + 0.02
        wave += loud * np.sin(harmonic * phase)
    syllables = np.clip(np.sin(2 * np.pi * rng.uniform(2, 5) * time) + 0.4, 0, 1)
    wave = wave * syllables + 0.05 * rng.standard_normal(len(time))
    faded: np.ndarray = 0.5 * wave / np.abs(wave).max()
    return faded


def texts(count: int) -> Path:
    """`docs.jsonl` of `count` English texts of about 2,000 characters, and `tokenizer.json`, trained on them."""

    def make(folder: Path) -> None:
        rng = np.random.default_rng(13)
        _write_texts(folder / "docs.jsonl", _documents(rng, count))
        _train_tokenizer(folder)

    return _made(f"texts-{count}", make)


def first_texts(count: int, of: int) -> Path:
    """The first `count` of `of` such texts, with the tokenizer of all."""

    def make(folder: Path) -> None:
        whole = texts(of)
        lines = (whole / "docs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "docs.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
        shutil.copy(whole / "tokenizer.json", folder)

    return _made(f"texts-{count}-of-{of}", make)


def copied_texts(count: int) -> Path:
    """`docs.jsonl` of `count` texts, a fifth of them copies of others with no to a tenth of their words changed."""

    def make(folder: Path) -> None:
        rng = np.random.default_rng(17)
        own = list(_documents(rng, count - count // 5))
        words = sorted({word for text in own[:200] for word in text.split()})
        copies = []
        for number in range(count // 5):
            changed = own[int(rng.integers(len(own)))].split(" ")
            for at in rng.integers(0, len(changed), int(len(changed) * (number % 5) * 0.025)).tolist():
                changed[at] = words[int(rng.integers(len(words)))]
            copies.append(" ".join(changed))
        everything = own + copies
        _write_texts(folder / "docs.jsonl", (everything[i] for i in rng.permutation(len(everything))))

    return _made(f"copied-texts-{count}", make)


def _documents(rng: np.random.Generator, count: int) -> Iterator[str]:
    """Texts out of a Markov chain over pairs of words of the Python manual, which every Python has with it.

    One word in 33 is a name or number that occurs nowhere else, as in natural texts of this length (Heaps' law).
    """
    words = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)).split()
    following: dict[str, list[str]] = defaultdict(list)
    for first, second in itertools.pairwise(words):
        following[first].append(second)
    for _ in range(count):
        word, size = words[int(rng.integers(len(words)))], 0
        made: list[str] = []
        wanted = rng.lognormal(np.log(1800), 0.5)
        draws = iter(rng.integers(0, 1 << 30, 60_000).tolist())
        while size < wanted and len(made) < 15_000:
            made.append(word if next(draws) % 33 else _rare(next(draws)))
            size += len(made[-1]) + 1
            choices = following.get(word) or words
            word = choices[next(draws) % len(choices)]
        yield " ".join(made)


def _rare(number: int) -> str:
    if number % 3 == 0:
        return str(number % 100_000)
    syllables = (
        "ka",
        "ro",
        "lin",
        "dor",
        "mes",
        "ta",
        "vi",
        "sho",
        "bren",
        "ul",
        "qua",
        "pe",
        "zan",
        "go",
        "hil",
        "ny",
    )
    return "".join(syllables[number >> 4 * at & 15] for at in range(1, 3 + number % 3)).capitalize()


def _write_texts(path: Path, found: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(found):
            row = {"id": f"{number:07d}", "text": text, "label": "odd" if number % 2 else "even"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _train_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    lines = (json.loads(line)["text"] for line in (folder / "docs.jsonl").open(encoding="utf-8"))
    inner.train_from_iterator(lines, trainer)
    inner.save(str(folder / "tokenizer.json"))


def several(folder: Path, times: int, out: Path) -> Path:
    """`folder` with every file `times` times, by hard link, below `out`."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        for copy in range(times):
            target = out / path.relative_to(folder).parent / f"{copy:02d}-{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    return out


PAIR_SIDE = 224


def pairs(count: int) -> Path:
    """`count` JPEGs of 224 × 224 pixels, quality 90, with texts of about 200 tokens: `shards`, a shard set of ours, and
    `pairs`, the same JPEGs and the same tokens out of it as files, from which each peer makes its own format."""

    def make(folder: Path) -> None:
        _pair_sources(folder / "raw", count)
        _shard_pairs(folder)
        shutil.rmtree(folder / "raw")
        shutil.rmtree(folder / "manifest")

    return _made(f"pairs-{count}", make)


def _pair_sources(folder: Path, count: int) -> None:
    import simplejpeg

    rng = np.random.default_rng(23)
    folder.mkdir(parents=True)
    words = sorted({word for text in _documents(rng, 50) for word in text.split()})
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(count):
            if number % 8 == 0:
                scene = _scene(rng, PAIR_SIDE)
            jpeg = simplejpeg.encode_jpeg(_photograph(rng, scene, number % 8), 90, "RGB", "420")
            (folder / f"{number:06d}.jpg").write_bytes(jpeg)
            text = " ".join(words[i] for i in rng.integers(0, len(words), int(rng.integers(40, 60))))
            file.write(
                json.dumps({"id": f"{number:06d}", "image": f"{number:06d}.jpg", "text": text, "label": "x"}) + "\n"
            )


def _shard_pairs(folder: Path) -> None:
    from mmlm.config import parse
    from mmlm.corpus.config import ScanConfig
    from mmlm.corpus.scan import scan
    from mmlm.data.reader import ShardReader
    from mmlm.shards.config import ShardConfig
    from mmlm.shards.shard import shard

    ask = {"task": "read", "question": "{text}", "label": "{label}"}
    table = {
        "kind": "table",
        "files": "pairs.jsonl",
        "map": {"id": "id", "image": "image"},
        "ask": [ask],
        "split": "train",
    }
    scanning = parse(ScanConfig, {"sources": [table], "split": {"val": 0, "test": 0, "fill": False}}, "pairs")
    features = {
        "max_len": 1024,
        "tokenizer": {"vocab_size": 2048},
        "image": {"size": PAIR_SIDE, "patch": 16, "channels": 3},
    }
    sharding = {
        "features": features, "shard_records": 512, "image_codec": "jpeg", "image_quality": 90, "ray_from": 10**12,
    }  # fmt: skip
    manifest = scan(scanning, data=folder / "raw", out=folder / "manifest", tracker=None)
    made = shard(parse(ShardConfig, sharding, "pairs"), manifest, data=folder / "raw", out=folder / "shards", workers=1)
    reader = ShardReader(made.path)
    (folder / "pairs").mkdir()
    for number in range(len(reader)):
        (folder / "pairs" / f"{number:06d}.jpg").write_bytes(reader.members(number)["image0.jpg"])
        np.save(folder / "pairs" / f"{number:06d}.npy", reader[number].tokens)
