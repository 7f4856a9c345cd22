"""Faults between the points: damage done while no run was there, and what lies around the last file."""

from __future__ import annotations

import pytest

from mmlm import artifacts
from mmlm.artifacts import Work
from mmlm.shards.shard import shard
from tests.faults.corpus import config
from tests.faults.stage import Stage

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
