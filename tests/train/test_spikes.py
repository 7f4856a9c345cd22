"""Poisoned records on real ranks: the step changes nothing, evidence is kept, many of them roll the training back."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.corpus.records import Part, Record, Target
from mmlm.data.config import DataConfig
from mmlm.data.loader import Loader
from mmlm.errors import DataError
from mmlm.launch.local import ranks
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard
from mmlm.tracking import NullTracker
from mmlm.train import checkpoint, ledger
from mmlm.train.config import TrainConfig
from mmlm.train.train import train
from mmlm.world import World
from tests.shards.conftest import write_manifest
from tests.train.runs import SMALL, losses
from tests.train.test_ledger import planned


def run(
    shards: Artifact, out: Path, count: int, config: dict[str, Any], ids: list[str], loss: float = math.nan
) -> None:
    arguments = {"config": config, "shards": str(shards.path), "out": str(out), "ids": ids, "loss": loss}
    ranks(count)("tests.train.targets:train_poisoned", arguments, log=out / "logs")


LEAP = r"the loss leapt to [\d.]+ from about [\d.]+ ± [\d.]+"


@pytest.mark.parametrize(
    ("loss", "reason"),
    [pytest.param(math.nan, "the loss is nan", id="nan"), pytest.param(50.0, LEAP, id="leap", marks=pytest.mark.slow)],
)
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


WORDS = ["red", "green", "blue", "small", "tree", "house", "runs", "sings", "sees", "under"]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """60 questions whose answer is always yes, and 60 alike that are answered with any words."""
    folder, rng, records = tmp_path_factory.mktemp("spoiled"), np.random.default_rng(0), []
    for number, source in itertools.product(range(60), ("good", "noise")):
        name, answer = f"{source}/{number:02d}", "yes" if source == "good" else " ".join(rng.permutation(WORDS)[:4])
        asked = Part("text", text=" ".join(rng.permutation(WORDS)[:3]))
        records.append(Record(name, (asked,), "say", Target(text=answer), "train", group=name, source=source))
    manifest = write_manifest(folder / "manifest", records, [{"name": "say", "has_text": True}])
    config = {"features": {"tokenizer": {"vocab_size": 300}, "max_len": 48}, "ray_from": 10**9}
    settings = parse(ShardConfig, config, "test")
    return shard(settings, manifest, data=folder, out=folder / "shards", workers=1, tracker=None)


def test_records_that_make_the_loss_leap_are_skipped_and_gone_back_before(
    spoiled: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Three batches of nothing but noise, of which the loss is as finite as it is large."""
    monkeypatch.setenv("MMLM_LEDGER", "1")
    phases = [
        {"share": share, "weights": {"good": 1 - noise, "noise": noise}} for share, noise in ((40, 0), (3, 1), (7, 0))
    ]
    config = {
        "steps": 50, "save_every": 16, "log_every": 1, "model": SMALL["model"], "optimizer": {"lr": 0.01},
        "data": {"batch": 8, "mixture": {"kind": "phases", "phases": phases}},
        "spikes": {"deviations": 3, "warmup": 20, "rollback_after": 3},
    }  # fmt: skip
    made = train(
        parse(TrainConfig, config, "test"), spoiled, out=tmp_path / "model", launch=ranks(2), tracker=NullTracker()
    )
    bad, before = [40, 41, 42], [37, 38, 39]
    for step in bad:
        evidence = json.loads((made.path / "evidence" / f"step-{step + 1:08d}.json").read_text())
        assert re.fullmatch(LEAP, evidence["reason"]) and len(evidence["ids"]) == 8
        assert all(name.startswith("noise/") for name in evidence["ids"])
    kept = json.loads((made.path / "evidence" / "skipped.json").read_text())
    assert [int(step) for step in kept["steps"]] == [*before, *bad] and kept["going_back"] is None
    assert (made.counts["skipped"], made.counts["rollbacks"]) == (6, 1)
    assert (
        "rolled back to step 32 (1 so far); 6 steps are skipped in all" in (made.path / "logs/rank-0.log").read_text()
    )
    effective = ledger.effective(made.path)
    assert [step for step, ids in effective.items() if not ids] == [*before, *bad]
    assert all(name.startswith("good/") for ids in effective.values() for name in ids)
    told = losses(made.path)
    assert told.keys() == {step + 1 for step in range(50)} - {step + 1 for step in (*bad, *before)}
    assert told[1] > 4 and all(told[step] < 0.1 for step in told if step > 25)  # as if there had been no noise
    rows = [json.loads(line)["metrics"] for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows if "skipped" in row and "loss" in row] == [6.0] * (5 + 7)  # from step 33 on
    saved = checkpoint.newest(made.path / "checkpoints")
    assert saved is not None and saved.state["scalars"]["updates"] == 44


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
