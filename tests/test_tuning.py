"""The search: what is tried is a pure function of its settings; ASHA on a real local Ray stops, reports and goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmlm import search_space, tuning
from mmlm import story as stories
from mmlm.artifacts import Artifact
from mmlm.cli import main
from mmlm.config import parse
from mmlm.errors import ConfigError, Interrupted
from mmlm.features import spec as feature_spec
from mmlm.launch import ray_tune
from mmlm.launch.local import ranks
from mmlm.search_space import TuneConfig
from mmlm.tracking import NullTracker, Tracker
from mmlm.train import metric_names
from mmlm.train.config import AdamWConfig, LionConfig, TrainConfig
from mmlm.train.telemetry import GIVEN
from mmlm.train.train import train
from mmlm.world import cores
from tests.train.runs import SMALL

SPACES = {"train.optimizer.lr": "log(1e-4,1e-2)", "train.model.layers": "int(1,3)", "train.model.width": [64, 128]}


def test_trials_are_the_same_each_time_and_all_different() -> None:
    config = TuneConfig(search=SPACES, trials=40)
    drawn = search_space.settings_of(config)
    assert drawn == search_space.settings_of(config)
    assert drawn[:10] == search_space.settings_of(config.model_copy(update={"trials": 10}))
    assert all(a != b for n, a in enumerate(drawn) for b in drawn[:n])
    rates = [s["train.optimizer.lr"] for s in drawn]
    assert 1e-4 <= min(rates) < 3e-4 and 3e-3 < max(rates) <= 1e-2  # even in the logarithm
    assert {s["train.model.layers"] for s in drawn} == {1, 2, 3}
    assert {s["train.model.width"] for s in drawn} == {64, 128}


def test_a_grid_has_as_many_trials_as_it_has_points() -> None:
    config = TuneConfig(search={"train.model.width": [64, 128], "train.seed": [1, 2]}, trials=50)
    assert len(search_space.settings_of(config)) == 4


@pytest.mark.parametrize("space", ["log(0,1)", "log(2,1)", "int(1,inf)", "uniform(1)", "gauss(0,1)", "int(a,b)", []])
def test_a_space_that_is_none_is_refused(space: Any) -> None:
    with pytest.raises(ConfigError, match=r"wanted log|empty list"):
        parse(TuneConfig, {"search": {"train.optimizer.lr": space}}, "tune")
    with pytest.raises(ValueError):
        search_space.draw(space, random.Random(0))


@pytest.mark.parametrize("space", [{"kind": "log", "low": 0.1}, 0.5, None])
def test_a_space_of_another_form_is_told_by_its_key(space: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(TuneConfig, {"search": {"train.optimizer.lr": space}}, "tune")
    assert f"train.optimizer.lr = {space}: wanted log(low,high)" in str(caught.value)


def test_a_range_without_a_whole_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"int\(0.2,0.8\): no whole number lies there; wanted int\(1,8\), or uniform"):
        parse(TuneConfig, {"search": {"train.seed": "int(0.2,0.8)"}}, "tune")
    assert search_space.draw("int(0.2,1.8)", random.Random(0)) == 1


def test_flags_stand_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "tune.yaml").write_text("search:\n  train.seed: [1, 2]\ntrials: 3\nmetric: val/loss\n")
    assert search_space.read(tmp_path, [], trials=None).trials == 3
    read = search_space.read(tmp_path, ["train.optimizer.lr=[3e-4, 1]", "train.seed=int(1,9)"], trials=5, metric=None)
    assert (read.trials, read.metric) == (5, "val/loss")
    assert read.search == {"train.optimizer.lr": [3e-4, 1], "train.seed": "int(1,9)"}
    with pytest.raises(ConfigError, match="nothing to search"):
        search_space.read(tmp_path / "elsewhere", [])


def test_rows_that_are_half_written_wait(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert ray_tune.values(path, "loss") == []
    path.write_text('{"step": 1, "metrics": {"loss": 2}}\n{"step": 0, "metrics": {"loss": 1}}\n{"step": 2, "metr')
    assert ray_tune.values(path, "loss") == [(1, 2.0)]
    assert ray_tune.values(path, "val/loss") == []


WRITER = """
import json, sys, time
for step in range(1, 3):
    print(json.dumps({"step": step, "time": step, "metrics": {"loss": 1.0, "lr": 0.1}}), file=open(sys.argv[1], "a"))
if sys.argv[2] == "4":
    sys.exit(4)  # as a training that its time limit stopped
