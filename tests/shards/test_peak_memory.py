"""Peak memory of whole processes: it is bounded by settings and limits, not by the corpus or the size of a record."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.records import Part, Record, Target
from mmlm.corpus.scan import scan
from tests.shards.conftest import write_manifest

TRAIN = """
import sys
import wave
from pathlib import Path
from mmlm import artifacts
from mmlm.features.config import FeaturesConfig, TokenizerConfig
from mmlm.shards.spec import find_tokenizer

config = FeaturesConfig(tokenizer=TokenizerConfig(vocab_size=400, max_bytes=2 << 20))
made = find_tokenizer(artifacts.read(Path(sys.argv[1])), config, Path(sys.argv[2]))
assert made.vocab_size == 400
told = Path("/proc/self/status").read_text(errors="replace")
print(int(told.partition("VmHWM:")[2].split()[0]) >> 10)
"""


def peak(script: str, *arguments: object) -> int:
    """MiB that a fresh process held at most; what it prints last."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


SCAN: dict[str, Any] = {
    "sources": [{
        "kind": "table", "files": "t.jsonl", "split": "train", "map": {"id": "id"},
        "ask": [{"task": "t", "text": "text", "answer": "answer"}],
    }],
    "split": {"val": 0, "test": 0, "fill": False},
}  # fmt: skip


def long_texts(data: Path, count: int) -> Artifact:
    """`count` records of 8 kB of words of some 6 letters, of which hardly one comes twice, scanned."""
    rng = np.random.default_rng(count)
    letters = rng.integers(97, 123, (count, 8192), np.uint8)
    letters[rng.random(letters.shape) < 0.15] = 32
    data.mkdir()
    with (data / "t.jsonl").open("w") as file:
        for i, row in enumerate(letters):
            file.write(json.dumps({"id": f"{i:06d}", "text": row.tobytes().decode(), "answer": "a"}) + "\n")
    return scan(parse(ScanConfig, SCAN, "scan.yaml"), data=data, out=data / "manifest")


@pytest.mark.slow
def test_a_tokenizer_is_trained_in_the_same_memory_whatever_the_size_of_the_corpus(tmp_path: Path) -> None:
    """It learns of 2 MB. With four times the corpus, 128 MB instead of 32, the peak was 448 MiB instead of 420, and with
    512 MB 460: two row groups of 16 MB as they are and as Python's texts, and what the allocators keep."""
    peaks = [peak(TRAIN, long_texts(tmp_path / f"{count}", count).path, tmp_path) for count in (4096, 16_384)]
    assert peaks[1] - peaks[0] < 60 and peaks[1] < 600, peaks


SHARD = """
import sys
import wave
from pathlib import Path
from mmlm import artifacts
from mmlm.config import parse
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard

root = Path(sys.argv[1])
features = {
    "tokenizer": {"vocab_size": 300}, "max_len": 100_000, "image": {"size": 224, "patch": 16, "channels": 3},
    "audio": {"max_seconds": float(sys.argv[2])},
}
config = parse(ShardConfig, {"features": features, "ray_from": 10**9}, "test")
made = shard(config, artifacts.read(root / "manifest"), data=root / "raw", out=root / "shards")
assert made.counts["quarantined"] == 0 and made.counts["images"] + made.counts["sounds"] == int(sys.argv[3]), made.counts
told = Path("/proc/self/status").read_text(errors="replace")
print(int(told.partition("VmHWM:")[2].split()[0]) >> 10)
"""


def sharded(root: Path, parts: list[Part], max_seconds: float = 30) -> int:
    """MiB that sharding one record of these media takes at most, in one process."""
    record = Record("r", (Part("text", text="?"), *parts), "digit", Target(label="1"), "train", "r", "en")
    write_manifest(root / "manifest", [record])
    return peak(SHARD, root, max_seconds, len(parts))


def picture(side_x: int, side_y: int, channels: int = 3) -> Image.Image:
    x, y = np.arange(side_x, dtype=np.uint32)[None], np.arange(side_y, dtype=np.uint32)[:, None]
    return Image.fromarray(np.stack([((x * (c + 1) + y * 3) >> 4).astype(np.uint8) for c in range(channels)], -1))


def test_a_record_of_two_hundred_pictures_takes_the_memory_of_one(tmp_path: Path) -> None:
    """Each has 3 million pixels, 1.8 GB for all of them; 208 MiB were measured, of which 93 are the process itself."""
    raw = tmp_path / "raw"
    raw.mkdir()
    picture(2000, 1500).save(raw / "0.jpg")
    for number in range(1, 200):
        shutil.copy(raw / "0.jpg", raw / f"{number}.jpg")
    assert sharded(tmp_path, [Part("image", uri=f"{number}.jpg") for number in range(200)]) < 300


@pytest.mark.parametrize(("minutes", "most"), [(0.5, 360), (20, 850)])
def test_a_sound_of_twenty_minutes_takes_its_file_and_what_is_kept_of_it(
    minutes: float, most: int, tmp_path: Path
) -> None:
    """106 MB at 44.1 kHz. Half a minute of it is kept, or all: 270 and 627 MiB were measured."""
    (tmp_path / "raw").mkdir()
    minute = np.random.default_rng(0).integers(-9000, 9000, 60 * 44_100, np.int16).tobytes()
    with wave.open(str(tmp_path / "raw/long.wav"), "wb") as file:
        file.setparams((1, 2, 44_100, 0, "NONE", ""))
        for _ in range(20):
            file.writeframes(minute)
    assert sharded(tmp_path, [Part("audio", uri="long.wav")], 60 * minutes) < most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "channels", "how", "most"),
    [
        ("plain.jpg", 3, {}, 280),
        ("progressive.jpg", 3, {"progressive": True}, 450),
        ("plain.png", 3, {"compress_level": 1}, 750),
        ("alpha.png", 4, {"compress_level": 1}, 750),
        ("plain.webp", 3, {"method": 0}, 750),
    ],
)
def test_a_picture_of_64_million_pixels(
    name: str, channels: int, how: dict[str, Any], most: int, tmp_path: Path
) -> None:
    """The largest that is read at all: 192 MB as bytes. Measured: 177, 330, 537, 469 and 528 MiB."""
    (tmp_path / "raw").mkdir()
    picture(8000, 8000, channels).save(tmp_path / "raw" / name, **how)
    assert sharded(tmp_path, [Part("image", uri=name)]) < most
