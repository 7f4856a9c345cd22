"""The kill matrix: every cell of tests/faults/cells.py. All slow; `make faults` runs them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.cells import FAULTS, cells
from tests.faults.cluster import Cluster
from tests.faults.corpus import IN_ONE_SHARD, RECORDS
from tests.faults.stage import (
    Hold,
    Stage,
    failing_calls,
    fill_blocks,
    fill_inodes,
    make_room,
    marked,
    one_line,
    small_disk,
    wait_for,
    workers_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
UNITS = RECORDS // IN_ONE_SHARD
ON_RAY = {"ray_from": RECORDS}
IN_WORKER = ("before_temporary", "mid_tar", "after_fsync")


def cells_of(fault: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return pytest.mark.parametrize(("point", "modality"), cells(fault))


@cells_of("worker_killed")
def test_worker_killed(stage: Stage, point: str) -> None:
    run = stage.start(point, nth=3, **ON_RAY)
    held = run.held()
    if point in IN_WORKER:
        assert held != run.process.pid
        os.kill(held, signal.SIGKILL)
    else:
        workers = workers_of(run.mark)
        assert workers
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        assert run.hold
        run.hold.go()
    assert run.end() == 0, run.words()
    if point in IN_WORKER:
        assert run.hold
        assert run.hold.arrivals() == UNITS + 1  # one unit of rework, no more
    stage.as_undisturbed()
    before = stage.published()
    stage.run_again(**ON_RAY)
    assert stage.published() == before
    stage.as_undisturbed()


@cells_of("driver_killed")
def test_driver_killed(stage: Stage, point: str) -> None:
    run = stage.start(point) if point == "before_manifest" else stage.start(point, nth=3, **ON_RAY)
    run.held()
    wait_for("a unit in the journal", stage.journal)
    run.kill()
    kept = {row: inode for row, inode in stage.published().items() if row in stage.journalled()}
    assert kept
    stage.run_again(ray_from=run.ray_from)  # at once: workers of the dead driver may still be at it
    assert kept.items() <= stage.published().items()  # what was in the journal is not made again
    stage.as_undisturbed()


@cells_of("node_stopped")
def test_node_stopped(stage: Stage, cluster: Cluster, point: str) -> None:
    in_worker = point in IN_WORKER
    hold = Hold(stage.folder / "second", point) if in_worker else None
    with cluster.second(hold) as node:
        run = stage.start("" if in_worker else point, address=cluster.address)
        if hold:
            wait_for("a worker of the second node at the point", hold.pid)
            assert hold.pid() in workers_of(node.mark)
        else:
            assert run.held() == run.process.pid
        node.kill()
        wait_for("the head's first unit", cluster.hold.pid)
        cluster.hold.go()
        if run.hold:
            run.hold.go()
        assert run.end() == 0, run.words()
        stage.as_undisturbed()


@cells_of("disk_full")
def test_disk_full(stage: Stage, point: str) -> None:
    fill = fill_inodes if point in ("before_temporary", "after_fsync") else fill_blocks
    with small_disk(stage.folder / "disk") as disk:
        stage.out = disk / "shards"
        on_ray = point in ("before_temporary", "mid_tar")
        nth = 1 if point in ("after_publish", "before_manifest") else 2  # the first row of the journal needs a block
        run = stage.start(point, nth, workers=1, **(ON_RAY if on_ray else {}))
        run.held()
        wait_for("the units before it in the journal", lambda: stage.journal() >= nth - 1)
        fill(disk)
        assert run.hold
        run.hold.go()
        assert run.end() == 2, run.words()
        assert "the disk is full" in one_line(run)
        assert not (stage.out / "artifact.json").exists()
        make_room(disk)
        stage.run_again(ray_from=run.ray_from)
        stage.as_undisturbed()


@cells_of("publish_fails")
def test_publish_fails(stage: Stage, point: str) -> None:
    calls, whens = {
        "after_fsync": ("?link,linkat", (1, 2)),
        "after_publish": ("fsync", (1,)),
        "before_manifest": ("?rename,?renameat,renameat2", (1, 2)),
    }[point]
    for when in whens:
        run = stage.start(point, nth=1 if point == "before_manifest" else 3 - when)
        pid = run.held()
        with failing_calls(pid, calls, when, stage.folder / f"strace-{when}.txt"):
            assert run.hold
            run.hold.go()
            code = run.end()
        assert code == 2
        assert "Input/output error" in one_line(run)
        assert not (stage.out / "artifact.json").exists()
    stage.run_again()
    stage.as_undisturbed()


@cells_of("zombie_worker")
def test_zombie_worker(stage: Stage, cluster: Cluster, point: str) -> None:
    in_worker = point in IN_WORKER
    hold = Hold(stage.folder / "second", point if in_worker else "mid_tar")
    with cluster.second(hold) as node:
        nth = UNITS if point == "after_publish" else 1  # the unit that was taken over comes last
        run = stage.start("" if in_worker else point, nth, address=cluster.address)
        wait_for("a worker of the second node at the point", hold.pid)
        zombie = hold.pid()
        assert zombie in workers_of(node.mark)
        node.freeze()
        wait_for("the head's first unit", cluster.hold.pid)
        cluster.hold.go()
        if in_worker:
            assert run.end() == 0, run.words()
            stage.as_undisturbed()
        else:
            run.held()
        before = _state(stage.out)
        hold.go()
        os.kill(zombie, signal.SIGCONT)  # the worker alone: its raylet, which would end it, stays frozen
        wait_for("the zombie went on", hold.passed, 30)
        time.sleep(1.5)  # a unit takes it some milliseconds
        assert _visible(stage.out) == {name: what for name, what in before.items() if not name.startswith(".tmp/")}
        if run.hold:
            late = [name for name in _state(stage.out) if name.endswith(".index.parquet") and name not in before]
            assert late  # it did finish its tar, beside the one that was taken
            run.hold.go()
            assert run.end() == 0, run.words()
    stage.as_undisturbed()


@cells_of("submitted_twice")
def test_submitted_twice(stage: Stage, point: str) -> None:
    first = stage.start(point, nth=1 if point == "before_manifest" else 3)
    first.held()
    second = stage.start()
    assert second.end() == 2
    assert "another process is working on" in one_line(second)
    assert str(stage.out) in one_line(second)
    assert first.process.poll() is None
    assert first.hold
    first.hold.go()
    assert first.end() == 0, first.words()
    stage.as_undisturbed()
    before = _state(stage.out)
    stage.run_again()
    assert _state(stage.out) == before


@pytest.mark.parametrize("modality", ["image"])
def test_a_file_system_without_hard_links(stage: Stage) -> None:
    """Not in the table: every link is refused, as FAT and many network file systems do; the bytes are the same."""
    run = stage.start("before_temporary")
    with failing_calls(run.held(), "?link,linkat", "1+", stage.folder / "strace.txt", "EPERM"):
        assert run.hold
        run.hold.go()
        assert run.end() == 0, run.words()
    stage.as_undisturbed()


@pytest.mark.parametrize("modality", ["text"])
def test_no_worker_is_left_before_the_manifest(stage: Stage) -> None:
    """Why two combinations of the table cannot exist."""
    run = stage.start("before_manifest", **ON_RAY)
    assert run.held() == run.process.pid
    assert stage.journal() == UNITS
    assert marked(run.mark) == [run.process.pid]
    assert run.hold
    run.hold.go()
    assert run.end() == 0, run.words()
    stage.as_undisturbed()


def _state(out: Path) -> dict[str, tuple[int, int, int]]:
    """File → (inode, size, time of change) of everything in a shard set but its lock."""
    found = {}
    for path in out.rglob("*"):
        if path.is_file() and path.name != ".lock":
            stat = path.stat()
            found[str(path.relative_to(out))] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


def _visible(out: Path) -> dict[str, tuple[int, int, int]]:
    return {name: what for name, what in _state(out).items() if not name.startswith(".tmp/")}


def test_every_fault_has_its_cells() -> None:
    assert all(f"test_{fault}" in globals() for fault in FAULTS)