time.sleep(60)
"""


def test_a_search_ends_for_a_time_limit_and_for_a_metric_that_is_none(tmp_path: Path) -> None:
    where = tuning.Where(tmp_path, "", parallel=1, ranks=2)
    with tuning._session(where):
        for number, (metric, error, said) in enumerate(
            [("loss", Interrupted, "the search was stopped"), ("los", ConfigError, "wanted one of loss, lr")]
        ):
            objective = ray_tune.Objective(metric, "min", mean_of=1, steps=10, grace=1, reduction=3)
            plans = [
                ray_tune.TrialPlan(
                    n, [sys.executable, "-c", WRITER, f"{tmp_path}/{number}-{n}", "4" if metric == "loss" else "0"], {},
                    rows=f"{tmp_path}/{number}-{n}", done=f"{tmp_path}/none", log=f"{tmp_path}/log", steps=10,
                )
                for n in range(3)
            ]  # fmt: skip
            start = time.monotonic()
            with pytest.raises(error, match=said):
                ray_tune.search(plans, objective, parallel=1, ranks=2, gpu=False, storage=tmp_path / "ray")
            assert time.monotonic() - start < 40 and len(list(tmp_path.glob(f"{number}-*"))) < 3


LATE = """
import json, pathlib, sys, time
print(json.dumps({"step": 10, "time": 1, "metrics": {"loss": float(sys.argv[2])}}), file=open(sys.argv[1], "w"), flush=True)
time.sleep(1)  # writes its model
pathlib.Path(sys.argv[1] + ".done").write_text("")
"""


STEADY = """
import json, os, pathlib, signal, sys, time
def stop(*_):
    pathlib.Path(sys.argv[1] + ".stopped").write_text(str(os.getpid()))
    sys.exit(4)
signal.signal(signal.SIGTERM, stop)
for step in range(1, 11):
    row = {"step": step, "time": step, "metrics": {"loss": float(sys.argv[2])}}
    print(json.dumps(row), file=open(sys.argv[1], "a"), flush=True)
    time.sleep(float(sys.argv[3]))
