"""Peak memory of whole processes: it is bounded by settings and limits, not by the corpus or the size of a record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.scan import scan

TRAIN = """
import sys
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


def test_a_tokenizer_is_trained_in_the_same_memory_whatever_the_size_of_the_corpus(tmp_path: Path) -> None:
    """It learns of 2 MB. Four times the corpus, 128 MB instead of 32, takes no more than a few MB for the batches."""
    peaks = [
        peak(TRAIN, long_texts(tmp_path / f"{count}", count).path, tmp_path) for count in (4096, 16_384)
    ]
    assert peaks[1] - peaks[0] < 16, peaks
