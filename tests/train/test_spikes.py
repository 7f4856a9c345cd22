"""Poisoned records on real ranks: the step changes nothing, evidence is kept, many of them roll the training back."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from mmlm.artifacts import Artifact
from mmlm.data.config import DataConfig
from mmlm.data.loader import Loader
from mmlm.errors import DataError
from mmlm.launch.local import ranks
from mmlm.train import checkpoint, ledger
from mmlm.world import World
from tests.train.runs import SMALL, losses
from tests.train.test_ledger import planned


def run(
    shards: Artifact, out: Path, count: int, config: dict[str, Any], ids: list[str], loss: float = math.nan
) -> None:
    arguments = {"config": config, "shards": str(shards.path), "out": str(out), "ids": ids, "loss": loss}
    ranks(count)("tests.train.targets:train_poisoned", arguments, log=out / "logs")


LEAP = r"the loss leapt to [\d.]+ from about [\d.]+ ± [\d.]+"


@pytest.mark.parametrize(("loss", "reason"), [(math.nan, "the loss is nan"), (50.0, LEAP)], ids=["nan", "leap"])
def test_a_poisoned_step_changes_nothing_and_is_kept(keypad_shards: Artifact, tmp_path: Path, loss: float, reason: str):
    config = {**SMALL, "steps": 10, "save_every": 5, "spikes": {"warmup": 4}}
    wanted = planned(keypad_shards, config)
    poisoned = wanted[6][7]  # on the second of two ranks
    run(keypad_shards, tmp_path / "model", 2, config, [poisoned], loss)
    evidence = json.loads((tmp_path / "model" / "evidence" / "step-00000007.json").read_text())
    assert re.fullmatch(reason, evidence["reason"]) and evidence["ids"] == wanted[6]
    assert ledger.effective(tmp_path / "model") == {**wanted, 6: []}
    told = losses(tmp_path / "model")
    assert told.keys() == set(range(1, 11)) - ({7} if math.isnan(loss) else set()) and told.get(7, 100) >= 100
    saved = checkpoint.newest(tmp_path / "model" / "checkpoints")
    assert saved is not None and saved.state["scalars"]["updates"] == 9
    assert all(t.isfinite().all() for named in saved.tensors().values() for t in named.values())


@pytest.mark.slow
def test_going_on_over_a_skipped_step_is_as_never_stopped(keypad_shards: Artifact, tmp_path: Path):
    config = {**SMALL, "steps": 6, "save_every": 3, "keep": 9, "validation": {"every": 3, "records": 9}}
    poisoned, out = planned(keypad_shards, config)[2][0], tmp_path / "model"  # the step after which both are due
    run(keypad_shards, out, 1, config, [poisoned])
    assert checkpoint.steps(out / "checkpoints") == {3, 6}
    before = {step: checkpoint.read(out / "checkpoints", step) for step in (3, 6)}
    rows = looks(out)
    (out / "checkpoints").rename(tmp_path / "before")  # killed before its first save
    run(keypad_shards, out, 1, config, [poisoned])
    assert looks(out) == rows and sorted(rows) == [3, 6]
    for step, first in before.items():
        again = checkpoint.read(out / "checkpoints", step).state
        assert tensors(again) == tensors(first.state)
        assert all(again[key] == first.state[key] for key in ("guard", "validation", "scalars")), step
    assert before[3].state["guard"]["bad"] == [2]


def tensors(state: dict[str, Any]) -> dict[str, str]:
    """File → hash, without that of the state, which tells how long things took."""
    return {name: digest for name, digest in state["sha256"].items() if name != checkpoint.STATE}


def looks(out: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["metrics"] for row in rows if "val/loss" in row["metrics"]}


def test_many_bad_steps_roll_back_and_are_not_seen_again(keypad_shards: Artifact, tmp_path: Path):
    spikes = {"rollback_after": 3, "window": 10}
    config = {**SMALL, "steps": 16, "save_every": 4, "spikes": spikes}
    wanted = planned(keypad_shards, config)
    out = tmp_path / "model"
    probe = set(Loader(keypad_shards.path, DataConfig(batch=12), 0, World()).probe().ids)
    run(keypad_shards, out, 1, config, [next(i for i in wanted[step] if i not in probe) for step in (9, 10, 11)])
    effective = ledger.effective(out)
    skipped = [step for step, ids in effective.items() if not ids]
    assert skipped == [8, 9, 10, 11]  # back to 8; the bad three, and what there was of three before them
    assert {step: ids for step, ids in effective.items() if ids} == {s: wanted[s] for s in wanted if s not in skipped}
    assert json.loads((out / "evidence" / "skipped.json").read_text())["rollbacks"] == 1
    assert json.loads((out / "counts.json").read_text())["rollbacks"] == 1
    assert "rolled back to step 8" in (out / "logs" / "rank-0.log").read_text()


@pytest.mark.slow
def test_what_never_gets_better_ends_in_a_sentence(keypad_shards: Artifact, tmp_path: Path):
    spikes = {"rollback_after": 2, "window": 10, "give_up_after": 1}
    config = {**SMALL, "steps": 15, "save_every": 4, "spikes": spikes}
    wanted = planned(keypad_shards, config)
    with pytest.raises(DataError, match=r"were bad .* after 1 roll-backs") as caught:
        run(keypad_shards, tmp_path / "model", 2, config, [wanted[step][0] for step in (10, 11, 12, 13)])
    assert "evidence" in caught.value.cure


@pytest.mark.slow
def test_a_roll_back_that_was_killed_is_brought_to_its_end(keypad_shards: Artifact, tmp_path: Path):
    config, out = {**SMALL, "steps": 8, "save_every": 4}, tmp_path / "model"
    run(keypad_shards, out, 1, config, [])
    first = {step: tensors(checkpoint.read(out / "checkpoints", step).state) for step in (4, 8)}
    told = {"steps": {"4": "bad"}, "rollbacks": 1, "settled": [4], "going_back": 4}  # the later one is still there
    (out / "evidence").mkdir(exist_ok=True)
    (out / "evidence" / "skipped.json").write_text(json.dumps(told))
    run(keypad_shards, out, 1, config, [])
    second = {step: tensors(checkpoint.read(out / "checkpoints", step).state) for step in (4, 8)}
    assert second[4] == first[4] and second[8] != first[8]
    assert json.loads((out / "evidence" / "skipped.json").read_text())["going_back"] is None
