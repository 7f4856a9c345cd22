"""Advice: rules that hold for data of each kind, and a train.yaml that training takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmlm import story as stories
from mmlm.advise import page
from mmlm.advise.facts import Facts, Machine, look
from mmlm.advise.rules import SIZES, advise
from mmlm.artifacts import Artifact
from mmlm.cli import main
from mmlm.config import parse
from mmlm.data.reader import ShardReader
from mmlm.features.encode import opened_length
from mmlm.features.spec import AudioSpec, EncoderSpec, FeatureSpec, ImageSpec, TaskSpec
from mmlm.model.config import ModelConfig
from mmlm.train.config import TrainConfig
from mmlm.train.planning import count

HERE = Machine(cores=2, memory=24e9)
IMAGE, AUDIO = ImageSpec(size=32, patch=8, channels=3), AudioSpec()
READ = EncoderSpec(digest="none", dim=8, tokens=4, read=True)
CLASSES = TaskSpec(name="kind", labels=["a", "b", "c"])
WRITTEN = TaskSpec(name="say", has_text=True)


def facts(train: int, tokens: float, *tasks: TaskSpec, test: int = 1000, val: int = 100, **spec: Any) -> Facts:
    """Every record has a picture and a second of sound, where there is room for them."""
    features = FeatureSpec(vocab_size=512, tokenizer_digest="none", max_len=128, tasks=list(tasks), **spec)
    media = train * (features.image_positions(1) + features.audio_positions([100]))
    return Facts("data", features, None, train, test, val, tokens, tokens, train if features.image else 0, media)


def cost(model: dict[str, Any], settings: dict[str, Any]) -> tuple[int, float, bool]:
    parameters = count(parse(ModelConfig, model, "test"), facts(1, 1, CLASSES).spec)
    return parameters, parameters / 1e8, parameters < 2e9  # an hour for 100 million


def kind_of(given: Facts) -> str:
    return str(advise(given, HERE, 8.0, cost).model.get("kind", "transformer"))


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (facts(800, 4000, CLASSES, image=IMAGE), "cnn"),
        (facts(800, 4000, CLASSES, audio=AUDIO), "cnn"),
        (facts(60_000, 300_000, CLASSES, image=IMAGE), "transformer"),
        (facts(800, 4000, CLASSES, WRITTEN, image=IMAGE), "transformer"),  # a cnn writes nothing
        (facts(800, 80_000, CLASSES, image=IMAGE), "transformer"),  # nor reads
        (facts(800, 16_000, CLASSES, image=IMAGE), "transformer"),  # captions are no question
        (
            facts(800, 4000, CLASSES, image=IMAGE, encoders={"image": READ}),
            "transformer",
        ),  # nor reads what an encoder made
        (facts(1500, 30_000, CLASSES), "gru"),
        (facts(1500, 30_000, WRITTEN), "lstm"),
        (facts(20_000, 400_000, CLASSES), "transformer"),
    ],
)
def test_the_kind_follows_from_data_and_tasks(given: Facts, kind: str):
    assert kind_of(given) == kind


SMALL_PATCHES = ImageSpec(size=16, patch=4, channels=1)


@pytest.mark.parametrize(
    ("given", "stem"),
    [
        (facts(630, 20_000, CLASSES, image=IMAGE), "hog"),
        (facts(630, 20_000, CLASSES, WRITTEN, image=IMAGE, audio=AUDIO), "hog"),
        (facts(2_000, 60_000, CLASSES, image=IMAGE), "hog"),
        (facts(2_001, 60_000, CLASSES, image=IMAGE), None),  # enough to learn edges from
        (facts(630, 20_000, CLASSES, audio=AUDIO), None),  # there is no picture
        (facts(630, 20_000, CLASSES, image=SMALL_PATCHES), None),
        (facts(630, 20_000, CLASSES, image=ImageSpec(size=26, patch=13, channels=3)), None),  # it takes no such patches
        (facts(630, 20_000, CLASSES, image=ImageSpec(size=28, patch=14, channels=3)), "hog"),
        (facts(630, 20_000, CLASSES, image=IMAGE, encoders={"image": READ}), None),  # no patch is read
        (facts(630, 20_000, CLASSES, image=IMAGE, encoders={"image": READ.model_copy(update={"read": False})}), "hog"),
    ],
)
def test_few_pictures_are_read_by_histograms(given: Facts, stem: str | None):
    advice = advise(given, HERE, 8.0, cost)
    assert advice.model.get("kind", "transformer") == "transformer"
    assert advice.model.get("image_stem") == stem
    told = [reason for reason in advice.reasons if "image_stem" in reason.choice]
    assert [".548" in reason.source for reason in told] == [True] * (stem is not None)
    assert count(parse(ModelConfig, advice.model, "test"), given.spec) > 0  # a train.yaml takes it


def test_pictures_that_several_records_show_are_counted_once_as_in_the_story_stamps():
    stamps = stories.load("stamps", [])
    features = stamps.shard.features
    given = facts(7_581, 119_000, CLASSES, WRITTEN, image=features.image, audio=features.audio)
    advice = advise(dataclasses.replace(given, pictures=648), HERE, 8.0, cost)
    assert any(reason.why.startswith("648 different pictures") for reason in advice.reasons)
    assert stamps.distill and isinstance(stamps.train.model, ModelConfig)
    assert isinstance(stamps.distill.model, ModelConfig)
    stems = {advice.model["image_stem"], stamps.train.model.image_stem, stamps.distill.model.image_stem}
    assert stems == {"hog"}, "the story and the advice agree"
    assert count(stamps.train.model, given.spec) > 0


@pytest.mark.parametrize("tokens", [1e5, 1e7, 1e8, 1e9, 1e11])
def test_parameters_are_fed_by_twenty_tokens_each(tokens: float):
    given = facts(100_000, tokens, WRITTEN)
    advice = advise(given, HERE, 8.0, cost)
    parameters, hours, fits = cost(advice.model, {})
    assert advice.preset == "tiny" or 20 * parameters <= 4 * tokens
    assert hours <= 8.0 and fits
    if advice.preset != SIZES[-1]:
        larger, longer, room = cost({"preset": SIZES[SIZES.index(advice.preset) + 1]}, {})
        assert 20 * larger > 4 * tokens or longer > 8.0 or not room, "a larger one would do"


H100 = Machine(64, 1e12, ["H100"] * 8)


def test_patches_and_mel_tokens_feed_parameters_as_words_do():
    given = facts(1_000_000, 5_000_000, CLASSES, image=IMAGE, audio=AUDIO)
    assert given.media_tokens == 1_000_000 * (16 + 13)
    advice = advise(given, H100, 100.0, lambda model, settings: (*cost(model, settings)[:1], 0.1, True))
    parameters = cost(advice.model, {})[0]
    assert advice.preset == "mini" and 4 * 5_000_000 / 20 < parameters <= 4 * 34_000_000 / 20
    told = next(reason.why for reason in advice.reasons if "preset" in reason.choice)
    assert "5,000,000 tokens of text and 29,000,000 of pictures and sounds, 4 times over, feed about 6,800,000" in told
    texts = advise(facts(1_000_000, 5_000_000, CLASSES), H100, 100.0, cost)
    assert texts.preset == "tiny" and not any("pictures" in reason.why for reason in texts.reasons)


@pytest.mark.parametrize(
    ("train", "machine", "steps", "says"),
    [
        (10, HERE, 200, "fewer than 200 hardly"),
        (150, HERE, 200, "fewer than 200 hardly"),
        (200, HERE, 250, "40.0 times through the data"),
        (60_000, HERE, 2000, "2,000 steps are the most"),
        (60_000, H100, 4688, "10.0 times through the data"),
        (1_000_000, HERE, 7813, "once is the least"),
    ],
)
def test_steps_come_with_the_rule_that_decided_them(train: int, machine: Machine, steps: int, says: str):
    advice = advise(facts(train, 5 * train, CLASSES, image=IMAGE), machine, 8.0, cost)
    told = next(reason for reason in advice.reasons if "steps" in reason.choice)
    assert advice.settings["steps"] == steps and says in told.why
    times = steps * advice.settings["data"]["batch"] / train
    assert ("10 to 40 epochs" in told.source) == (9.5 <= times <= 40.5), "a reason that its own figure contradicts"


def test_packed_sequences_count_as_the_records_in_them():
    """Sequences of 1,024 that hold 16 records of about 60 positions, and those that hold one of 1,000."""
    for length, each in ((60, 16.0), (1000, 1.0)):
        given = facts(2000, 2000 * length, CLASSES)
        given = dataclasses.replace(given, spec=given.spec.model_copy(update={"max_len": 1024}))
        advice = advise(given, HERE, 8.0, cost)
        assert advice.settings["data"]["pack"] == {"kind": "best_fit"}
        steps, batch = advice.settings["steps"], advice.settings["data"]["batch"]
        assert 20 <= steps * batch * each / 2000 <= 45, "not the epochs that it speaks of"
        assert 16 <= batch * each <= 64


@pytest.mark.parametrize(("machine", "ranks"), [(HERE, 2), (H100, 8)])
def test_each_rank_has_a_sequence(machine: Machine, ranks: int):
    """Ten thousand positions hold more records than a step of so few should."""
    given = facts(300, 3000, CLASSES)
    given = dataclasses.replace(given, spec=given.spec.model_copy(update={"max_len": 10_000}))
    assert advise(given, machine, 8.0, cost).settings["data"]["batch"] == ranks


def test_what_an_encoder_made_is_not_augmented():
    def augmented(**spec: Any) -> dict[str, Any]:
        settings = advise(facts(500, 2000, CLASSES, **spec), HERE, 8.0, cost).settings
        return dict(settings["data"].get("augment", {}))

    assert augmented(image=IMAGE, audio=AUDIO) == {"shift": 2, "time_mask": 0.1}
    assert augmented(image=IMAGE, audio=AUDIO, encoders={"image": READ}) == {"time_mask": 0.1}
    assert augmented(image=IMAGE, audio=AUDIO, encoders={"audio": READ}) == {"shift": 2}
    assert augmented(image=IMAGE, encoders={"image": READ}) == {}


def test_every_choice_has_a_reason_and_small_data_a_warning():
    advice = advise(facts(300, 2000, CLASSES, image=IMAGE, test=60), HERE, 8.0, cost)
    told = " ".join(reason.choice for reason in advice.reasons)
    assert all(word in told for word in ("kind", "batch", "precision", "lr"))
    warned = " ".join(advice.warnings)
    assert "logistic" in warned and "± 0.13" in warned  # 1.96 √(.25 / 60)
    slow = advise(facts(300, 2000, CLASSES, image=IMAGE), Machine(2, 24e9, bf16=False), 8.0, cost)
    assert slow.settings["precision"] == "fp32"
    volta = Machine(8, 64e9, ["Tesla V100-SXM2-32GB"], bf16=False)
    assert advise(facts(300, 2000, CLASSES, image=IMAGE), volta, 8.0, cost).settings["precision"] == "fp16"


def test_facts_of_a_manifest_and_of_its_shards_agree(keypad_manifest: Artifact, keypad_shards: Artifact):
    scanned, sharded = look(str(keypad_manifest.path)), look(str(keypad_shards.path))
    assert scanned.train == sharded.train == keypad_manifest.counts["train"]
    assert (scanned.val, scanned.test) == (sharded.val, sharded.test)
    assert scanned.media == sharded.media == ("image", "audio")
    assert [t.name for t in scanned.spec.tasks] == [t.name for t in sharded.spec.tasks] and scanned.texts
    assert 0.2 < scanned.tokens / sharded.tokens < 5
    assert scanned.pictures == sharded.pictures
    assert scanned.media_tokens == scanned.train * (8 * 8 + 7)  # 64 pixels; half of the sounds last .57 s
    reader = ShardReader(keypad_shards.path, ("train",))
    opened = sum(opened_length(s, reader.spec) - len(s.tokens) + len(s.images) + len(s.sounds) for s in reader)
    assert sharded.media_tokens == pytest.approx(opened, rel=0.2)


def test_nothing_is_written_unless_asked_and_what_is_written_trains(
    keypad_manifest: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = {p: p.stat().st_mtime_ns for p in keypad_manifest.path.rglob("*")}
    file = tmp_path / "train.yaml"
    assert main(["advise", str(keypad_manifest.path), "--write", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {p: p.stat().st_mtime_ns for p in keypad_manifest.path.rglob("*")} == before
    assert 0 < found["forecast"]["hours"] < 8 and found["forecast"]["fits"] and not found["forecast"]["measured"]
    config = parse(TrainConfig, yaml.safe_load(file.read_text()), "train.yaml")
    assert config == parse(TrainConfig, found["recommended"]["train"], "json")
    assert count(config.model, look(str(keypad_manifest.path)).spec) == found["recommended"]["parameters"]
    assert {other["kind"] for other in found["alternatives"]} == {"gru", "lstm"}  # the digits are written: no cnn
    assert main(["advise", str(keypad_manifest.path), "--write", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err
    told = page.words(found)
    assert "planned" in told and "zero.stage" in told and "Hoffmann" in told


@pytest.mark.slow  # tries the model on this machine, with 1 and 2 ranks
def test_shards_let_the_model_be_tried(keypad_shards: Artifact):
    found = page.compose(str(keypad_shards.path))
    assert found["forecast"]["measured"] and "tried" in page.words(found)
    assert {other["kind"] for other in found["alternatives"]} == {"gru", "lstm"}


def test_nothing_known_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert main(["advise", "demo"]) == 2
    assert "mmlm scan demo" in capsys.readouterr().err
