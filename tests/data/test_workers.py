"""Batches made by processes: the same, whatever their number; and how they end."""

from __future__ import annotations

import gc
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.channel import describe, rebuild
from mmlm.data.config import DataConfig
from mmlm.data.loader import Loader
from mmlm.errors import ArtifactError, ConfigError, DataError, MmlmError, WorkLost
from mmlm.features.failures import SampleError
from mmlm.shards.packs import FOLDER
from mmlm.world import World
from tests.data.test_loader import PACKED, damage, features, rows


def loader(shards: Path, workers: int, rank: int = 0, ranks: int = 1, **changes: Any) -> Loader:
    config = parse(DataConfig, {**PACKED, **changes}, "test")
    return Loader(shards, config, 5, World(rank, ranks), steps=50, workers=workers)


@pytest.fixture(scope="module")
def alone(mixed: Artifact) -> Loader:
    return loader(mixed.path, 0)


ALL = [(w, r, p) for w in (0, 1, 2) for r in (1, 2, 3, 4) for p in (1, 2)]
FEW = {(1, 2, 2), (2, 1, 1)}


@pytest.mark.parametrize(
    ("workers", "ranks", "pieces"),
    [pytest.param(*one, marks=[] if one in FEW else [pytest.mark.slow]) for one in ALL],
)
def test_the_same_batches_from_any_number_of_processes(
    mixed: Artifact, alone: Loader, workers: int, ranks: int, pieces: int
):
    parts = [loader(mixed.path, workers, rank, ranks) for rank in range(ranks)]
    for step in (0, 1, 2, 40, 7, 1000):  # in order, and after seeking
        found = [b for part in parts for b in part.batches(step, pieces)]
        wanted = alone.batch(step)
        assert [row for b in found for row in rows(b)] == rows(wanted)
        for a, b in zip(features(found), features([wanted]), strict=True):
            assert torch.equal(a, b)
    for part in parts:
        part.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_ahead_of_its_pinning_is_the_same(mixed: Artifact, alone: Loader, workers: int):
    config = parse(DataConfig, PACKED, "test")
    one = Loader(
        mixed.path, config, 5, World(), steps=50, workers=workers, pin=True
    )  # without a GPU all but the pinning
    for step in (0, 1, 2, 30, 31, 49, 3):
        assert [rows(b) for b in one.batches(step, 2)] == [rows(b) for b in alone.batches(step, 2)]
    one.close()


def test_batches_are_made_before_they_are_wanted(mixed: Artifact, alone: Loader):
    """A worker that is frozen meanwhile has the next one ready."""
    one = loader(mixed.path, 1)
    assert rows(one.batch(0)) == rows(alone.batch(0))
    assert one._pool is not None
    (worker,) = one._pool._workers
    assert select.select([worker.channel], [], [], 60)[0], "nothing came ahead"
    time.sleep(0.5)  # its first byte is there, and the rest of it
    worker.process.send_signal(signal.SIGSTOP)
    try:
        assert rows(one.batch(1)) == rows(alone.batch(1))
    finally:
        worker.process.send_signal(signal.SIGCONT)
    assert rows(one.batch(2)) == rows(alone.batch(2))
    one.close()


def test_a_batch_stays_as_it_is_while_it_is_held(mixed: Artifact, alone: Loader):
    one = loader(mixed.path, 1)
    held = [one.batch(step) for step in range(8)]
    kept = [rows(b) for b in held]
    patches = [b.patches_PD.clone() for b in held]
    for step in range(8, 16):
        one.batch(step)
    assert [rows(b) for b in held] == kept == [rows(alone.batch(step)) for step in range(8)]
    assert all(torch.equal(b.patches_PD, p) for b, p in zip(held, patches, strict=True))
    assert one._pool
    count = len(one._pool._workers[0].memories)
    del held
    gc.collect()
    for step in range(16, 40):
        one.batch(step)
    assert len(one._pool._workers[0].memories) == count  # memory that nobody reads is written again
    one.close()


