"""A hang ends with the stacks of every rank and a sentence, on real processes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mmlm.errors import WorkLost
from mmlm.launch.local import ranks
from mmlm.train.watchdog import GRACE, Watchdog
from mmlm.world import World


@pytest.mark.parametrize("locked", [False, True])
def test_a_hang_leaves_the_stacks_of_all_ranks(tmp_path: Path, locked: bool):
    arguments = {"out": str(tmp_path), "seconds": 2.0, "locked": locked}
    with pytest.raises(WorkLost, match=r"hangs: nothing came forward for 2 s in step 3") as caught:
        ranks(2)("tests.train.targets:hang", arguments, log=tmp_path / "logs")
    assert "run the same command again" in caught.value.cure
    assert caught.value.exit_code == 4
    for rank in range(2):
        assert "_stuck" in (tmp_path / "logs" / f"rank-{rank}.stacks").read_text(), rank


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
