"""Scores against scikit-learn, sacrebleu and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from sklearn import metrics

from mmlm.evals import scores, texts


def value(score, n: int) -> float:  # type: ignore[no-untyped-def]
    return float(score(np.ones((1, n), dtype=np.float32))[0])


def some_answers(n: int = 300, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, classes, n)
    return truth, np.where(rng.random(n) < 0.6, truth, rng.integers(0, classes - 1, n))


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_precision_recall_f1_agree_with_sklearn(average: str) -> None:
    truth, given = some_answers()
    found = scores.class_scores(truth, given, 7)  # two classes never occur: they must not count
    wanted = metrics.precision_recall_fscore_support(truth, given, average=average, zero_division=0)
    for name, number in zip(("precision", "recall", "f1"), wanted[:3], strict=True):
        assert value(found[f"{name}_{average}"], len(truth)) == pytest.approx(number, abs=1e-6)
    assert value(found["accuracy"], len(truth)) == pytest.approx(metrics.accuracy_score(truth, given))


def test_weights_are_the_same_as_repeated_records() -> None:
    truth, given = some_answers(60)
    times = np.random.default_rng(0).integers(0, 4, 60)
    chosen = np.repeat(np.arange(60), times)
    weighted = scores.class_scores(truth, given, 5)["f1_macro"](times[None].astype(np.float32))[0]
    assert weighted == pytest.approx(metrics.f1_score(truth[chosen], given[chosen], average="macro", zero_division=0))


def test_roc_auc_agrees_with_sklearn_with_ties_and_weights() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 200)
    score = np.round(rng.random(200) * 0.5 + truth * 0.3, 1)  # many ties
    table = np.stack([1 - score, score], axis=1)
    weights = rng.integers(0, 3, 200).astype(np.float32)
    area = scores.roc_auc(truth, table)
    assert value(area, 200) == pytest.approx(metrics.roc_auc_score(truth, score))
    assert area(weights[None])[0] == pytest.approx(metrics.roc_auc_score(truth, score, sample_weight=weights))


def test_roc_auc_of_many_classes_is_one_against_the_rest() -> None:
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 4, 150)
    table = rng.random((150, 4)) + np.eye(4)[truth]
    table /= table.sum(1, keepdims=True)
    wanted = metrics.roc_auc_score(truth, table, multi_class="ovr", average="macro")
    assert value(scores.roc_auc(truth, table), 150) == pytest.approx(wanted)
    assert np.isnan(value(scores.roc_auc(np.zeros(5, int), rng.random((5, 4))), 5)), "one class alone has no curve"


def test_curve_encloses_the_area() -> None:
    rng = np.random.default_rng(5)
    positive = rng.random(80) < 0.4
    score = np.round(rng.random(80) + positive * 0.4, 1)
    false, true = scores.roc_curve(positive, score)
    assert np.trapezoid(true, false) == pytest.approx(metrics.roc_auc_score(positive, score))


def test_confusion_and_calibration_by_hand() -> None:
    truth, given = np.array([0, 0, 1, 2]), np.array([0, 1, 1, -1])
    assert scores.confusion(truth, given, 3).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    error = scores.calibration_error(np.array([0.9, 0.9, 0.5, 0.5]), np.array([True, False, True, True]))
    # bin of 0.9: sure 0.9, right 0.5; bin of 0.5: sure 0.5, right 1; half of the records each
    assert value(error, 4) == pytest.approx(0.5 * 0.4 + 0.5 * 0.5)


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("Seven.", "Seven", True),
        ("七。", "七", True),
        (" ７ ", "7", True),  # full width
        ("cafe\u0301", "café", True),  # composed and decomposed
        ("seven", "Seven", False),
        ("七", "八", False),
        ("", "7", False),
    ],
)
def test_exact_match_normalises(answer: str, expected: str, same: bool) -> None:
    assert texts.exact_match([answer], [expected]).tolist() == [same]


ANSWERS = ["the cat sat on the mat", "a dog", "seven", "the house is blue today"]
EXPECTED = ["the cat sat on a mat", "a dog", "eight", "the house was blue today"]


def test_pooled_bleu_and_chrf_are_sacrebleus() -> None:
    langs = ["en"] * 4
    wanted = sacrebleu.BLEU(effective_order=True).corpus_score(ANSWERS, [EXPECTED]).score
    assert value(texts.pooled("bleu", ANSWERS, EXPECTED, langs), 4) == pytest.approx(wanted)
    assert value(texts.pooled("chrf", ANSWERS, EXPECTED, langs), 4) == pytest.approx(
        sacrebleu.CHRF().corpus_score(ANSWERS, [EXPECTED]).score
    )
    twice = texts.pooled("bleu", ANSWERS, EXPECTED, langs)(np.array([[2, 0, 1, 1]], dtype=np.float32))[0]
    chosen = [0, 0, 2, 3]
    again = sacrebleu.BLEU(effective_order=True).corpus_score(
        [ANSWERS[i] for i in chosen], [[EXPECTED[i] for i in chosen]]
    )
    assert twice == pytest.approx(again.score)


def test_chinese_bleu_counts_characters_as_words() -> None:
    answer, expected = ["今天天气很好"], ["今天天气不好"]
    wanted = sacrebleu.BLEU(tokenize="zh", effective_order=True).corpus_score(answer, [expected]).score
    for lang in ("zh", "zh_CN", "zh-TW"):
        assert value(texts.pooled("bleu", answer, expected, [lang]), 1) == pytest.approx(wanted)
    assert wanted > 20
    assert value(texts.pooled("bleu", answer, expected, ["en"]), 1) == 0, "as one word it is simply wrong"


def test_languages_are_pooled_each_by_its_own_words() -> None:
    answers, expected = ["今天天气很好", "a fine day"], ["今天天气不好", "a fine day"]
    both = value(texts.pooled("bleu", answers, expected, ["zh", "en"]), 2)
    alone = value(texts.pooled("bleu", answers[:1], expected[:1], ["zh"]), 1)
    assert alone < both < 100
