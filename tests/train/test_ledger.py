"""The ledger test: killed again and again, resumed on other numbers of ranks, every step saw the records it should."""

from __future__ import annotations

import itertools
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from mmlm import spool
from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.loader import Loader
from mmlm.errors import ArtifactError
from mmlm.train import ledger
from mmlm.train.config import TrainConfig
from mmlm.world import World
from tests.train.runs import SMALL, Training, losses, saved


def planned(shards: Artifact, config: dict[str, Any]) -> dict[int, list[str]]:
    """step → ids of an uninterrupted training, from the loader alone."""
    settings = parse(TrainConfig, config, "test")
    loader = Loader(shards.path, settings.data, settings.seed, World(), settings.steps)
    return {step: list(loader.batch(step).ids) for step in range(settings.steps)}


def strike(run: Training, kind: str) -> None:
    victims = run.ranks()
    if kind == "driver":
        victims = [run.process.pid]
    elif kind == "rank":
        victims = victims[-1:]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)


def killed_at(run: Training, step: int, kind: str) -> bool:
    """Kill it once `step` is in its ledger; whether it was there to be killed."""
    run.until(f"step {step}", lambda: run.step() >= step)
    alive = run.process.poll() is None
    if alive:
        strike(run, kind)
        assert run.end() != 0, run.words()
    return alive


def as_planned(found: dict[int, list[str]], wanted: dict[int, list[str]], records: int) -> None:
    """The same ids in the same order, none missing and none twice within an epoch."""
    assert found == wanted
    ids = [name for step in sorted(found) for name in found[step]]
    for epoch in range(len(ids) // records):
        assert len(set(ids[epoch * records : (epoch + 1) * records])) == records, epoch


def test_a_killed_rank_and_a_resume_on_another_number_of_ranks(keypad_shards: Artifact, tmp_path: Path):
    config = {**SMALL, "steps": 24}
    out = tmp_path / "model"
    assert killed_at(Training(keypad_shards, out, 2, config), 13, "rank")
    first = saved(out)
    assert 12 <= first < 24
    again = Training(keypad_shards, out, 1, config)
    assert again.end() == 0, again.words()
    assert f"going on from step {first}, proved on the probe batch" in again.words()
    records = len(Loader(keypad_shards.path, parse(TrainConfig, config, "t").data, 0, World()).reader)
    as_planned(ledger.effective(out), planned(keypad_shards, config), records)
    assert sorted(losses(out)) == list(range(1, 25))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_kills_on_one_two_and_three_ranks(keypad_shards: Artifact, tmp_path: Path):
    config, rng, out = {**SMALL, "steps": 90, "save_every": 3}, random.Random(5), tmp_path / "model"
    kills = 0
    for kind, ranks in zip(
        itertools.cycle(["rank", "all ranks", "driver"]), itertools.cycle([2, 3, 1, 2, 1, 3]), strict=False
    ):
        target = saved(out) + rng.randrange(0, 7)
        kills += killed_at(Training(keypad_shards, out, ranks, config), target, kind)
        if kills == 10:
            break
    last = Training(keypad_shards, out, 2, config)
    assert last.end() == 0, last.words()
    attempts = list(ledger._rows(out / "ledger" / "attempts.jsonl"))
    print([(row["first"], row["ranks"]) for row in attempts])
    assert len(attempts) >= 10
    whole = Training(keypad_shards, tmp_path / "whole", 1, config)
    assert whole.end() == 0, whole.words()
    records = len(Loader(keypad_shards.path, parse(TrainConfig, config, "t").data, 0, World()).reader)
    as_planned(ledger.effective(out), planned(keypad_shards, config), records)
    as_planned(ledger.effective(out), ledger.effective(tmp_path / "whole"), records)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_loss_curve_of_the_same_number_of_ranks_is_bit_equal(keypad_shards: Artifact, tmp_path: Path):
    model = {**SMALL["model"], "dropout": 0.1}
    config, rng = {**SMALL, "steps": 40, "save_every": 3, "model": model}, random.Random(1)
    whole = Training(keypad_shards, tmp_path / "whole", 2, config)
    assert whole.end() == 0, whole.words()
    out = tmp_path / "model"
    for kind in ("rank", "driver", "all ranks"):
        assert killed_at(Training(keypad_shards, out, 2, config), saved(out) + rng.randrange(2, 8), kind)
    last = Training(keypad_shards, out, 2, config)
    assert last.end() == 0, last.words()
    assert losses(out) == losses(tmp_path / "whole")
    same = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "whole")]
    assert same[0] == same[1]


def test_effective_is_the_last_attempt_at_or_before_a_step(tmp_path: Path):
    folder = tmp_path / "ledger"
    folder.mkdir()
    for row in ({"attempt": 1, "first": 0, "ranks": 2}, {"attempt": 2, "first": 2, "ranks": 1}):
        spool.append(folder / "attempts.jsonl", row)
    for rank, step, name in ((0, 0, "a"), (1, 0, "b"), (0, 1, "c"), (1, 1, "d"), (0, 2, "x"), (1, 2, "y"), (0, 3, "z")):
        spool.append(folder / f"rank-{rank}.jsonl", {"attempt": 1, "step": step, "ids": [name]})
    spool.append(folder / "rank-0.jsonl", {"attempt": 2, "step": 2, "ids": ["e", "f"]})
    spool.append(folder / "rank-0.jsonl", {"attempt": 2, "step": 3, "ids": ["g"], "skipped": "the loss is nan"})
    assert ledger.effective(tmp_path) == {0: ["a", "b"], 1: ["c", "d"], 2: ["e", "f"], 3: []}
    (folder / "rank-1.jsonl").unlink()
    with pytest.raises(ArtifactError, match="no row of step 0 by rank 1"):
        ledger.effective(tmp_path)