def test_workers_load_no_torch_and_leave_no_name_in_shared_memory(mixed: Artifact):
    before = set(os.listdir("/dev/shm"))
    one = loader(mixed.path, 1)
    one.batch(0)
    assert one._pool
    pid = one._pool._workers[0].process.pid
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    assert set(os.listdir("/dev/shm")) == before
    one.close()
    assert not Path(f"/proc/{pid}").exists()


def test_errors_come_back_as_themselves(tmp_path: Path, mixed: Artifact):
    folder = Path(shutil.copytree(mixed.path, tmp_path / "shards"))
    loader(folder, 0)  # makes the plan
    one = loader(folder, 2)
    for shard in folder.glob("train-*.tar"):
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"train-0000.* bytes; wanted"):
        one.batch(0)
    one.close()
    (folder / "manifest.parquet").unlink()
    with pytest.raises((FileNotFoundError, MmlmError)):
        loader(folder, 1)


@pytest.mark.parametrize(
    "error",
    [
        DataError("x", wanted="y", cure="z"),
        SampleError("too_long", "x"),
        KeyError("k"),
        ValueError("a", 3),
        MemoryError(),
    ],
)
def test_an_error_as_plain_values(error: Exception):
    again = rebuild(describe(error))
    assert isinstance(error, type(again)) and str(again) == str(error)
    assert type(again) is type(error) or type(again) is DataError


def test_a_worker_that_is_killed_is_missed(mixed: Artifact):
    one = loader(mixed.path, 1)
    one.batch(0)
    assert one._pool
    os.kill(one._pool._workers[0].process.pid, signal.SIGKILL)
    with pytest.raises(WorkLost, match="ended with -9") as caught:
        [one.batch(step) for step in range(1, 20)]
    assert caught.value.exit_code == 4  # the same command goes on


def test_damage_is_told_by_whoever_meets_it(tmp_path: Path, mixed: Artifact, capfd: pytest.CaptureFixture[str]):
    folder = Path(shutil.copytree(mixed.path, tmp_path / "shards"))
    loader(folder, 0)
    key = damage(folder, 2)
    one, other = loader(folder, 2), loader(folder, 0)
    assert [one.batch(s).ids for s in range(20)] == [other.batch(s).ids for s in range(20)]
    assert f"/{key} is damaged" in capfd.readouterr().err
    one.close()


def test_a_worker_that_starts_after_a_repair_has_the_plan_of_its_parent(tmp_path: Path, mixed: Artifact):
    folder = Path(shutil.copytree(mixed.path, tmp_path / "shards", ignore=shutil.ignore_patterns(FOLDER)))
    sound = {path: path.read_bytes() for path in folder.glob("train-*.tar")}
    damage(folder, 3)
    one, other = loader(folder, 1), loader(folder, 0)
    assert one.left_out == 1
    for path, data in sound.items():
        path.write_bytes(data)
    assert loader(folder, 0).left_out == 0  # the plan is made anew
    assert [one.batch(s).ids for s in range(20)] == [other.batch(s).ids for s in range(20)]
    one.close()
    late = loader(folder, 1)
    shutil.rmtree(folder / FOLDER)
    with pytest.raises(ArtifactError, match=r"the pack plan .* is gone"):
        late.batch(0)
    late.close()


def test_a_number_of_workers_that_is_none(mixed: Artifact, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MMLM_DATA_WORKERS", "many")
    with pytest.raises(ConfigError, match="MMLM_DATA_WORKERS is 'many'"):
        Loader(mixed.path, parse(DataConfig, PACKED, "test"), 1, World())


CHILD = """
import os, sys, time
from pathlib import Path
from tests.data.test_workers import loader
one = loader(Path(sys.argv[1]), 2)
one.batch(0)
print(*(w.process.pid for w in one._pool._workers), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_workers_end_with_their_parent(mixed: Artifact, end: signal.Signals):
    parent = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(mixed.path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout
    pids = [int(p) for p in parent.stdout.readline().split()]
    assert len(pids) == 2
    os.killpg(
        parent.pid, end
    ) if end == signal.SIGTERM else parent.kill()  # SIGTERM goes to all, as a scheduler sends it
    parent.wait(30)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
