"""Configs: everything wrong at once, with a suggestion; overrides; no secrets at rest."""

from __future__ import annotations

from typing import Any

import pytest

from mmlm.config import Config, apply_override, blank_credentials, identity, parse, resolved, split_override
from mmlm.errors import ConfigError
from mmlm.train.config import TrainConfig


class Inner(Config):
    rate: float = 1.0


class Outer(Config):
    seed: int = 0
    inner: Inner = Inner()
    uri: str = ""


def test_every_problem_is_listed_with_a_suggestion():
    with pytest.raises(ConfigError) as caught:
        parse(Outer, {"sede": 1, "inner": {"rate": "fast", "raet": 2}}, "outer.yaml")
    said = str(caught.value)
    assert "outer.yaml" in said
    assert "`sede`, did you mean `seed`" in said
    assert "`inner.raet`, did you mean `rate`" in said or "`inner.raet`, did you mean `inner.rate`" in said
    assert "`inner.rate` = 'fast'" in said


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"model": {"fusion": "addd"}}, "`model.fusion`: there is no 'addd', did you mean 'add'?"),
        ({"model": {"kind": "cnn", "layers": 2}}, "unknown key `model.layers` (known: kind, channels"),
        ({"optimizer": {"kind": "sgd"}}, "`optimizer`: there is no 'sgd' (known: adamw, lion, muon)"),
        ({"model": {"heads": 3}}, "`model` = {"),
        ({"compile": True, "zero": {"stage": 3}}, "train.yaml: compile does not work at zero.stage 3"),
        ({"freeze": [{"modules": ["image"], "endd": 3}]}, "unknown key `freeze.0.endd`, did you mean `end`?"),
    ],
)
def test_keys_in_messages_are_those_that_were_written(data: dict[str, Any], words: str):
    with pytest.raises(ConfigError) as caught:
        parse(TrainConfig, data, "train.yaml")
    assert words in str(caught.value) and "_kind" not in str(caught.value)


@pytest.mark.parametrize("data", [[1], "text", 3])
def test_a_file_that_is_no_mapping_is_refused(data: Any):
    with pytest.raises(ConfigError, match="mapping"):
        parse(Outer, data, "outer.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("true", True), ("[1, 2]", [1, 2]), ("words here", "words here"), ("1e-3", "1e-3"), ("0.001", 0.001)],
)
def test_overrides_are_read_as_yaml(text: str, value: Any):
    data: dict[str, Any] = {"train": {"seed": 0}}
    apply_override(data, "train.data.batch", text)
    assert data == {"train": {"seed": 0, "data": {"batch": value}}}


def test_a_rate_in_scientific_notation_is_a_number_all_the_same():
    data: dict[str, Any] = {}
    apply_override(data, "optimizer.lr", "1e-3")
    assert parse(TrainConfig, data, "train").optimizer.lr == 0.001


def test_an_override_does_not_replace_a_value_by_a_section():
    with pytest.raises(ConfigError, match="not a section"):
        apply_override({"train": 3}, "train.seed", "1")


@pytest.mark.parametrize(
    ("key", "written", "then"),
    [
        (
            "schedule.kind=cosine",
            {"schedule": {"kind": "wsd", "decay": 0.1, "floor": 0.2}},
            {"kind": "cosine", "floor": 0.2},
        ),
        ("schedule.kind=wsd", {"schedule": {"kind": "wsd", "decay": 0.1}}, {"kind": "wsd", "decay": 0.1}),
        ("schedule.kind=cosine", {"schedule": {"decya": 0.1}}, {"kind": "cosine", "decya": 0.1}),  # a slip stays one
        ("schedule.kind=linear", {"schedule": {"decay": 0.1}}, {"kind": "linear", "decay": 0.1}),
        ("schedule.floor=0.5", {"schedule": None}, {"floor": 0.5}),
        ("model.fusion.weight=0.5", {"model": {"fusion": "late"}}, {"fusion": {"kind": "late", "weight": 0.5}}),
    ],
)
def test_a_kind_takes_away_what_only_others_have(key: str, written: dict[str, Any], then: dict[str, Any]):
    data = {"train": written}
    apply_override(data, *split_override(f"train.{key}"), {"train": TrainConfig})
    assert data["train"][key.split(".")[0]] == then


@pytest.mark.parametrize("text", ["train.seed", "=1", "a b=1"])
def test_an_override_without_form_is_refused(text: str):
    with pytest.raises(ConfigError):
        split_override(text)


def test_configs_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        Outer().seed = 3  # type: ignore[misc]


def test_credentials_are_blanked_wherever_they_stand():
    assert blank_credentials("s3://key:secret@bucket/x") == "s3://***@bucket/x"
    assert resolved(Outer(uri="https://me:pw@host/path"))["uri"] == "https://***@host/path"
    assert blank_credentials("https://host/a@b") == "https://host/a@b"


def test_a_signature_is_neither_stored_nor_part_of_what_a_noun_is():
    signed = [Outer(uri=f"https://me:pw@host/get?file=a&X-Amz-Signature={name}&X-Amz-Expires=9") for name in "xy"]
    assert resolved(signed[0])["uri"] == "https://***@host/get?file=a"
    assert identity(signed[0]) == identity(signed[1])
