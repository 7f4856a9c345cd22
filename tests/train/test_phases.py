"""Where a step's time goes, as metrics.jsonl tells it, against times that are known beforehand and against the clock."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from mmlm.artifacts import Artifact
from mmlm.launch.local import ranks
from tests.train.runs import SMALL

PIECES, INSIDE, BESIDE, LOOK = 2, 0.15, 0.1, 1.0
"""Micro-batches of a step; seconds that each takes more in its forward pass, and outside of it; of a look at validation."""


@pytest.mark.slow  # 25 s
def test_what_is_outside_the_arithmetic_and_what_is_in_it_add_up_to_the_step(keypad_shards: Artifact, tmp_path: Path):
    config: dict[str, Any] = {
        **SMALL, "steps": 12, "save_every": 6, "accumulate": PIECES, "validation": {"every": 3, "records": 32},
    }  # fmt: skip
    arguments = {"config": config, "shards": str(keypad_shards.path), "out": str(tmp_path)}
    times = {"inside": INSIDE, "beside": BESIDE, "look": LOOK}
    ranks(1)("tests.train.targets:train_slowly", {**arguments, **times}, log=tmp_path / "logs")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "outside" in row["metrics"]]
    assert [row["step"] for row in rows] == list(range(1, 13))
    walls, outside, inside = {}, {}, {}
    for before, row in pairwise(rows):  # the first one holds the start as well
        walls[row["step"]] = (row["time"] - before["time"]) / 1000
        seen = row["metrics"]
        outside[row["step"]] = seen["outside"] * seen["step_seconds"]
        inside[row["step"]] = (1 - seen["outside"]) * seen["step_seconds"]
        assert 0 <= seen["data_wait"] <= seen["outside"] < 1
    looked, plain = (
        (4, 10),
        (2, 3, 5, 6, 8, 9, 11, 12),
    )  # a look, or a save (and a look), comes before the row of the next step
    for step in plain:
        assert inside[step] + outside[step] == pytest.approx(walls[step], abs=0.15), step
    for step in looked:
        assert walls[step] >= inside[step] + outside[step] + LOOK - 0.1, step
    for step in inside:  # every second is where it was spent
        assert inside[step] >= PIECES * INSIDE - 0.01 and outside[step] >= PIECES * BESIDE - 0.01, step
    assert median(inside[step] for step in plain) < PIECES * INSIDE + 0.15
    assert median(outside[step] for step in (*plain, *looked)) < PIECES * BESIDE + 0.15  # no look in it
    # a save is outside, with it its pass over the probe batch, for which the model is slow as it is in a look
    assert (
        outside[7] > LOOK + INSIDE + BESIDE + PIECES * BESIDE - 0.05 and walls[7] >= inside[7] + outside[7] + LOOK - 0.1
    )
