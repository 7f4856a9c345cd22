"""Nouns at rest: found again, refused when another, set aside and taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest

from mmlm import artifacts
from mmlm.artifacts import Artifact, ArtifactConflict
from mmlm.config import Config, resolved
from mmlm.errors import ArtifactError
from mmlm.storage import sha256_json
from mmlm.story import settle


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


def test_what_was_made_when_how_it_ran_counted_is_found_and_continued_with_the_same_config(tmp_path: Path):
    old = {"kind": "sums", "recipe": 1, "config": resolved(Sums(threads=4)), "parents": {}, "extra": {}}
    out = tmp_path / "n"
    out.mkdir()
    (out / artifacts.WORK).write_text(json.dumps({"fingerprint": sha256_json(old), "run_id": "r"}))
    with pytest.raises(ArtifactConflict):
        artifacts.begin(out, "sums", recipe=1, config=Sums())
    work = artifacts.begin(out, "sums", recipe=1, config=Sums(threads=4))
    assert work.run_id == "r"
    work.finish(counts={}, digest_of=[])
    row = json.loads((out / artifacts.NAME).read_text())
    (out / artifacts.NAME).write_text(json.dumps({**row, "fingerprint": sha256_json(old)}))
    assert artifacts.begin(out, "sums", recipe=1, config=Sums(threads=4)).artifact


def test_another_config_is_refused_and_both_are_named(tmp_path: Path):
    first = make(tmp_path / "n", 3)
    with pytest.raises(ArtifactConflict) as caught:
        make(tmp_path / "n", 4)
    assert first.fingerprint[:12] in str(caught.value) and caught.value.wanted_fingerprint[:12] in str(caught.value)


def test_a_noun_set_aside_is_taken_back_when_it_is_wanted_again(tmp_path: Path):
    settle(lambda: make(tmp_path / "n", 3))
    stamp = (tmp_path / "n" / "numbers.txt").stat().st_mtime_ns
    settle(lambda: make(tmp_path / "n", 4))
    assert (tmp_path / "n" / "numbers.txt").read_text() == "0 1 2 3"
    settle(lambda: make(tmp_path / "n", 3))
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
