"""Nouns at rest: found again, refused when another, set aside and taken back."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mmlm import artifacts
from mmlm.artifacts import Artifact, ArtifactConflict
from mmlm.config import Config, identity, parse, resolved
from mmlm.errors import ArtifactError
from mmlm.shards.config import ShardConfig
from mmlm.story import settle
from mmlm.train.config import TrainConfig


class Numbers(Config):
    count: int = 3


def make(out: Path, count: int, parents: dict[str, Artifact] | None = None) -> Artifact:
    work = artifacts.begin(out, "numbers", recipe=1, config=Numbers(count=count), parents=parents)
    if work.artifact:
        return work.artifact
    (out / "numbers.txt").write_text(" ".join(map(str, range(count))))
    return work.finish(counts={"numbers": count}, digest_of=["numbers.txt"])


def test_the_same_config_is_found_again_untouched(tmp_path: Path):
    first = make(tmp_path / "n", 3)
    stamp = (tmp_path / "n" / "numbers.txt").stat().st_mtime_ns
    assert make(tmp_path / "n", 3).fingerprint == first.fingerprint
    assert (tmp_path / "n" / "numbers.txt").stat().st_mtime_ns == stamp


class Sums(Config):
    how_it_runs: ClassVar[tuple[str, ...]] = ("threads",)
    count: int = 3
    threads: int = 1


def test_how_it_runs_is_no_part_of_what_it_is(tmp_path: Path):
    out = tmp_path / "n"
    begun = artifacts.begin(out, "sums", recipe=1, config=Sums())
    begun.release()
    work = artifacts.begin(out, "sums", recipe=1, config=Sums(threads=4))
    made = work.finish(counts={}, digest_of=[])
    assert work.fingerprint == begun.fingerprint and made.config["threads"] == 4
    assert artifacts.begin(out, "sums", recipe=1, config=Sums(threads=2)).artifact == made
    with pytest.raises(ArtifactConflict):
        artifacts.begin(out, "sums", recipe=1, config=Sums(count=4))


class Inner(Config):
    a: int = 1


class Grown(Config):
    """Inner, some versions later."""

    added: ClassVar[tuple[str, ...]] = ("b", "c")
    a: int = 1
    b: tuple[float, float] = (1.0, 1.0)
    c: str | None = None


class Outer(Config):
    inner: Inner = Inner()
    more: tuple[Inner, ...] = (Inner(a=2), Inner())
    named: dict[str, Inner] = {"x": Inner(a=3)}


class OuterGrown(Config):
    inner: Grown = Grown()
    more: tuple[Grown, ...] = (Grown(a=2), Grown())
    named: dict[str, Grown] = {"x": Grown(a=3)}


def test_later_fields_that_keep_their_default_are_no_part_of_what_a_noun_is(tmp_path: Path):
    before = artifacts.begin(tmp_path / "n", "sums", recipe=1, config=Outer())
    before.finish(counts={}, digest_of=[])
    work = artifacts.begin(tmp_path / "n", "sums", recipe=1, config=OuterGrown())
    assert work.artifact and identity(OuterGrown()) == identity(Outer()) == resolved(Outer())
    assert resolved(OuterGrown())["inner"]["b"] == [1.0, 1.0], "what is stored names all of them"
    used = [{"inner": {"b": (1.0, 2.0)}}, {"more": ({}, {"c": "x"})}, {"named": {"x": {"a": 3, "c": ""}}}]
    for given in used:
        with pytest.raises(ArtifactConflict):
            artifacts.begin(tmp_path / "n", "sums", recipe=1, config=OuterGrown.model_validate(given))


def test_trainings_and_shard_sets_are_known_as_before_turns_zooms_fixed_scales_and_stems():
    """The configs as they were stored before these fields."""
    plain = resolved(TrainConfig())
    for name in ("turn", "zoom"):
        del plain["data"]["augment"][name]
    for name in ("image_encoder", "audio_encoder"):
        del plain["model"][name]
    assert identity(TrainConfig()) == {k: v for k, v in plain.items() if k not in TrainConfig.how_it_runs}
    turned = parse(TrainConfig, {"data": {"augment": {"turn": 10}}}, "test")
    assert identity(turned)["data"]["augment"]["turn"] == 10 and "zoom" not in identity(turned)["data"]["augment"]
    image = {"size": 32, "patch": 8, "channels": 3}
    shards = [parse(ShardConfig, {"features": {"image": {**image, "scale": s}}}, "test") for s in ("relative", "fixed")]
    assert "scale" not in identity(shards[0])["features"]["image"]
    assert identity(shards[1])["features"]["image"]["scale"] == "fixed"


def test_another_config_is_refused_and_both_are_named(tmp_path: Path):
    first = make(tmp_path / "n", 3)
    with pytest.raises(ArtifactConflict) as caught:
        make(tmp_path / "n", 4)
    assert first.fingerprint[:12] in str(caught.value) and caught.value.wanted_fingerprint[:12] in str(caught.value)


def test_the_settings_that_differ_are_told_finished_or_not(tmp_path: Path):
    now = parse(
        TrainConfig, {"steps": 20, "optimizer": {"kind": "lion"}, "zero": {"stage": 1}, "save_every": 7}, "test"
    )
    for name in ("finished", "begun"):
        out = tmp_path / name
        before = parse(TrainConfig, {"steps": 10, "ema": {"decay": 0.5}, "save_every": 5}, "test")
        work = artifacts.begin(out, "checkpoint", recipe=1, config=before)
        work.finish(counts={}, digest_of=[]) if name == "finished" else work.release()
        with pytest.raises(ArtifactConflict) as caught:
            artifacts.begin(out, "checkpoint", recipe=1, config=now)
        assert "or other inputs (steps 10 → 20, optimizer.kind adamw → lion, " in str(caught.value)
        assert "ema.decay 0.5 → none" in str(caught.value)
        assert "zero" not in str(caught.value) and "save_every" not in str(caught.value)  # how it runs


def test_what_is_no_longer_there_is_told_as_well(tmp_path: Path):
    given: dict[str, Any] = {"recipe": 1, "config": TrainConfig()}
    parent = make(tmp_path / "parent", 3)
    artifacts.begin(tmp_path / "n", "report", **given, parents={"student": parent}).release()
    with pytest.raises(ArtifactConflict) as caught:
        artifacts.begin(tmp_path / "n", "report", **given)
    assert f"(student {parent.digest[:12]} → none)" in str(caught.value)


def test_a_setting_that_came_later_and_rests_on_its_default_is_not_told(tmp_path: Path):
    config = parse(TrainConfig, {"data": {"augment": {"turn": 10}}}, "test")
    out = tmp_path / "n"
    artifacts.begin(out, "checkpoint", recipe=1, config=config).finish(counts={}, digest_of=[])
    row = json.loads((out / "artifact.json").read_text())
    del row["config"]["data"]["augment"]["zoom"]
    (out / "artifact.json").write_text(json.dumps(row))
    with pytest.raises(ArtifactConflict, match=r"other inputs \(seed 0 → 1\); wanted"):
        artifacts.begin(out, "checkpoint", recipe=1, config=config.model_copy(update={"seed": 1}))


def test_what_it_was_made_of_instead_is_told(tmp_path: Path):
    first, other = make(tmp_path / "a", 1), make(tmp_path / "b", 2)
    out, before = tmp_path / "n", {"codecs": {"png": "1.6", "jpg": "9e"}, "listing": "x"}
    begun = artifacts.begin(out, "numbers", recipe=1, config=Numbers(), parents={"a": first}, extra=before)
    begun.finish(counts={}, digest_of=[])
    now = {"codecs": {"png": "1.7", "jpg": "9e", "webp": "1"}, "listing": "y"}
    with pytest.raises(ArtifactConflict) as caught:
        artifacts.begin(out, "numbers", recipe=2, config=Numbers(), parents={"a": other}, extra=now)
    told = f"recipe 1 → 2, a {first.digest[:12]} → {other.digest[:12]}, png 1.6 → 1.7, webp none → 1, another listing"
    assert f"made from another config or other inputs ({told}); wanted" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_what_a_killed_run_left_lying_is_removed_by_the_next(tmp_path: Path):
    out = tmp_path / "n"
    artifacts.begin(out, "numbers", recipe=1, config=Numbers()).release()
    half = [out / f".numbers.txt.{'0a' * 16}.tmp", out / f"..work.json.{'0b' * 16}.tmp"]
    kept = [out / ".tracking.json.tmp", out / "half.tmp"]  # not of `atomic_write`
    for path in (*half, *kept):
        path.write_text("half")
    work = artifacts.begin(out, "numbers", recipe=1, config=Numbers())
    assert [path.exists() for path in (*half, *kept)] == [False, False, True, True]
    made = work.finish(counts={}, digest_of=[])
    (out / ".work.json").write_text("{}")  # killed before it was removed
    with artifacts.hold(out):  # another one reopens it
        assert artifacts.begin(out, "numbers", recipe=1, config=Numbers()).artifact == made
        assert (out / ".work.json").exists()
    assert artifacts.begin(out, "numbers", recipe=1, config=Numbers()).artifact == made
    assert not (out / ".work.json").exists()


def test_a_noun_set_aside_is_taken_back_when_it_is_wanted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    three = settle(lambda: make(tmp_path / "n", 3)).fingerprint[:16]
    stamp = (tmp_path / "n" / "numbers.txt").stat().st_mtime_ns
    assert capsys.readouterr().err == ""
    four = settle(lambda: make(tmp_path / "n", 4)).fingerprint[:16]
    assert (tmp_path / "n" / "numbers.txt").read_text() == "0 1 2 3"
    assert capsys.readouterr().err == f"n: count 3 → 4; what was there is kept as .aside/n-{three}\n"
    settle(lambda: make(tmp_path / "n", 3))
    back = f"n: count 4 → 3; what was there is kept as .aside/n-{four}; what was made so before is back\n"
    assert capsys.readouterr().err == back
    assert (tmp_path / "n" / "numbers.txt").stat().st_mtime_ns == stamp


def test_a_child_follows_the_content_of_its_parent_not_its_age(tmp_path: Path):
    parent = make(tmp_path / "a", 3)
    child = make(tmp_path / "b", 5, {"a": parent})
    same = make(tmp_path / "elsewhere", 3)
    assert make(tmp_path / "b", 5, {"a": same}).fingerprint == child.fingerprint
    with pytest.raises(ArtifactConflict):
        make(tmp_path / "b", 5, {"a": make(tmp_path / "c", 4)})


def test_unfinished_work_is_continued_by_the_same_config_only(tmp_path: Path):
    work = artifacts.begin(tmp_path / "n", "numbers", recipe=1, config=Numbers(count=3))
    (tmp_path / "n" / "half").write_text("half")
    work.release()
    again = artifacts.begin(tmp_path / "n", "numbers", recipe=1, config=Numbers(count=3))
    assert again.artifact is None and (tmp_path / "n" / "half").exists()
    again.release()
    with pytest.raises(ArtifactConflict):
        artifacts.begin(tmp_path / "n", "numbers", recipe=1, config=Numbers(count=4))
    with pytest.raises(ArtifactError, match="unfinished"):
        artifacts.read(tmp_path / "n", "numbers")


def test_two_processes_do_not_make_the_same_noun(tmp_path: Path):
    work = artifacts.begin(tmp_path / "n", "numbers", recipe=1, config=Numbers())
    with pytest.raises(ArtifactError, match="another process"):
        artifacts.begin(tmp_path / "n", "numbers", recipe=1, config=Numbers())
    work.release()


def test_somebody_elses_folder_is_never_written_into(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not empty"):
        make(tmp_path / "mine", 3)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_newer_format_is_refused(tmp_path: Path):
    made = make(tmp_path / "n", 3)
    path = made.path / artifacts.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": artifacts.FORMAT + 1}))
    with pytest.raises(ArtifactError, match="update mmlm"):
        artifacts.read(made.path)


def test_a_noun_of_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match="wanted a checkpoint"):
        artifacts.read(make(tmp_path / "n", 3).path, "checkpoint")
    with pytest.raises(ArtifactError, match="holds a numbers; wanted a shard set"):
        artifacts.read(tmp_path / "n", "shards")
