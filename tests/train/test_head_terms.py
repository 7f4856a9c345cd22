"""Several classes at once, and numbers: the terms of the loss against the formulas written out."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from mmlm.data.collate import IGNORE, Batch, collate, field_rows
from mmlm.evals.read_head import read_head
from mmlm.features.sample import Sample
from mmlm.features.spec import TaskSpec
from mmlm.model.config import ModelConfig
from mmlm.model.transformer import FusedTransformer, Output
from mmlm.train.config import ContrastiveConfig, LossConfig
from mmlm.train.objectives import Answering, Distilling, loss_of
from tests.small import SPEC, sample

HEADED = SPEC.model_copy(
    update={
        "tasks": [
            *SPEC.tasks,
            TaskSpec(name="signs", labels=["cough", "fever", "rash", "tired"], multiple=True),
            TaskSpec(name="weight", number=(70.0, 10.0)),
        ]
    }
)


def net(seed: int = 0) -> FusedTransformer:
    torch.manual_seed(seed)
    model = FusedTransformer(ModelConfig(width=32, layers=1, heads=2), HEADED, len(field_rows(HEADED))).eval()
    model.label.weight.data *= 20  # heads begin near zero, where all models say the same
    return model


def samples() -> list[Sample]:
    made = [
        sample(i, task=task) for i, task in enumerate(["kind", "signs", "signs", "weight", "free", "weight", "signs"])
    ]
    made[1].labels, made[2].labels = ["fever", "tired"], []
    made[3].number, made[5].number = 74.0, 120.0
    return made  # the last one's classes are not known


def said(batch: Batch) -> Output:
    return Output(torch.zeros(0, HEADED.vocab_size), torch.randn(len(batch.answer_at_R), HEADED.head_rows) * 2)


def test_the_terms_are_their_formulas():
    batch, objective = collate(samples(), HEADED), Answering(LossConfig(labels=0.5, number=2.0), HEADED)
    assert objective.names == ("answer", "label", "labels", "number")
    counts = objective.counts(batch)
    assert (counts["label"], counts["labels"], counts["number"]) == (1, 2, 2)
    output = said(batch)
    terms = {part.name: part.term(output, batch) for part in objective.parts}
    head = output.label_RC.double()
    p = 1 / (1 + torch.exp(-head[:, 3:7]))
    wanted = -(p[1, [1, 3]].log().sum() + (1 - p[1, [0, 2]]).log().sum() + (1 - p[2]).log().sum())
    assert terms["labels"].sum.item() == pytest.approx(wanted.item(), rel=1e-5)
    wanted_number = 0.0
    for row, number in ((3, 74.0), (5, 120.0)):
        off = abs(float(head[row, 7]) - (number - 70) / 10)
        wanted_number += off**2 / 2 if off < 1 else off - 0.5
    assert terms["number"].sum.item() == pytest.approx(wanted_number, rel=1e-5)
    squared = Answering(LossConfig(number_error="squared"), HEADED).parts[-1].term(output, batch)
    truth = torch.tensor([0.4, 5.0], dtype=torch.float64)
    assert squared.sum.item() == pytest.approx(float((head[[3, 5], 7] - truth).square().sum() / 2), rel=1e-5)


def test_every_term_has_the_weight_that_was_given_to_it():
    """Of one run with all of them, against numbers written here."""
    weights = {"answer": 0.7, "label": 0.3, "labels": 0.5, "number": 2.0, "contrastive": 0.25, "z": 0.01}
    contrastive = ContrastiveConfig(weight=0.25, between=[("image", "audio")])
    config = LossConfig(answer=0.7, label=0.3, labels=0.5, number=2.0, z=0.01, contrastive=contrastive)
    torch.manual_seed(0)
    model = FusedTransformer(ModelConfig(width=32, layers=1, heads=2, embedding=8), HEADED, len(field_rows(HEADED)))
    batch, objective = collate(samples(), HEADED), Answering(config, HEADED)
    objective.prepare(model, [batch], torch.device("cpu"))
    counts, terms = objective.counts(batch), objective(model, batch)
    assert set(terms) == set(weights) and all(terms[name].sum > 0 and counts[name] > 0 for name in weights)
    wanted = sum(weight * terms[name].sum.item() / counts[name] for name, weight in weights.items())
    assert loss_of(terms, counts).item() == pytest.approx(wanted, rel=1e-5)


def test_the_loss_does_not_depend_on_how_the_batch_is_cut():
    model, objective, rows = net(), Answering(LossConfig(), HEADED), samples()
    whole = collate(rows, HEADED)
    counts = objective.counts(whole)
    loss = loss_of(objective(model, whole), counts)
    parts = [loss_of(objective(model, collate(rows[i : i + 3], HEADED)), counts) for i in (0, 3, 6)]
    assert sum(p.item() for p in parts) == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.label.weight.grad is not None and (model.label.weight.grad[3:] != 0).any(1).all()


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    model, batch = net(), collate(samples(), HEADED)
    objective = Distilling(LossConfig(), HEADED, copy.deepcopy(model), temperature=2.0, task=0.5)
    terms = objective(model, batch)
    for name in ("answer_kl", "label_kl", "labels_kl", "number_kl"):
        assert terms[name].sum.item() == pytest.approx(0, abs=1e-5), name
    other = Distilling(LossConfig(), HEADED, net(5), temperature=2.0, task=0.5)(model, batch)
    assert all(other[name].sum.item() > 1e-4 for name in ("answer_kl", "label_kl", "labels_kl", "number_kl"))


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(answer=0.5, z=1e-2), LossConfig(answer=0, z=1e-2)])
def test_distilling_is_the_weighted_sum_of_its_formulas(config: LossConfig):
    """The loss and its gradient against KL and cross-entropy of whole logits."""
    model, teacher, batch = net(), net(5), collate(samples(), HEADED)
    objective = Distilling(config, HEADED, teacher, temperature=2.0, task=0.25)
    counts = objective.counts(batch)
    terms = objective(model, batch)
    loss_of(terms, counts).backward()
    made = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    output, target = model(batch), batch.target_BT[batch.target_BT != IGNORE]
    logits, led = output.answer_AV, teacher(batch).answer_AV.detach()
    kl = F.kl_div((logits / 2).log_softmax(-1), (led / 2).softmax(-1), reduction="sum") * 4
    answer, square = F.cross_entropy(logits, target, reduction="sum"), logits.logsumexp(-1).square().sum()
    if config.answer:
        assert terms["answer_kl"].sum.item() == pytest.approx(kl.item(), rel=1e-5)
    assert terms["answer"].sum.item() == pytest.approx(answer.item(), rel=1e-5)
    words = config.answer * (kl + 0.25 * answer) + 0.25 * config.z * square
    rest = {n: t for n, t in terms.items() if n not in ("answer", "answer_kl", "z")}
    parts = {n: part.term(output, batch, 0.25) for part in objective.answering.parts for n in (part.name,)}
    with torch.no_grad():
        its = teacher(batch)
    parts |= {f"{p.name}_kl": p.led(output, its, batch, 2.0) for p in objective.answering.parts}
    assert parts.keys() == rest.keys()
    (words / counts["answer"] + loss_of(parts, counts)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(made[name], p.grad, atol=1e-6, rtol=1e-4)


def test_what_the_head_says_is_a_set_or_a_number():
    head = torch.tensor([0.0, 0.0, 0.0, 2.0, -1.0, 0.5, -3.0, 0.25])
    found = read_head(head, "signs", HEADED)
    assert found is not None and found.labels == ["cough", "rash"] and found.answer == "cough, rash"
    p = {k: 1 / (1 + math.exp(-v)) for k, v in zip(["cough", "fever", "rash", "tired"], [2, -1, 0.5, -3], strict=True)}
    assert found.label_scores == pytest.approx(p, abs=1e-6)
    assert found.score == pytest.approx(p["cough"] * (1 - p["fever"]) * p["rash"] * (1 - p["tired"]), rel=1e-5)
    number = read_head(head, "weight", HEADED)
    assert number is not None and number.number == pytest.approx(72.5) and number.score is None
    assert read_head(head, "free", HEADED) is None


def test_specs_without_such_tasks_keep_their_digest():
    """Checkpoints and shard sets made before there were sets and numbers still fit each other."""
    data = SPEC.model_dump(mode="json", exclude={"encoders"})
    for task in data["tasks"]:
        assert task.pop("multiple") is False and task.pop("number") is None
    assert data["image"].pop("padding") == "keep" and data["image"].pop("scale") == "relative"
    from mmlm.storage import sha256_json

    assert SPEC.digest == sha256_json(data) != HEADED.digest


def test_one_label_in_a_task_of_several_is_a_set_of_one():
    one = dataclasses.replace(samples()[1], labels=None, label="rash")
    batch = collate([one], HEADED)
    assert batch.labels_RL.tolist() == [[0, 0, 1, 0]] and batch.label_R.tolist() == [-100]
