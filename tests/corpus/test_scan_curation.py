"""Curation inside a scan: everything is accounted for, whatever the order of the lines."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.records import read_rows
from mmlm.corpus.scan import scan
from mmlm.errors import DataError
from tests.corpus.samples import png

WORDS = [
    "rain",
    "falls",
    "softly",
    "on",
    "old",
    "stone",
    "walls",
    "while",
    "children",
    "sing",
    "songs",
    "near",
    "river",
    "banks",
    "sun",
]


def config(**curate: Any) -> ScanConfig:
    source = {
        "kind": "table", "files": "*.jsonl", "map": {"id": "id", "split": "split", "source": "from"},
        "ask": [{"task": "mood", "text": "text", "label": "label"}],
    }  # fmt: skip
    return parse(ScanConfig, {"sources": [source], "curate": curate}, "scan.yaml")


def lines() -> list[dict[str, Any]]:
    rng = random.Random(0)

    def row(name: str, text: str, split: str = "train", source: str = "web") -> dict[str, Any]:
        return {"id": name, "text": text, "label": "ab"[rng.random() < 0.5], "split": split, "from": source}

    texts = [" ".join(rng.choice(WORDS) for _ in range(30)) for _ in range(40)]
    rows = [row(f"r{i:02d}", text, "test" if i % 4 == 0 else "train") for i, text in enumerate(texts)]
    rows.append({**rows[1], "id": "zz-copy"})
    rows.append(row("zz-near", texts[1] + " again"))
    rows.append(row("near-test", texts[4] + " again"))  # of a test record: it may not be learnt
    rows.append(row("mail", "写信给 li.lei@example.cn 或者打电话 13812345678 谢谢", source="forum"))
    rows.append(row("short", "no", source="forum"))
    return rows


def made(folder: Path, rows: list[dict[str, Any]], **curate: Any) -> Artifact:
    (folder / "data").mkdir(parents=True)
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "data/t.jsonl").write_text(text, encoding="utf-8")
    return scan(config(**curate), data=folder / "data", out=folder / "manifest")


STEPS: dict[str, Any] = {
    "quality": {
        "min_words": 3, "min_stop_words": None, "repeats": False, "min_word_length": None, "max_word_length": None,
        "min_alphabetic": 0.5,
    },
    "pii": {}, "exact": {}, "near_text": {}, "contamination": {},
}  # fmt: skip


def test_what_is_dropped_or_changed_is_told_and_counted(tmp_path: Path) -> None:
    manifest = made(tmp_path, lines(), **STEPS)
    counts = manifest.counts
    told = {
        (row["step"], row["action"], row["id"]) for row in pq.read_table(manifest.path / "curation.parquet").to_pylist()
    }
    assert {id for _, action, id in told if action == "dropped"} == {"zz-copy", "zz-near", "near-test", "short"}
    assert ("exact", "dropped", "zz-copy") in told
    assert ("pii", "changed", "mail") in told
    assert counts["found"] == 45 == counts["kept"] + counts["refused"] + counts["dropped"]
    assert counts["dropped"] == 4
    rows = {row["id"]: row for row in read_rows(manifest.path)}
    text = rows["mail"]["parts"][0]["text"]
    assert "li.lei" not in text and "13812345678" not in text and "谢谢" in text
    assert manifest.extra["curation"]["quality"]["forum"]["dropped"] == 1


def test_the_order_of_the_lines_does_not_matter(tmp_path: Path) -> None:
    rows = lines()
    shuffled = random.Random(3).sample(rows, len(rows))
    assert made(tmp_path / "a", rows, **STEPS).digest == made(tmp_path / "b", shuffled, **STEPS).digest


POINTS = {
    "comparing texts": ("open", ".curating/text-0/signature"),
    "what was compared is removed": ("shutil.rmtree", ".curating"),
    "records written": ("os.rename", ".records-00000.parquet."),
    "refused written": ("os.rename", ".refused.parquet."),
    "curation written": ("os.rename", ".curation.parquet."),
    "all but the last file is there": ("os.rename", ".artifact.json."),
    "the last file is there": ("os.remove", ".work.json"),
}
"""Where a scan is killed: the Python audit event, and what its path has in it."""
KILLED = """
import json, os, signal, sys
from pathlib import Path
from tests.corpus.test_scan_curation import POINTS, STEPS, config
from mmlm.corpus.scan import scan

def die(event, arguments):
    if event == wanted and f"/manifest/{path}" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

