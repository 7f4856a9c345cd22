"""The gate's verdicts."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmlm.errors import ArtifactError
from mmlm.evals.predictions import PREDICTIONS
from mmlm.features.spec import FeatureSpec, TaskSpec
from mmlm.publish import gate
from mmlm.publish.config import GateConfig

ROW = gate.Row("digit", "accuracy", "text+image+audio")


def answers(right: set[int], n: int = 200) -> list[dict[str, Any]]:
    return [
        {
            "model": "student", "given": "text+image+audio", "split": "test", "id": f"{i:03}", "group": f"g{i}",
            "task": "digit", "lang": "en", "label": "1", "predicted": "1" if i in right else "2", "score": 1.0,
            "correct": i in right, "answer": "one" if i in right else "two", "expected": "one",
        }
        for i in range(n)
    ]  # fmt: skip


def test_the_first_model_is_champion_unless_it_is_too_bad() -> None:
    first = gate.decide(GateConfig(), ROW, answers({1, 2}), None, None)
    assert first.promote
    assert "no champion" in first.reason
    bad = gate.decide(GateConfig(min_value=0.9), ROW, answers({1, 2}), None, None)
    assert not bad.promote
    assert "0.9" in bad.reason


def test_better_worse_and_equal() -> None:
    good, poor = answers(set(range(190))), answers(set(range(150)))
    better = gate.decide(GateConfig(confidence=0.95), ROW, good, poor, "m/1")
    assert better.promote
    assert better.difference == pytest.approx(0.2)
    assert better.low is not None
    assert 0 < better.low < 0.2 < (better.high or 0)
    assert "m/1" in better.reason
    assert "+0.200" in better.reason
    worse = gate.decide(GateConfig(), ROW, poor, good, "m/1")
    assert not worse.promote
    assert worse.probability_better == 0
    assert gate.decide(GateConfig(), ROW, good, good, "m/1").promote, "an equal model must not be worse"
    assert not gate.decide(GateConfig(confidence=0.95), ROW, good, good, "m/1").promote


def test_a_small_lead_is_not_enough_for_production() -> None:
    new, old = answers(set(range(150))), answers(set(range(149)))
    assert gate.decide(GateConfig(), ROW, new, old, "m/1").promote
    assert not gate.decide(GateConfig(confidence=0.95), ROW, new, old, "m/1").promote


def test_only_the_same_records_are_compared() -> None:
    with pytest.raises(ValueError, match="different records"):
        gate.decide(GateConfig(), ROW, answers({1}, 10), answers({1}, 9), "m/1")


def test_metrics_of_single_answers() -> None:
    right, wrong = answers({0}, 2)
    assert [gate.value_of(a, "accuracy") for a in (right, wrong)] == [1, 0]
    assert [gate.value_of(a, "exact_match") for a in (right, wrong)] == [1, 0]
    assert gate.value_of(right, "chrf") == 1
    assert gate.value_of({**right, "answer": "ones"}, "chrf") > gate.value_of(wrong, "chrf")
    assert gate.value_of({**right, "answer": None}, "chrf") == 0


def test_which_row_is_compared(tmp_path: Any) -> None:
    rows = answers({1}, 4) + [{**a, "given": "text+image"} for a in answers({1}, 4)]
    rows += [{**a, "task": "name", "label": None} for a in answers({1}, 4)] + [{**a, "split": "val"} for a in rows]
    pq.write_table(pa.Table.from_pylist(rows, PREDICTIONS), tmp_path / "p.parquet")
    table = gate.read_predictions(tmp_path / "p.parquet", "student")
    assert set(table["split"].to_pylist()) == {"test"}
    spec = FeatureSpec(
        vocab_size=270, tokenizer_digest="x", max_len=9,
        tasks=[TaskSpec(name="digit", labels=["1", "2"]), TaskSpec(name="name", has_text=True)],
    )  # fmt: skip
    assert gate.choose(GateConfig(), spec, table) == ROW
    assert gate.choose(GateConfig(task="name"), spec, table) == gate.Row("name", "chrf", "text+image+audio")
    assert len(gate.select(table, gate.Row("digit", "accuracy", "text+image"))) == 4
    for config in (GateConfig(task="nmae"), GateConfig(modalities="text+smell")):
        with pytest.raises(ArtifactError, match="wanted"):
            gate.choose(config, spec, table)
    with pytest.raises(ArtifactError, match="no answers of teacher"):
        gate.read_predictions(tmp_path / "p.parquet", "teacher")
