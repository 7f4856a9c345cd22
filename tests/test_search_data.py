"""A search over settings of data: each combination has a shard set of its own, made once, or fails with its trials alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmlm import artifacts, search_data, search_space, tuning
from mmlm import story as stories
from mmlm.artifacts import Artifact
from mmlm.cli import main
from mmlm.errors import ConfigError, DataError
from mmlm.launch.local import ranks
from mmlm.search_data import DataSets
from mmlm.search_space import TuneConfig
from mmlm.tracking import NullTracker
from tests import digits
from tests.faults.stage import MARK, ROOT, marked, wait_for

SIZE, LENGTH = "shard.features.image.size", "shard.features.max_len"
VOCAB = {"shard.features.tokenizer.vocab_size": [300, 400]}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return digits.story(tmp_path / "story")


def make(folder: Path, out: Path, search: dict[str, Any]) -> dict[str, Artifact | str]:
    """The set of each combination by its searched settings, or why there is none."""
    story = stories.load(str(folder))
    trials, refused = search_space.trials_of(TuneConfig(search=search, trials=40), story.written)
    assert not refused
    places = stories.Places(out, out / "raw", ranks(1), NullTracker())
    sets = DataSets(story, places, out / "search", lambda title, folder: NullTracker())
    return {
        "/".join(str(value) for value in trials[numbers[0]].of_data.values()): made
        for numbers, made in sets.make(trials)
    }


def files(out: Path) -> dict[str, int]:
    """Every file of a noun below `out`, and when it was written."""
    found = {path.parent for path in out.rglob(artifacts.NAME)}
    return {
        str(path.relative_to(out)): path.stat().st_mtime_ns
        for folder in found for path in folder.iterdir() if path.name != ".lock"
    }  # fmt: skip


def test_each_combination_has_one_set_made_once_and_the_storys_own_is_used(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    search = {SIZE: [8, 16], "train.seed": [1, 2], "shard.image_codec": ["png"]}
    made = make(small, out, search)
    assert made.keys() == {"8/png", "16/png"}
    eight, sixteen = made["8/png"], made["16/png"]
    assert isinstance(eight, Artifact) and isinstance(sixteen, Artifact)
    assert sixteen.path == out / "shards" and eight.path.parent.parent == out / "search" / "data"
    assert (eight.config["features"]["image"]["size"], sixteen.config["features"]["image"]["size"]) == (8, 16)
    assert eight.parents == sixteen.parents and eight.counts["samples"] == sixteen.counts["samples"] == 60
    assert [path.parent for path in out.rglob("records-*.parquet")] == [out / "manifest"]  # there is one manifest
    before = files(out)
    assert make(small, out, search) == made and files(out) == before

    # a search that was set aside for other trials leaves its sets to the next one
    (out / ".aside").mkdir()
    (out / "search").rename(out / ".aside" / "search-0123456789abcdef")
    again = make(small, out, {SIZE: [8]})["8"]
    assert isinstance(again, Artifact) and again.digest == eight.digest and files(out) == before


def test_what_cannot_be_made_fails_alone(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(small, tmp_path / "out", {LENGTH: [64, 8], SIZE: [16]})
    assert isinstance(made["16/64"], Artifact)
    assert "as `too_long`" in str(made["16/8"]) and "shard.error_budget" in str(made["16/8"])
    assert f"cannot be made, its trials fail: {made['16/8']}" in capsys.readouterr().err


def test_settings_of_scan_have_a_manifest_and_a_built_in_corpus_of_their_own(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    made = make(small, out, {"scan.split.test": [0.1, 0.3], SIZE: [8, 16]})
    sets = [each for each in made.values() if isinstance(each, Artifact)]
    assert len({each.path for each in sets}) == len(sets) == 4
    manifests = {each.parents["manifest"] for each in sets}
    assert {artifacts.read(path.parent).digest for path in out.rglob("records-*.parquet")} == manifests
    assert len(manifests) == 2 and len(list(out.rglob("keypad/images"))) == 2
    tests = [artifacts.read(path.parent).counts["test"] for path in (out / "search").rglob("records-*.parquet")]
    assert len(tests) == 1 and tests[0] > artifacts.read(out / "manifest").counts["test"]
    trials, _ = search_space.trials_of(TuneConfig(search={SIZE: [8]}), stories.load(str(small)).written)
    search_data.tell_differences(sets, "val/loss", trials.values())
    told = capsys.readouterr().err
    assert "do not hold the same records (in the same splits)" in told and "val/loss is in nats per token" in told
    search_data.tell_differences(sets[:1] * 2, "val/loss", trials.values())
    assert not capsys.readouterr().err


def test_another_set_in_the_place_of_the_storys_own_stays(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    eight = make(small, out, {SIZE: [8]})["8"]
    assert isinstance(eight, Artifact)
    eight.path.rename(out / "shards")  # as `mmlm shard --set @best.yaml` leaves it
    sixteen = make(small, out, {SIZE: [16]})["16"]
    assert isinstance(sixteen, Artifact) and sixteen.path.is_relative_to(out / "search")
    assert artifacts.read(out / "shards").digest == eight.digest

    shutil.rmtree(out / "shards")
    manifest = yaml.safe_load((small / "scan.yaml").read_text()) | {"split": {"test": 0.3}}
    (small / "scan.yaml").write_text(
        yaml.safe_dump(manifest)
    )  # no shards are put beside the manifest of other settings
    other = make(small, out, {SIZE: [16]})["16"]
    assert isinstance(other, Artifact) and other.path.is_relative_to(out / "search") and not (out / "shards").exists()


def test_a_search_knows_the_raw_corpora(small: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    source = {"kind": "documents", "files": ["a.txt"]}
    (small / "scan.yaml").write_text(yaml.safe_dump({"sources": [source]}))
    story = stories.load(str(small))
    search = {"scan.sources": [[source], [{**source, "files": ["b.txt"]}]]}
    trials, _ = search_space.trials_of(TuneConfig(search=search), story.written)
    places = stories.Places(tmp_path / "out", tmp_path / "data", ranks(1), NullTracker())
    sets = DataSets(story, places, tmp_path / "out" / "search", lambda title, folder: NullTracker())
    with pytest.raises(DataError, match=r"\.txt"):
        sets.corpora(trials.values())
    (tmp_path / "data" / "a.txt").write_text("One sentence. Another one.")
    found = sets.corpora(trials.values())
    assert len(found) == 2 and found == sets.corpora(trials.values())
    (tmp_path / "data" / "a.txt").write_text("One sentence. Another one, that is longer.")
    assert len(set(sets.corpora(trials.values()).values()) - set(found.values())) == 1


@pytest.mark.parametrize(
    ("search", "metric", "train", "refused"),
    [
        (VOCAB, "loss", {}, True),
        (VOCAB, "val/loss", {}, True),
        (VOCAB, "val/loss_answer", {}, True),
        (VOCAB, "loss_given/image", {}, True),
        (VOCAB, "val/best", {"validation": {"every": 6}}, True),
        (VOCAB, "val/best", {"validation": {"every": 6, "metric": "label_accuracy"}}, False),
        (VOCAB, "val/loss", {"loss": {"answer": 0}}, False),
        (VOCAB, "val/loss_label", {}, False),
        (VOCAB, "val/label_accuracy", {}, False),
        ({"scan.split.salt": ["a", "b"]}, "val/loss", {}, True),  # a tokenizer is trained on each
        ({"scan.split.salt": ["a", "b"], "shard.features.tokenizer.file": ["t.json"]}, "val/loss", {}, False),
        ({SIZE: [8, 16]}, "val/loss", {}, False),
        ({"shard.features.tokenizer.vocab_size": [300]}, "val/loss", {}, False),  # the same one for all
    ],
)
def test_nats_per_token_of_several_tokenizers_are_not_compared(
    search: dict[str, Any], metric: str, train: dict[str, Any], refused: bool
) -> None:
    written = {**stories.load("demo").written, "train": train}
    trials, _ = search_space.trials_of(TuneConfig(search=search), written)
    if not refused:
        search_data.require_comparable(metric, trials.values())
        return
    with pytest.raises(ConfigError, match=f"{metric} is in nats per token.*wanted .*val/label_accuracy"):
        search_data.require_comparable(metric, trials.values())


def test_the_command_refuses_before_it_makes_anything(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, uri = tmp_path / "out", f"sqlite:///{tmp_path}/mlflow.db"
    command = ["tune", str(small), "--out", str(out), "--tracking-uri", uri, "--data", str(tmp_path / "none")]
    for space, said in (
        ("evaluate.bootstrap.samples=[10,20]", "evaluate.bootstrap.samples: a trial is a training and the shards it reads; "
         "wanted a key of train, shard or scan, such as train.optimizer.lr; change evaluate with --set"),
        ("shard=[1,2]", "shard: a trial is a training"),
        ("shard.seed=[1,2]", "unknown key `seed`"),
        ("shard.features.image.size=[15,17]", "must be a multiple of patch 8"),
        ("shard.features.tokenizer.vocab_size=[300,400]", "--metric val/label_accuracy --mode max"),
        ('scan.sources=[[{"kind": "folders"}], [{"kind": "folders", "path": "a"}]]', str(tmp_path / "none")),
    ):  # fmt: skip
        metric = ["--metric", "val/loss_label"] if space.startswith("scan") else []
        assert main([*command, "--search", space, *metric]) == 2
        assert said in capsys.readouterr().err
    assert not [path.name for path in out.iterdir() if path.name in ("search", "manifest", "shards", "raw")]


def test_what_to_do_with_the_best_settings_is_told() -> None:
    best = Path("best.yaml")
    assert tuning._next(["train.seed"], best) == "mmlm train STORY --set @best.yaml"
    told = tuning._next(["train.seed", SIZE], best)
    assert told.startswith(
        "mmlm shard STORY --set @best.yaml --replace, then mmlm train STORY --set @best.yaml --replace;"
    )
    assert tuning._next(["scan.split.salt", SIZE], best).startswith(
        "mmlm scan STORY --set @best.yaml --replace, then mmlm shard"
    )


def _states(trials: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], str]:
    return {tuple(trial["settings"].values()): trial["state"] for trial in trials}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_search_over_pictures_and_rates_makes_nothing_twice(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    out, uri = tmp_path / "out", f"sqlite:///{tmp_path}/mlflow.db"
    (small / "tune.yaml").write_text("grace: 1\n")  # none is stopped early
    spaces = [f"{SIZE}=[8,16]", "train.optimizer.lr=[3e-3,1e-3]", f"{LENGTH}=[64,8]"]
    command = ["tune", str(small), "--out", str(out), "--tracking-uri", uri, "--parallel", "2", "--json"]
    command += [word for space in spaces for word in ("--search", space)]
    command += ["--metric", "val/label_accuracy", "--mode", "max"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: str(tmp_path)}
    with (tmp_path / "said.txt").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmlm.cli", *command],
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        done = out / "search" / "trials"
        wait_for("a trial is trained", lambda: any(done.glob(f"*/model/{artifacts.NAME}")))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "search" / artifacts.NAME).exists()
    wait_for("no process is left", lambda: not marked(str(tmp_path)))
    sets = {path.parent for path in out.rglob("feature_spec.json") if "trials" not in path.parts}
    before = {
        name: time for name, time in files(out).items() if "trials/" not in name or "/model/artifact.json" in name
    }

    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    after = files(out)
    assert {name: after[name] for name in before if not Path(name).name.startswith(".tracking")} == {
        name: time for name, time in before.items() if not Path(name).name.startswith(".tracking")
    }
    assert sets == {path.parent for path in out.rglob("feature_spec.json") if "trials" not in path.parts}
    assert len([path for path in sets if (path / artifacts.NAME).exists()]) == 2
    order = sorted((SIZE, LENGTH, "train.optimizer.lr"))
    assert _states(found["trials"]) == {
        tuple({SIZE: size, LENGTH: length, "train.optimizer.lr": lr}[key] for key in order):
        "finished" if length == 64 else "failed"
        for size in (8, 16) for length in (64, 8) for lr in (3e-3, 1e-3)
    }  # fmt: skip
    assert all("too_long" in trial["error"] for trial in found["trials"] if trial["settings"][LENGTH] == 8)
    assert {trial["shards"] for trial in found["trials"]} >= {None, "shards"}

    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    parent = next(run for run in runs if run.info.run_name == "tune")
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    trained = {run.info.run_name: run for run in children if run.info.run_name.startswith("trial-")}
    finished = {f"trial-{trial['trial']:03d}": trial for trial in found["trials"] if trial["state"] == "finished"}
    assert trained.keys() == finished.keys() and len(trained) == 4
    assert all(run.data.params[SIZE] == str(finished[name]["settings"][SIZE]) for name, run in trained.items())
    assert any(run.info.run_name.startswith("shard-") for run in children)

    best = out / "search" / "best.yaml"
    assert yaml.safe_load(best.read_text()).keys() == {"shard", "train"}
    said_best = next(trial for trial in found["trials"] if trial["trial"] == found["best"])
    for verb in ("shard", "train"):
        words = [verb, str(small), "--out", str(out), "--tracking-uri", uri, "--ranks", "1", "--replace"]
        assert main([*words, "--set", f"@{best}"]) == 0
    assert artifacts.read(out / "shards").config["features"]["image"]["size"] == said_best["settings"][SIZE]
    assert artifacts.read(out / "model").config["optimizer"]["lr"] == said_best["settings"]["train.optimizer.lr"]
    assert main(command) == 0  # what was found is still there
    assert json.loads(capsys.readouterr().out.partition("{")[2].join(("{", ""))) == found