root = Path(sys.argv[1])
ended = {}
for name, (wanted, path) in POINTS.items():
    if not (child := os.fork()):
        sys.addaudithook(die)
        scan(config(**STEPS), data=root / "data", out=root / name / "manifest")
        os._exit(0)
    ended[name] = os.waitpid(child, 0)[1]
print(json.dumps(ended))
"""


def contents(folder: Path) -> dict[str, bytes | dict[str, Any]]:
    """Relative name → bytes of every file in `folder`, hidden ones too; of `artifact.json` without its times."""
    found: dict[str, bytes | dict[str, Any]] = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if not path.is_dir()
    }
    told = json.loads((folder / "artifact.json").read_text())
    return found | {"artifact.json": {k: v for k, v in told.items() if k not in ("seconds", "created")}}


def test_killed_anywhere_the_rerun_gives_the_same_manifest_and_leaves_nothing(tmp_path: Path) -> None:
    wanted = contents(made(tmp_path, lines(), **STEPS).path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    assert {name: os.WTERMSIG(status) for name, status in ended.items()} == dict.fromkeys(POINTS, signal.SIGKILL)
    for name in POINTS:
        out = tmp_path / name / "manifest"
        assert (out / "artifact.json").exists() == (name == "the last file is there"), name
        assert {str(path.relative_to(out)) for path in out.rglob("*")} - wanted.keys(), f"nothing lay about: {name}"
        scan(config(**STEPS), data=tmp_path / "data", out=out)
        assert contents(out) == wanted, name


@pytest.mark.slow
def test_killed_with_sorted_runs_on_disk_the_rerun_gives_the_same_manifest(tmp_path: Path) -> None:
    """60,000 records are more than a sorter holds, and enough for several processes to sign texts."""
    rng, first = random.Random(1), lines()
    more = [{**first[0], "id": f"m{i:05d}", "text": " ".join(rng.choices(WORDS, k=12))} for i in range(60_000)]
    wanted = contents(made(tmp_path, [*first, *more], **STEPS).path)
    run = KILLED[: KILLED.index("root = ")] + (
        "scan(config(**STEPS), data=Path(sys.argv[1]) / 'data', out=Path(sys.argv[1]) / 'again/manifest')"
    )
    out = tmp_path / "again/manifest"
    for seen in (".spool/run-00000.parquet", ".curating/text-0/row", ".curating/text-0/count", ".records-00000.*.tmp"):
        with subprocess.Popen([sys.executable, "-c", run, str(tmp_path)], start_new_session=True) as scanning:
            while not list(out.glob(seen)):
                assert scanning.poll() is None, f"it ended with {scanning.returncode} before there was a {seen}"
                time.sleep(0.002)
            scanning.kill()
        assert scanning.returncode == -signal.SIGKILL
        deadline = time.monotonic() + 30  # the processes that it started see that it is gone
        while subprocess.run(["pgrep", "-s", str(scanning.pid)], capture_output=True).stdout:
            assert time.monotonic() < deadline, "processes of a killed scan live on"
            time.sleep(0.05)
    scan(config(**STEPS), data=tmp_path / "data", out=out)
    assert contents(out) == wanted


def test_off_by_default(tmp_path: Path) -> None:
    manifest = made(tmp_path, lines())
    assert manifest.counts["kept"] == 45
    assert not (manifest.path / "curation.parquet").exists()


def test_nothing_left_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="curation dropped 45 of 45"):
        made(tmp_path, lines(), quality={"min_words": 10_000})


def test_several_questions_about_one_picture_are_no_copies(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    asked = [("Which colour is it?", "red"), ("How many are there?", "three")]
    rows = []
    for i in range(6):
        # the last two pictures are the same one, and so are both of their records
        (data / f"{i}.png").write_bytes(png(min(i, 4), 64))
        rows += [{"id": f"{i}-{q}", "image": f"{i}.png", "text": t, "answer": a} for q, (t, a) in enumerate(asked)]
    (data / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = {
        "kind": "table", "files": "*.jsonl", "map": {"id": "id", "image": "image"},
        "ask": [{"task": "vqa", "text": "text", "answer": "answer"}],
    }  # fmt: skip
    settings = parse(ScanConfig, {"sources": [source], "curate": {"near_images": {}}}, "scan.yaml")
    manifest = scan(settings, data=data, out=tmp_path / "manifest")
    assert manifest.counts["dropped"] == 2
    kept = {row["id"] for row in read_rows(manifest.path)}
    assert {f"{i}-{q}" for i in range(4) for q in range(2)} < kept and len(kept) == 10
