"""The gate: champion and challenger answer the same test records; the alias goes to the better one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmlm.errors import ArtifactError
from mmlm.evals import texts
from mmlm.evals.statistics import compare
from mmlm.features.spec import FeatureSpec, TaskSpec
from mmlm.publish.config import GateConfig

PREDICTIONS = "gate/predictions.parquet"
"""Where a registered version's run keeps the answers that the next gate reads."""

NO_NUMBER = -1e9
"""What `mae` gives an answer that is no number, as of a record that an older model cannot read."""


@dataclass(frozen=True)
class Row:
    """Which row of the report is compared."""

    task: str
    metric: str
    modalities: str


@dataclass(frozen=True)
class Verdict:
    """Whether the alias moves, and why. Values are those of the compared row; `difference` is challenger − champion
    with its 95 % interval."""

    promote: bool
    reason: str
    task: str
    metric: str
    modalities: str
    n: int
    value: float
    champion: str | None = None
    champion_value: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    probability_better: float | None = None
    p_value: float | None = None

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def choose(config: GateConfig, spec: FeatureSpec, predictions: pa.Table) -> Row:
    """The compared row, where the config leaves it open: first task, its usual metric, everything given.

    Raises ArtifactError when the report holds no such answers.
    """
    tasks = list(dict.fromkeys(predictions["task"].to_pylist()))
    task = config.task or next((t.name for t in spec.tasks if t.name in tasks), "")
    if task not in tasks:
        raise ArtifactError(f"the report has no task `{task}`", wanted=" or ".join(tasks), cure="change gate.task")
    metric = config.metric or _usual_metric(spec.task(task))
    rows = predictions.filter(pc.equal(predictions["task"], task))
    given = list(dict.fromkeys(rows["given"].to_pylist()))
    modalities = config.modalities or max(given, key=lambda name: name.count("+"))
    if modalities not in given:
        raise ArtifactError(
            f"the report has no row `{modalities}` of {task}", wanted=" or ".join(given), cure="change gate.modalities"
        )
    return Row(task, metric, modalities)


def _usual_metric(task: TaskSpec) -> str:
    if task.number:
        return "mae"
    return "f1" if task.multiple else "accuracy" if task.labels else "chrf"


def read_predictions(path: Path, model: str | None = None) -> pa.Table:
    """Answers to the test split; with `model`, only that one's. Raises ArtifactError when there are none."""
    filters = pc.field("split") == "test"
    if model is not None:
        filters &= pc.field("model") == model
    table = pq.read_table(path, filters=filters)
    if not len(table):
        raise ArtifactError(
            f"{path} has no answers of {model or 'a model'} to the test split",
            cure="evaluate with splits: [test] first",
        )
    return table


def select(table: pa.Table, row: Row) -> list[dict[str, Any]]:
    """The answers of one row of the report, by record id."""
    chosen = table.filter(pc.and_(pc.equal(table["task"], row.task), pc.equal(table["given"], row.modalities)))
    return sorted(chosen.to_pylist(), key=lambda r: r["id"])


def value_of(answer: dict[str, Any], metric: str) -> float:
    """The metric of a single record, in [0, 1]; of a number its error, from 0 down, so that more is better here too."""
    if metric == "accuracy":
        return float(answer["correct"])
    if metric == "f1":
        held, said = set(answer["labels"] or ()), set(answer["predicted_labels"] or ())
        return 2 * len(held & said) / (len(held) + len(said)) if held or said else 1.0
    if metric == "mae":
        said_number = answer["predicted_number"]
        return NO_NUMBER if said_number is None else -abs(answer["number"] - said_number)
    if metric == "exact_match":
        return float(texts.normalise(answer["answer"] or "") == texts.normalise(answer["expected"] or ""))
    import sacrebleu

    return float(sacrebleu.sentence_chrf(answer["answer"] or "", [answer["expected"] or ""]).score) / 100


def decide(
    config: GateConfig,
    row: Row,
    challenger: Sequence[dict[str, Any]],
    champion: Sequence[dict[str, Any]] | None,
    name: str | None,
) -> Verdict:
    """Compare answers to the same records, both sorted by id. `champion` None: there is none yet."""
    values = [value_of(a, row.metric) for a in challenger]
    value = sum(values) / len(values)
    base: dict[str, Any] = {**asdict(row), "n": len(values), "value": value}
    what = f"{row.task} {row.metric} {value:.3f} (n {len(values)}, {row.modalities})"
    if config.min_value is not None and value < config.min_value:
        return Verdict(False, f"{what} is below the wanted {config.min_value:g}", **base)
    if champion is None or name is None:
        return Verdict(True, f"{what}; there was no champion", **base)
    if [a["id"] for a in champion] != [a["id"] for a in challenger]:
        raise ValueError("the two models answered different records")
    before = [value_of(a, row.metric) for a in champion]
    groups = [str(a["group"] or a["id"]) for a in challenger]
    found: dict[str, Any] = {**compare(before, values, groups)}
    champion_value = sum(before) / len(before)
    better = found["probability_better"]
    promote = better >= config.confidence
    sentence = (
        f"{what} against {champion_value:.3f} of {name}: difference {found['difference']:+.3f} "
        f"[{found['low']:+.3f}, {found['high']:+.3f}], better with probability {better:.2f}, "
        f"{'enough' if promote else 'not enough'} for the wanted {config.confidence:g}"
    )
    return Verdict(promote, sentence, **base, champion=name, champion_value=champion_value, **found)