pathlib.Path(sys.argv[1] + ".done").write_text("")
"""


def test_a_bad_trial_is_stopped_and_who_did_all_steps_is_finished_however_bad_it_is(tmp_path: Path) -> None:
    objective = ray_tune.Objective("loss", "min", mean_of=1, steps=10, grace=1, reduction=3)
    commands = [[LATE, "0"], [LATE, "1"], [STEADY, "0", "0"], [STEADY, "5", "3"]]
    plans = [
        ray_tune.TrialPlan(
            n, [sys.executable, "-c", command, f"{tmp_path}/{n}", *words], {},
            rows=f"{tmp_path}/{n}", done=f"{tmp_path}/{n}.done", log=f"{tmp_path}/log", steps=10,
        )
        for n, (command, *words) in enumerate(commands)
    ]  # fmt: skip
    with tuning._session(tuning.Where(tmp_path, "", parallel=1)), ray_tune.connected():  # joined already, as a job has
        outcomes = ray_tune.search(plans, objective, parallel=1, ranks=1, gpu=False, storage=tmp_path / "ray")
    *finished, bad = outcomes
    assert [(o.number, o.value, o.step, o.finished, o.error) for o in finished] == [
        (0, 0.0, 10, True, ""), (1, 1.0, 10, True, ""), (2, 0.0, 10, True, ""),
    ]  # fmt: skip
    assert (bad.number, bad.value, bad.finished, bad.error) == (3, 5.0, False, "") and 1 <= bad.step < 10
    assert [Path(plan.done).exists() for plan in plans] == [True, True, True, False]
    pid = int((tmp_path / "3.stopped").read_text())  # it was asked, and had time to save
    assert not Path(f"/proc/{pid}").exists()


def test_a_metric_that_training_will_not_write_is_refused_before_the_first_trial(
    keypad_shards: Artifact, tmp_path: Path
) -> None:
    where, tracker = tuning.Where(tmp_path, "", parallel=1), Tracker(f"sqlite:///{tmp_path}/none.db", "demo", tmp_path)
    places = stories.Places(tmp_path, tmp_path, ranks(1), tracker, shards=str(keypad_shards.path))
    folder = tmp_path / "story"
    shutil.copytree(stories.library() / "demo", folder)
    for metric, validation, said in (
        ("nonsense", {}, r"'nonsense'; wanted one of loss, loss_answer, loss_label, .*lr, "),
        ("val/los", {"every": 5}, "did you mean 'val/loss'"),
        ("val/loss", {}, "set train.validation.every"),
    ):
        config = TuneConfig(search={"train.seed": [1, 2]}, metric=metric)
        (folder / "train.yaml").write_text(yaml.safe_dump({**SMALL, "validation": validation}))
        with pytest.raises(ConfigError, match=said):
            tuning.tune(config, stories.load(str(folder)), places, where)
    assert not list(tmp_path.rglob("trial.json"))


def test_the_columns_that_are_foretold_are_those_of_a_training(keypad_shards: Artifact, tmp_path: Path) -> None:
    config = parse(TrainConfig, {**SMALL, "steps": 2, "validation": {"every": 1, "records": 8}}, "test")
    made = train(config, keypad_shards, out=tmp_path / "model", launch=ranks(1), tracker=NullTracker())
    rows = [json.loads(line)["metrics"] for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    written = {name for row in rows for name in row}
    foretold = set(metric_names.metric_names(config, feature_spec.load(keypad_shards.path)))
    assert written <= foretold and {"loss_label", "val/loss_label", "val/label_accuracy", "lr"} <= written
    assert foretold - written <= {"skipped", "damaged", "memory_cuda_bytes", *(f"loss_given/{g}" for g in GIVEN)}


def test_a_metric_of_validation_may_come_later(tmp_path: Path) -> None:
    rows = tmp_path / "metrics.jsonl"
    assert ray_tune.missing(rows, "loss", done=False) == []
    rows.write_text('{"step": 1, "metrics": {"skipped": 4, "lr": 1}}\n')
    assert ray_tune.missing(rows, "loss", done=False) == []  # a trial that diverges does not end the search
    rows.write_text('{"step": 1, "metrics": {"loss": 2, "lr": 1}}\n')
    assert ray_tune.missing(rows, "val/loss", done=False) == []
    assert ray_tune.missing(rows, "val/loss", done=True) == ["loss", "lr"]  # the story does not validate
    rows.write_text('{"step": 1, "metrics": {"loss": 2, "val/loss": 1}}\n')
    assert ray_tune.missing(rows, "val/los", done=False) == ["loss", "val/loss"]


def test_trials_of_several_ranks_stand_fewer_side_by_side(tmp_path: Path) -> None:
    assert tuning.Where.choose(tmp_path, "", None, cores()).parallel == 1
    assert tuning.Where.choose(tmp_path, "", None, None).parallel == cores()


def test_best_settings_are_an_override(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = {"trial": 3, "value": 0.5, "step": 9, "settings": {"train.optimizer.lr": 0.002, "train.model.width": 64}}
    path = tmp_path / "best.yaml"
    path.write_text(tuning._override(best, "loss"))
    assert yaml.safe_load(path.read_text()) == {"train": {"optimizer": {"lr": 0.002}, "model": {"width": 64}}}
    assert main(["train", "demo", "--on", "slurm", "--print", "--set", f"@{path}"]) == 0
    path.write_text("train: {modle: {width: 64}}")
    assert main(["train", "demo", "--on", "slurm", "--print", "--set", f"@{path}"]) == 2
    assert "did you mean `model`" in capsys.readouterr().err


WSD: dict[str, Any] = {"schedule": {"kind": "wsd", "decay": 0.1, "warmup": 0.2}}
FUSIONS = ["concat", {"kind": "adversarial", "weight": 0.2}, {"kind": "add"}]


@pytest.mark.parametrize(
    ("written", "search"),
    [
        ({"optimizer": {"weight_decay": 0.05}}, {"train.optimizer.kind": ["adamw", "lion"]}),
        ({"optimizer": {"kind": "lion", "beta1": 0.8}}, {"train.optimizer.kind": ["adamw", "lion", "muon"]}),
        ({"optimizer": {"kind": "muon", "momentum": 0.9, "lr": 0.01}}, {"train.optimizer.kind": ["adamw", "muon"]}),
        (WSD, {"train.schedule.kind": ["cosine", "wsd"], "train.schedule.floor": "uniform(0.1,0.5)"}),
        ({}, {"train.schedule.kind": ["cosine", "wsd"], "train.optimizer": [{"kind": "muon"}, {"lr": 0.1}]}),
        ({"data": {"pack": {"kind": "best_fit", "window": 2}}}, {"train.data.pack.kind": ["none", "best_fit"]}),
        ({"data": {"pack": {"kind": "none"}}}, {"train.data.pack": [{"kind": "none"}, {"kind": "best_fit"}]}),
        ({"model": {"heads": 4, "width": 64}}, {"train.model.kind": ["transformer", "cnn", "gru"]}),
        ({"model": {"width": 64, "fusion": "late"}}, {"train.model.preset": ["tiny", "small"]}),
        (
            {"model": {"fusion": "add"}, "ema": None},
            {"train.model.fusion": FUSIONS, "train.ema": [None, {"use": False}]},
        ),
        ({"lr_factors": {"image": 0.5}}, {"train.lr_factors": [{"blocks.*": 0.1}, {"audio": 2.0}]}),
        ({}, {"shard.features.image": [None, {"patch": 4}], "shard.image_codec": ["raw", "png"], "train.seed": [1, 2]}),
        ({}, {"scan.curate.near_text.threshold": "uniform(0.5,0.9)", "scan.split.salt": ["a", "b"]}),
    ],
)
def test_the_winner_is_what_is_trained_then(written: dict[str, Any], search: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "story"
    shutil.copytree(stories.library() / "demo", folder)
    (folder / "train.yaml").write_text(yaml.safe_dump(written))
    config = TuneConfig(search=search, trials=12)
    every, refused = search_space.trials_of(config, stories.load(str(folder)).written)
    assert not refused and len(every) == len(search_space.settings_of(config)) > 1
    for number, settings in enumerate(search_space.settings_of(config)):
        row = {"trial": number, "value": 0.5, "step": 9, "settings": settings}
        (tmp_path / "best.yaml").write_text(tuning._override(row, "loss"))
        story, trial = stories.load(str(folder), [f"@{tmp_path}/best.yaml"]), every[number]
        tried = parse(TrainConfig, trial.train.model_dump(mode="json"), "trial")  # the trial is told so
        assert tried == trial.train == story.train, settings
        assert (trial.shard, trial.scan) == (story.shard, story.scan), settings


def test_a_trial_of_another_kind_has_that_kinds_defaults() -> None:
    search = TuneConfig(search={"train.optimizer.kind": ["adamw", "lion"]}, trials=2)
    written = stories.load("demo").written
    every, _ = search_space.trials_of(search, {**written, "train": {"optimizer": {"clip": 0.5}}})
    assert {trial.train.optimizer for trial in every.values()} == {AdamWConfig(clip=0.5), LionConfig(clip=0.5)}
    search = TuneConfig(search={"train.schedule.kind": ["cosine"], "train.schedule.decay": [0.1]}, trials=1)
    with pytest.raises(ConfigError, match=r"unknown key `schedule\.decay`"):  # which a cosine has not
        search_space.trials_of(search, {**written, "train": {"schedule": {"kind": "wsd"}}})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_stops_bad_trials_reports_failed_ones_and_goes_on(
    keypad_shards: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    from mmlm import artifacts
    from tests.faults.stage import MARK, marked

    monkeypatch.setenv(MARK, "a-search")
    out, uri = tmp_path / "out", f"sqlite:///{tmp_path}/mlflow.db"
    shutil.copytree(keypad_shards.path, out / "shards")
    sets = ["steps=80", "log_every=4", "data.batch=16", "model.width=32", "model.layers=1", "precision=fp32"]
    command = ["tune", "demo", "--out", str(out), "--tracking-uri", uri, "--trials", "6", "--parallel", "2", "--json"]
    command += [word for change in sets for word in ("--set", f"train.{change}")]
    command += ["--search", "train.optimizer.lr=[3e-3, 1e30, 1e-7]", "--search", "train.model.heads=[4, 3]"]
    assert main(command) == 0
    assert all(
        "mlflow.db" not in path.read_text() for path in (out / "search").rglob("*.json")
    )  # it may hold a password
    found = json.loads(capsys.readouterr().out)
    trials = {(t["settings"]["train.optimizer.lr"], t["settings"]["train.model.heads"]): t for t in found["trials"]}
    assert trials[3e-3, 4]["state"] == "finished" and trials[3e-3, 4]["step"] == 80
    assert found["best"] == trials[3e-3, 4]["trial"]
    assert "even multiple of heads" in trials[3e-3, 3]["error"]  # settings that are none
    assert trials[1e30, 4]["state"] == "failed" and "the loss is" in trials[1e30, 4]["error"]
    bad = trials[
        1e-7, 4
    ]  # which of the two it is depends on who came to a rung first; the test above has one that is stopped
    made = out / "search/trials" / f"{bad['trial']:03d}" / "model/artifact.json"
    assert (bad["state"], made.exists()) in (("stopped", False), ("finished", True))
    assert not [pid for pid in marked("a-search") if pid != os.getpid()]  # no process is left

    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    names = {run.info.run_name: run for run in runs}
    child = names[f"trial-{found['best']:03d}"]
    assert child.data.tags["mlflow.parentRunId"] == names["tune"].info.run_id
    assert child.data.params["optimizer.lr"] == "0.003"

    # taken away and run again: what was trained is not trained again
    (out / "search" / "artifact.json").unlink()
    (out / "search" / artifacts.WORK).write_text(json.dumps({"fingerprint": _fingerprint(runs), "run_id": None}))
    model = out / "search" / "trials" / f"{found['best']:03d}" / "model" / "artifact.json"
    before = model.stat().st_mtime_ns
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["best"] == found["best"]
    assert model.stat().st_mtime_ns == before


def _fingerprint(runs: Any) -> str:
    return next(str(run.data.tags["fingerprint"]) for run in runs if run.info.run_name == "tune")
