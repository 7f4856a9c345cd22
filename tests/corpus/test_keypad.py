"""The built-in corpus: the same bytes every time, whole or not there, and such as its description says."""

from __future__ import annotations

import hashlib
import io
import json
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlm.corpus.config import KeypadSource, SplitConfig
from mmlm.corpus.keypad import DTMF, QUESTIONS, WORDS, render_digit, render_tone, write_keypad
from mmlm.errors import DataError
from tests.corpus.samples import Scan

SMALL = KeypadSource(kind="keypad", renderings=2, renderings_held_out=1, images=12)
SPLIT = SplitConfig(val=0.1, test=0.2)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def test_it_is_made_of_its_config_alone(tmp_path: Path) -> None:
    one = digests(write_keypad(SMALL, SPLIT, tmp_path / "a"))
    assert one == digests(write_keypad(SMALL, SPLIT, tmp_path / "b"))
    other = digests(write_keypad(SMALL.model_copy(update={"seed": 1}), SPLIT, tmp_path / "c"))
    assert one["images/0000-0.png"] != other["images/0000-0.png"]


def test_it_is_left_alone_replaced_or_protected(tmp_path: Path) -> None:
    folder = write_keypad(SMALL, SPLIT, tmp_path)
    before = (folder / "keypad.jsonl").stat().st_mtime_ns
    write_keypad(SMALL, SPLIT, tmp_path)
    assert (folder / "keypad.jsonl").stat().st_mtime_ns == before
    write_keypad(SMALL.model_copy(update={"images": 6}), SPLIT, tmp_path)
    assert len({p.name.split("-")[0] for p in (folder / "images").iterdir()}) == 6
    (folder / ".complete").unlink()
    with pytest.raises(DataError, match="not a keypad corpus"):
        write_keypad(SMALL, SPLIT, tmp_path)


def test_it_goes_the_way_of_any_corpus(tmp_path: Path, scanned: Scan) -> None:
    made = scanned(tmp_path / "raw", SMALL.model_dump(), split=SPLIT.model_dump())
    assert not made.refused
    assert made.counts["modalities"] == {
        "audio": made.counts["kept"],
        "image": made.counts["kept"],
        "text": made.counts["kept"],
    }
    lines = [json.loads(line) for line in (tmp_path / "raw/keypad/keypad.jsonl").read_text().splitlines()]
    assert made.counts["kept"] == len(lines)
    for record in made.records.values():
        lang = record.lang
        assert record.parts[-1].text in QUESTIONS[lang]
        assert record.target.text == WORDS[lang][int(record.target.label or "")]
    by_group: dict[str, set[str]] = {}
    for record in made.records.values():
        by_group.setdefault(record.group, set()).add(record.split)
    assert len(by_group) == 12
    assert all(len(s) == 1 for s in by_group.values())
    assert made.counts["train"] == 2 * sum(s == {"train"} for s in by_group.values())


def test_an_answer_names_one_digit() -> None:
    for words in WORDS.values():
        assert len(set(words)) == 10
    assert not any(w in q.lower().split() for q in QUESTIONS["en"] for w in WORDS["en"])


def test_pictures_are_white_digits_of_many_sizes() -> None:
    picture = np.zeros((8, 8), np.float32)
    picture[:, 3:5] = 1
    sides, contrasts = set(), []
    for seed in range(300):
        made = render_digit(picture, np.random.default_rng(seed))
        assert made.dtype == np.uint8
        assert made.shape[0] == made.shape[1]
        sides.add(made.shape[0])
        middle = made[:, made.shape[1] * 7 // 16 : made.shape[1] * 9 // 16].mean()
        contrasts.append(middle - made[:, : made.shape[1] // 4].mean())
    assert min(sides) >= 32
    assert max(sides) <= 128
    assert len(sides) > 50
    assert np.mean([c > 240 for c in contrasts]) == pytest.approx(0.1, abs=0.06)
    assert min(contrasts) > 10


def test_sounds_are_the_tones_of_the_key() -> None:
    rates, seconds = set(), []
    for seed in range(60):
        digit = str(seed % 10)
        with wave.open(io.BytesIO(render_tone(digit, np.random.default_rng(seed)))) as f:
            rate, n = f.getframerate(), f.getnframes()
            sound = np.frombuffer(f.readframes(n), "<i2").astype(float)
        rates.add(rate)
        seconds.append(n / rate)
        spectrum = np.abs(np.fft.rfft(sound, 4 * rate)) ** 2  # a bin is a quarter hertz
        at = {key: spectrum[4 * low] + spectrum[4 * high] for key, (low, high) in DTMF.items()}
        if spectrum.max() > 200 * spectrum.mean():  # not drowned in noise
            assert max(at, key=lambda k: at[k]) == digit
    assert rates == {8000, 16000, 44100}
    assert min(seconds) >= 0.29
    assert max(seconds) <= 0.81


def test_a_picture_can_be_opened(tmp_path: Path) -> None:
    folder = write_keypad(SMALL, SPLIT, tmp_path)
    with Image.open(next((folder / "images").iterdir())) as picture:
        assert picture.mode == "L"
