"""A hang ends with the stacks of every rank and a sentence, on real processes."""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mmlm.artifacts import Artifact
from mmlm.data.plan import FOLDER
from mmlm.errors import WorkLost
from mmlm.launch.local import ranks
from mmlm.train.watchdog import GRACE, START_STEPS, Watchdog
from mmlm.world import World
from tests.train.runs import SMALL


@pytest.mark.parametrize("locked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_hang_leaves_the_stacks_of_all_ranks(tmp_path: Path, locked: bool):
    """And it tells of a checkpoint only where there is one: where the interpreter's lock is held, nothing was saved yet."""
    arguments = {"out": str(tmp_path), "seconds": 2.0, "locked": locked}
    if not locked:
        (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    with pytest.raises(WorkLost, match=r"hangs: nothing came forward for 2 s in step 3") as caught:
        ranks(2)("tests.train.targets:hang", arguments, log=tmp_path / "logs")
    goes_on = "it begins anew: there was no checkpoint yet" if locked else "it continues from the last checkpoint"
    assert caught.value.cure.endswith(f"rank-*.stacks; run the same command again, {goes_on}")
    assert caught.value.exit_code == 4
    for rank in range(2):
        assert "_stuck" in (tmp_path / "logs" / f"rank-{rank}.stacks").read_text(), rank


@pytest.mark.slow
def test_waiting_for_the_pack_plan_is_no_hang(keypad_shards: Artifact, tmp_path: Path):
    shards = Path(shutil.copytree(keypad_shards.path, tmp_path / "shards"))
    data = {"batch": 12, "pack": {"kind": "best_fit"}}
    config = {**SMALL, "steps": 2, "data": data}
    arguments: dict[str, Any] = {"config": config, "shards": str(shards), "out": str(tmp_path / "model"), "ids": []}
    folder = shards / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # another test may have packed these shards
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:  # as another process does that packs
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(30.0, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        began = time.monotonic()
        ranks(1)("tests.train.targets:train_poisoned", {**arguments, "loss": 1.0, "hang": 5.0}, log=tmp_path / "logs")
    assert time.monotonic() - began > 30


@pytest.mark.slow  # it waits for 18 s
@pytest.mark.parametrize("target", ["mmlm.train.train:on_rank", "tests.train.targets:train_poisoned"])
def test_a_start_that_hangs_is_ended_in_the_end(keypad_shards: Artifact, tmp_path: Path, target: str):
    """In what comes before the loop, as the command runs it, and in the loop's own planning."""
    shards = Path(shutil.copytree(keypad_shards.path, tmp_path / "shards"))
    config = {**SMALL, "steps": 2, "data": {"batch": 12, "pack": {"kind": "best_fit"}}}
    arguments: dict[str, Any] = {"config": config, "shards": str(shards), "out": str(tmp_path / "model")}
    if target.startswith("tests"):
        arguments |= {"ids": [], "loss": 1.0, "hang": 1.5}
    else:
        arguments |= {"where": {"hang_seconds": 1.5}}
    (shards / FOLDER).mkdir(exist_ok=True)
    with (shards / FOLDER / ".lock").open("w") as lock:  # of a process that never comes to an end
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(WorkLost, match=f"nothing came forward for {START_STEPS * 1.5:g} s in its start"):
            ranks(1)(target, arguments, log=tmp_path / "model" / "logs")
    assert "find_plan" in (tmp_path / "model" / "logs" / "rank-0.stacks").read_text()


def test_a_long_look_is_no_hang_and_a_time_limit_leaves_room_for_it(keypad_shards: Artifact, tmp_path: Path):
    config = {**SMALL, "validation": {"every": 4, "records": 1000}}
    arguments = {"config": config, "shards": str(keypad_shards.path), "out": str(tmp_path), "chunk": 1.5, "hang": 2.0}
    ranks(1)("tests.train.targets:slow_looks", arguments, log=tmp_path / "logs")
    told = json.loads((tmp_path / "asked.json").read_text())
    assert told["look"] >= 1.5 * told["chunks"] > 2 + GRACE, told
    assert told["asked"] == {"0": False, "1": False, "2": True, "3": True}


def test_what_is_expected_to_take_long_may(tmp_path: Path):
    with Watchdog(0.3, tmp_path, World(), "train") as dog:
        dog.beat("saving step 2", 1.0)
        time.sleep(1.2)
        dog.beat("step 3")
        assert dog._limit == 0.3
    assert list(tmp_path.iterdir()) == []


def test_beats_keep_it_quiet_and_nothing_is_left(tmp_path: Path):
    with Watchdog(0.5, tmp_path, World(), "train") as dog:
        for step in range(8):
            dog.beat(f"step {step}")
            time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


def test_who_comes_forward_after_all_goes_on(tmp_path: Path):
    with Watchdog(0.3, tmp_path, World(), "train") as dog:
        time.sleep(0.8)
        dog.beat("step 2")
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            dog.beat("step 2")
            time.sleep(0.05)
    assert "test_watchdog" in (tmp_path / "rank-0.stacks").read_text()
    assert not list(tmp_path.glob("*.error.json"))
