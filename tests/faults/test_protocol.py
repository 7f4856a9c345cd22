"""Faults between the points: damage done while no run was there, and what lies around the last file."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmlm import artifacts
from mmlm.artifacts import Work
from mmlm.shards.shard import shard
from tests.faults.corpus import NEVER, config
from tests.faults.stage import ROOT, Stage

pytestmark = pytest.mark.parametrize("modality", ["image"])


def test_shards_damaged_between_two_runs_are_made_again(stage: Stage) -> None:
    run = stage.start("after_publish", nth=4)
    run.held()
    run.kill()
    tar, other, whole = sorted(stage.journalled())
    flipped = bytearray((stage.out / tar).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (stage.out / tar).write_bytes(flipped)
    index = (stage.out / other).with_suffix(".index.parquet")
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    before = stage.published()
    stage.run_again()
    assert stage.published()[whole] == before[whole]
    stage.as_undisturbed()


def test_a_complete_shard_that_no_journal_knows_is_swept_away(stage: Stage) -> None:
    run = stage.start("after_publish", nth=4)
    run.held()
    run.kill()
    known = sorted(stage.journalled())[0]
    for stray in ("train-00099-0badcafe", "train-00001-0badcafe"):
        for ending in (".tar", ".index.parquet"):
            shutil.copy((stage.out / known).with_suffix(ending), stage.out / f"{stray}{ending}")
    stage.run_again()
    stage.as_undisturbed()


def flushed_and_named(log: Path) -> list[tuple[str, str]]:
    """(call, file) of what strace saw, in order: `fsync` with its file, `link` and `rename` with the new name.

    Random parts of temporary names are left out.
    """
    found = []
    for line in log.read_text().splitlines():
        if told := re.fullmatch(r'\d+ +(\w+)\((?:\d+<(.+)>|"(.+)", "(.+)")\) += 0', line):
            call, flushed, _, named = told.groups()
            path = Path(flushed or named)
            short = (
                re.sub(r"(?<=[-.])[0-9a-f]{32}\.", "", path.name).replace("-tar", ".tar").replace("-index", ".index")
            )
            found.append((call, f".tmp/{short}" if path.parent.name == ".tmp" else short))
    return found


def test_every_file_is_flushed_before_it_gets_its_name(stage: Stage, tmp_path: Path) -> None:
    if not shutil.which("strace"):
        pytest.skip("strace is not here (Debian and Ubuntu: apt-get install strace)")
    watched = ["strace", "-f", "-y", "-qq", "-e", "trace=fsync,fdatasync,link,rename", "-o", str(tmp_path / "log")]
    places = [str(stage.corpus.manifest.path), str(stage.corpus.data), str(stage.out), str(NEVER), "1"]
    run = [*watched, sys.executable, "-m", "tests.faults.driver", *places]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=100)
    if "ptrace" in done.stderr:
        pytest.skip(f"strace cannot attach here ({done.stderr.strip()})")
    assert done.returncode == 0, done.stderr
    seen = flushed_and_named(tmp_path / "log")
    names = sorted(path.stem for path in stage.out.glob("*.tar"))
    assert len(names) == 8
    first = seen.index(("fsync", f".tmp/{names[0]}.tar"))
    for number, name in enumerate(names):
        assert seen[first + 6 * number : first + 6 * number + 6] == [
            ("fsync", f".tmp/{name}.tar"), ("fsync", f".tmp/{name}.index.parquet"),
            ("link", f"{name}.index.parquet"), ("link", f"{name}.tar"), ("fsync", "shards"), ("fsync", ".journal.jsonl"),
        ]  # fmt: skip
    closing = seen[first + 6 * len(names) :]
    tables = [name for call, name in closing if call == "rename"]
    assert tables == ["quarantine.parquet", "manifest.parquet", "artifact.json", "corpus.html"]
    assert closing == [
        step for name in tables for step in (("fsync", f".{name}.tmp"), ("rename", name), ("fsync", "shards"))
    ]
    stage.as_undisturbed()


def test_a_run_killed_after_its_last_file_is_tidied_by_the_next(stage: Stage) -> None:
    stage.run_again()
    (stage.out / "corpus.html").unlink()
    (stage.out / ".tmp").mkdir()
    (stage.out / ".tmp" / "train-00000-late.tar").write_bytes(b"late")
    (stage.out / ".journal.jsonl").write_bytes(b"{}\n")
    (stage.out / ".work.json").write_bytes(b"{}\n")
    before = stage.published()
    stage.run_again()
    assert stage.published() == before
    stage.as_undisturbed()


def test_a_run_that_waited_for_the_lock_finds_the_work_done(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, before = Work.lock, {}

    def late(work: Work) -> None:  # the other run does all of its work after our look, and before our lock
        monkeypatch.setattr(Work, "lock", lock)
        stage.run_again()
        before.update(stage.published())
        lock(work)

    monkeypatch.setattr(Work, "lock", late)
    made = shard(config(), stage.corpus.manifest, data=stage.corpus.data, out=stage.out)
    assert made == artifacts.read(stage.out)
    assert stage.published() == before
    stage.as_undisturbed()
