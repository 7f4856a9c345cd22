"""Asking a registered model the raw test records again, where the answers kept with it do not cover them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlm.corpus.records import Part, Record, read_records
from mmlm.errors import ArtifactError
from mmlm.evals import texts
from mmlm.evals.answer import Answer
from mmlm.features.failures import SampleError
from mmlm.features.sample import Sample
from mmlm.publish.answering import Responder
from mmlm.publish.gate import Row
from mmlm.storage import read_uri

CHUNK = 256


def answers_to(
    model: str, tracking_uri: str, asked: Sequence[dict[str, Any]], row: Row, *, manifest: Path, data: Path | str
) -> list[dict[str, Any]]:
    """What `model` answers to the records that `asked` (rows of predictions) names, in the same order and form.

    Each record becomes features by the model's own spec. One that it cannot read counts as wrong. Raises ArtifactError
    when the manifest lacks a record.
    """
    responder = Responder.load(model, tracking_uri=tracking_uri)
    wanted = {a["id"]: a for a in asked}
    given = frozenset(row.modalities.split("+")) - {"text"}
    found: dict[str, dict[str, Any]] = {}
    pending: list[Record] = []

    def flush() -> None:
        samples = {r.id: s for r in pending if (s := _sample(responder, r, data)) is not None}
        answers = dict(zip(samples, responder.answerer.answer(list(samples.values()), given=given), strict=True))
        for record in pending:
            found[record.id] = graded(wanted[record.id], answers.get(record.id))
        pending.clear()

    for record in read_records(manifest):
        if record.id in wanted and record.task == row.task:
            pending.append(record)
            if len(pending) >= CHUNK:
                flush()
    if pending:
        flush()
    if len(found) < len(wanted):
        raise ArtifactError(
            f"the manifest lacks {len(wanted) - len(found)} of the {len(wanted)} records that were evaluated",
            cure="run `mmlm run` again from scan on",
        )
    return [found[a["id"]] for a in asked]


def _sample(responder: Responder, record: Record, data: Path | str) -> Sample | None:
    def read(part: Part) -> bytes:
        return read_uri(part.uri or "", data)

    try:
        return responder.encode(record, read)
    except SampleError:
        return None


def graded(asked: dict[str, Any], answer: Answer | None) -> dict[str, Any]:
    """An answer as a row of predictions: right when class or classes (else text) are the expected ones."""
    if answer is None:
        nothing = {"predicted_labels": None, "predicted_number": None}
        return {**asked, "answer": None, "predicted": None, "score": 0.0, "correct": False, **nothing}
    if asked["label"] is not None and answer.label is not None:
        correct = asked["label"] == answer.label
    elif asked.get("labels") is not None and answer.labels is not None:
        correct = set(asked["labels"]) == set(answer.labels)
    else:
        correct = texts.normalise(answer.answer) == texts.normalise(asked["expected"] or "")
    return {
        **asked, "answer": answer.answer, "predicted": answer.label, "score": answer.score, "correct": correct,
        "predicted_labels": answer.labels, "predicted_number": answer.number,
    }  # fmt: skip
