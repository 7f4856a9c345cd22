"""The points themselves, the published list of cells, and two quick cells; the other cells are slow."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from mmlm.shards.faultpoints import POINTS, VARIABLE, point
from mmlm.shards.shard import shard
from tests.faults.cells import FAULTS, PLACES, TABLE, cells, document
from tests.faults.corpus import MODALITIES, RECORDS, config
from tests.faults.stage import ROOT, Hold, Stage, marked, one_line, wait_for


def test_points_do_nothing_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    point("mid_tar")
    for wanted in (f"after_fsync={tmp_path}", f"mid_tar:2={tmp_path}", f"mid={tmp_path}"):
        monkeypatch.setenv(VARIABLE, wanted)
        point("mid_tar")
    assert [path.name for path in tmp_path.iterdir()] == ["arrived-1"]


def test_the_nth_arrival_over_all_processes_is_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hold = Hold(tmp_path, "after_fsync", nth=3)
    monkeypatch.setenv(VARIABLE, hold.environment[VARIABLE])
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=point, args=("after_fsync",), daemon=True) for _ in range(4)]
    for process in processes:
        process.start()
    wait_for("one held", hold.pid, 20)
    wait_for("three done", lambda: [p.pid for p in processes if p.is_alive()] == [hold.pid()], 20)
    assert hold.arrivals() == 4
    assert not hold.passed()
    hold.go()
    for process in processes:
        process.join(20)
    assert hold.passed()
    assert [process.exitcode for process in processes] == [0] * 4


@pytest.mark.parametrize("modality", ["text"])
def test_a_run_passes_every_point(stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    units = 2
    small = config().model_copy(update={"shard_records": RECORDS // units})
    for name in POINTS:
        hold = Hold(tmp_path / f"hold-{name}", name, nth=99)
        monkeypatch.setenv(VARIABLE, hold.environment[VARIABLE])
        shard(small, stage.corpus.manifest, data=stage.corpus.data, out=tmp_path / name)
        assert hold.arrivals() == (1 if name == "before_manifest" else units)


def test_the_table_has_every_combination() -> None:
    assert list(TABLE) == list(FAULTS)
    assert tuple(PLACES) == POINTS
    for fault, row in TABLE.items():
        assert list(row) == list(POINTS), fault
        for cell in row.values():
            assert bool(cell.how) != bool(cell.cannot)
    assert sum(len(cells(fault)) for fault in FAULTS) == 93
    assert len(MODALITIES) == 3


def test_the_published_list_is_the_table() -> None:
    assert (ROOT / "docs/faults.md").read_text(encoding="utf-8") == document(), (
        "write it again: python -m tests.faults.cells > docs/faults.md"
    )


@pytest.mark.parametrize("modality", ["image"])
def test_a_driver_killed_mid_tar_loses_nothing(stage: Stage) -> None:
    run = stage.start("mid_tar", nth=4)
    assert run.held() == run.process.pid
    assert stage.journal() == 3
    assert len(list((stage.out / ".tmp").glob("*.tar"))) == 1
    kept = stage.published()
    run.kill()
    assert marked(run.mark) == []
    stage.run_again()
    assert kept.items() <= stage.published().items()
    stage.as_undisturbed()


@pytest.mark.parametrize("modality", ["audio"])
def test_a_second_submission_is_refused_and_takes_over_from_a_dead_one(stage: Stage) -> None:
    first = stage.start("after_publish", nth=2)
    first.held()
    second = stage.start()
    assert second.end() == 2
    assert "another process is working on" in one_line(second)
    first.kill()
    assert len(stage.published()) == stage.journal() + 1  # linked, and not yet in the journal
    stage.run_again()
    stage.as_undisturbed()
    counts = json.loads((stage.out / "artifact.json").read_text())["counts"]
    assert counts["samples"] == counts["records"] == 40
