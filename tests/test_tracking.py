"""Tracking on a real SQLite store: nesting, resuming, reaping, outages."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlm import artifacts, spool, tracking_store
from mmlm.errors import Interrupted, LaunchError
from mmlm.model.config import ModelConfig
from mmlm.tracking import NullTracker, Tracker
from mmlm.train.config import TrainConfig
from mmlm.train.telemetry import Telemetry
from mmlm.tuning import _Child
from mmlm.world import World
from tests.small import SPEC
from tests.tracked import Settings, begin, client, elsewhere, finish, let_senders_end


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite store in a folder with a space and Chinese characters in its name, shared: migrating takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow 店')}/mlflow.db"


def test_importing_is_light() -> None:
    code = "import sys, mmlm.tracking; print('mlflow' in sys.modules, 'torch' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False"]


def test_stages_are_nested_runs_with_params_curves_and_lineage(store: str, tmp_path: Path) -> None:
    with Tracker.start(store, story="nest", out=tmp_path) as tracker:
        assert tracker.parent is None, "the parent begins with the first stage"
        for name in ("scan", "shard"):
            work = begin(tmp_path / name, steps=len(name))
            with tracker.run(name, Settings(steps=len(name)), work) as run:
                assert run.run_id == work.run_id
                run.metrics({"loss": 1.0, "odd name!": float("nan"), "none": None}, step=1)
                spool.append_metrics(work.path, {"loss": 0.5}, 2)  # as a rank of another process would
                run.text("note.txt", "hello")
                finish(work)
        parent = tracker.parent
    c = client(store)
    runs = c.search_runs([c.get_experiment_by_name("nest").experiment_id])
    children = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent}
    assert set(children) == {"scan", "shard"}
    assert {r.info.status for r in runs} == {"FINISHED"}
    shard = children["shard"]
    assert shard.data.params["nested.zero.stage"] == "2"
    assert len(shard.data.params["nested.long"]) == 500
    assert [m.value for m in c.get_metric_history(shard.info.run_id, "loss")] == [1.0, 0.5]
    assert shard.data.metrics["counts/records"] == 7
    assert c.get_run(parent).data.metrics.keys() == {"seconds/scan", "seconds/shard"}
    assert shard.data.tags["digest"] == artifacts.read(tmp_path / "shard").digest
    assert {f.path for f in c.list_artifacts(shard.info.run_id)} == {"note.txt", "artifact.json"}
    assert not list(tmp_path.glob(".tracking-parent*"))


def fail(store: str, out: Path, error: BaseException) -> list[str | None]:
    """Ids of the parent run and the stage run that end with `error`."""
    ids: list[str | None] = []
    tracker = Tracker.start(store, story="ends", out=out)
    with contextlib.suppress(type(error)), tracker, tracker.run("train", {}, begin(out / "model")) as run:
        ids += [tracker.parent, run.run_id]
        raise error
    return ids


class Ended(BaseException):
    """As Dagster's own, when a person ends its run."""


def test_failures_and_interrupts_are_told_apart_and_pass_through(store: str, tmp_path: Path) -> None:
    statuses = {}
    for error in (ValueError("odd"), Interrupted("stopped"), KeyboardInterrupt(), Ended()):
        name = type(error).__name__
        ids = fail(store, tmp_path / name, error)
        c = client(store)
        statuses[name] = [c.get_run(i).info.status for i in ids]
        if name == "ValueError":
            assert "odd" in c.get_run(ids[0]).data.tags["error"]
            assert "odd" in c.get_run(ids[1]).data.tags["error"]
    assert statuses == {
        "ValueError": ["FAILED"] * 2,
        "Interrupted": ["KILLED"] * 2,
        "KeyboardInterrupt": ["KILLED"] * 2,
        "Ended": ["KILLED"] * 2,
    }


KILLED = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_tracking import begin
from mmlm.tracking import Tracker
out = Path(sys.argv[2])
tracker = Tracker.start(sys.argv[1], story="killed", out=out)
with tracker.run("train", {"a": 1}, begin(out / "model")) as run:
    run.metrics({"loss": 3.0}, step=1)
    print(run.run_id, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_killed_run_is_reaped_and_its_stage_continues(store: str, tmp_path: Path) -> None:
    client(store)
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", KILLED, store, str(tmp_path), here], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    first = done.stdout.split()[-1]
    c = client(store)
    experiment = c.get_experiment_by_name("killed").experiment_id
    assert {r.info.status for r in c.search_runs([experiment])} == {"RUNNING"}
    with Tracker.start(store, story="killed", out=tmp_path) as tracker:
        assert {r.info.status for r in c.search_runs([experiment])} == {"KILLED"}
        work = begin(tmp_path / "model")
        assert work.run_id == first
        with tracker.run("train", {"a": 1}, work) as run:
            assert run.run_id == first
            assert c.get_run(first).info.status == "RUNNING"
            run.metrics({"loss": 2.0}, step=2)
            finish(work)
        parent = tracker.parent
    again = c.get_run(first)
    assert again.info.status == "FINISHED"
    assert again.data.tags["mlflow.parentRunId"] == parent
    assert [m.value for m in c.get_metric_history(first, "loss")] == [3.0, 2.0]


def test_the_living_are_not_reaped(store: str, tmp_path: Path) -> None:
    one = Tracker.start(store, story="alive", out=tmp_path / "a")
    with one, one.run("scan", {}, begin(tmp_path / "a/manifest")) as run:
        with Tracker.start(store, story="alive", out=tmp_path / "b") as two:
            two.open()
            assert two.reap() == 0
        assert client(store).get_run(run.run_id).info.status == "RUNNING"


@pytest.mark.parametrize("note", [".tracking-parent.json", ".tracking-parent-x.json"])
def test_a_run_killed_on_another_host_is_ended(store: str, tmp_path: Path, note: str) -> None:
    parent = elsewhere(store, tmp_path, note)
    with (tmp_path / note).open() as live:
        fcntl.flock(live, fcntl.LOCK_EX)  # its process lives
        Tracker.start(store, story="elsewhere", out=tmp_path)
        assert client(store).get_run(parent).info.status == "RUNNING"
    Tracker.start(store, story="elsewhere", out=tmp_path)
    assert client(store).get_run(parent).info.status == "KILLED"
    assert not (tmp_path / note).exists()


def test_another_start_ends_no_living_parent_and_no_living_stage(store: str, tmp_path: Path) -> None:
    with Tracker.start(store, story="shared", out=tmp_path) as one:
        with one.run("scan", {}, begin(tmp_path / "manifest")):
            pass
        with one.run("train", {}, begin(tmp_path / "model")) as run:
            with Tracker.start(store, story="shared", out=tmp_path) as two:
                two.open()
                with two.run("evaluate", {}, begin(tmp_path / "report")):
                    pass
            assert {client(store).get_run(i).info.status for i in (one.parent, run.run_id)} == {"RUNNING"}


def test_a_trial_starts_without_a_store_and_is_sent_later(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_store.Sender.finish, "__defaults__", (0.1,))
    monkeypatch.setattr(tracking_store, "SEND_EVERY", 0.05)
    parent = Tracker.start(store, story="trials", out=tmp_path)
    parent.open()
    for number, stops in enumerate((False, True)):
        trial = _Child("http://127.0.0.1:9", "trials", tmp_path / "search" / "trials" / f"00{number}")
        trial.title, trial.parent, trial._key = f"trial-00{number}", "a" * 32, parent._key
        work = begin(trial.out / "model")
        with contextlib.suppress(Interrupted), trial.run("train", {"a": 1}, work) as run:
            run.metrics({"loss": 1.5}, step=1)
            assert run.run_id is None
            if stops:
                raise Interrupted("the search stopped it")
            finish(work)
        work.release()
        let_senders_end()
    parent.replay()
    found = client(store).search_runs([parent._experiment])
    assert {r.info.run_name: r.info.status for r in found} == {"trial-000": "FINISHED", "trial-001": "KILLED"}
    assert [r.data.metrics["loss"] for r in found] == [1.5, 1.5]
    assert not parent._waiting()


class Flaky:
    """A client whose calls fail while `down`."""

    def __init__(self, real: Any) -> None:
        self.real, self.down = real, False

    def __getattr__(self, name: str) -> Any:
        if self.down:
            raise ConnectionError("the server went away")
        return getattr(self.real, name)


def test_an_outage_costs_nothing_and_is_replayed(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_store, "SEND_EVERY", 0.05)
    tracker = Tracker.start(store, story="outage", out=tmp_path)
    tracker.open()
    tracker._client = flaky = Flaky(tracker._client)
    started = time.monotonic()
    work = begin(tmp_path / "model")
    monkeypatch.setattr(tracking_store.Sender.finish, "__defaults__", (0.5,))
    with tracker.run("train", {"a": 1}, work) as run:
        flaky.down = True
        run.metrics({"loss": 1.0}, step=1)
        finish(work)
    with tracker.run("distill", {"a": 2}, other := begin(tmp_path / "student")) as run:
        run.metrics({"loss": 4.0}, step=1)
        assert run.run_id is None, "not even created"
        finish(other)
    tracker.close()
    assert time.monotonic() - started < 8
    let_senders_end()
    flaky.down = False
    monkeypatch.undo()
    Tracker.start(store, story="outage", out=tmp_path).close()
    c = client(store)
    runs = {r.info.run_name: r for r in c.search_runs([c.get_experiment_by_name("outage").experiment_id])}
    assert {n: r.info.status for n, r in runs.items()} == dict.fromkeys(("outage", "train", "distill"), "FINISHED")
    assert runs["distill"].data.metrics["loss"] == 4.0
    assert runs["train"].data.metrics["loss"] == 1.0
    assert not tracker._waiting()


def test_many_points_arrive_once_each(store: str, tmp_path: Path) -> None:
    tracker = Tracker.start(store, story="many", out=tmp_path)
    with tracker, tracker.run("train", {}, begin(tmp_path / "model")) as run:
        for step in range(2500):
            run.metrics({"loss": step}, step)
    c = client(store)
    assert [m.step for m in c.get_metric_history(run.run_id, "loss")] == list(range(2500))


def test_curves_that_are_cut_back_go_on(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed training drops the rows behind its checkpoint from metrics.jsonl and writes them anew."""
    monkeypatch.setattr(tracking_store, "SEND_EVERY", 0.02)
    tracker = Tracker.start(store, story="cut", out=tmp_path)
    with tracker, tracker.run("train", {}, work := begin(tmp_path / "model")) as run:
        for step in range(50):
            run.metrics({"loss": 1}, step)
        time.sleep(0.3)
        curves = work.path / "metrics.jsonl"
        curves.write_text("".join(curves.read_text().splitlines(keepends=True)[:40]))
        time.sleep(0.3)
        for step in range(40, 60):
            run.metrics({"loss": 2}, step)
            time.sleep(0.01)
    seen = [(m.step, m.value) for m in client(store).get_metric_history(run.run_id, "loss")]
    assert sorted(seen) == sorted([(s, 1) for s in range(50)] + [(s, 2) for s in range(40, 60)])


def test_curves_written_anew_while_nobody_looked_go_on(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, but by the time that the sender looks again the new file is longer than the old one was."""
    monkeypatch.setattr(tracking_store, "SEND_EVERY", 0.3)
    tracker = Tracker.start(store, story="anew", out=tmp_path)
    with tracker, tracker.run("train", {}, work := begin(tmp_path / "model")) as run:
        for step in range(50):
            run.metrics({"loss": 1}, step)
        time.sleep(0.8)
        curves = work.path / "metrics.jsonl"
        new = tmp_path / "new"
        new.write_text("".join(curves.read_text().splitlines(keepends=True)[:40]))
        new.replace(curves)
        for step in range(40, 90):
            run.metrics({"loss": 2.25, "more": step}, step)
    seen = [(m.step, m.value) for m in client(store).get_metric_history(run.run_id, "loss")]
    assert sorted(seen) == sorted([(s, 1) for s in range(50)] + [(s, 2.25) for s in range(40, 90)])


def test_curves_that_are_cut_back_twice_in_one_outage_go_on(store: str, tmp_path: Path) -> None:
    """ext4 gives the second new file the inode of the first one, and it is longer than what was sent."""
    model = ModelConfig(width=32, layers=1, heads=2)
    curves = Telemetry(tmp_path, World(), torch.device("cpu"), "fp32", model, SPEC)
    c = client(store)
    experiment = tracking_store.experiment(c, store, "twice")
    state = spool.State("key", "train", {}, spool.now(), path=tmp_path / spool.STATE)

    def train(first: int, last: int, loss: float) -> None:
        for step in range(first, last + 1):
            curves.write(step, {"loss": loss})
            time.sleep(0.002)

    train(1, 50, 1.0)
    tracking_store.forward(c, experiment, state)
    for attempt, last in ((2.0, 44), (3.0, 70)):
        curves.rewind(30)
        train(31, last, attempt)
    tracking_store.forward(c, experiment, state)
    curves.rewind(70)  # nothing is cut: nothing is sent again
    train(71, 80, 3.0)
    left = spool.State.load(tmp_path)
    assert left is not None
    tracking_store.forward(c, experiment, left)
    seen = [(m.step, m.value) for m in c.get_metric_history(state.run_id, "loss")]
    assert sorted(seen) == sorted([(s, 1.0) for s in range(1, 51)] + [(s, 3.0) for s in range(31, 81)])


def test_what_another_version_noted_is_read(tmp_path: Path) -> None:
    state = spool.State("key", "train", {}, 1, run_id="r", metrics=7, path=tmp_path / spool.STATE)
    state.save()
    row = json.loads(state.path.read_text())
    del row["mark"]
    state.path.write_text(json.dumps({**row, "file": 3}))
    assert spool.State.load(tmp_path) == state


def begun_twice(store: str, out: Path, known: list[TrainConfig], told: list[TrainConfig]) -> dict[str, str]:
    """The parameters of a run that is stopped and gone on with: what its noun is made of, and what tracking is told."""
    ids = []
    for config, said in zip(known, told, strict=True):
        work = artifacts.begin(out / "model", "checkpoint", recipe=1, config=config)
        tracker = Tracker.start(store, story="twice", out=out)
        with tracker, contextlib.suppress(Interrupted), tracker.run("train", said, work) as run:
            ids.append(run.run_id)
            raise Interrupted("enough")
        work.release()
        state = spool.State.load(out / "model")
        assert state and state.dropped == 0
    assert ids[0] == ids[1]
    params: dict[str, str] = client(store).get_run(ids[0]).data.params
    return params


def test_a_stage_that_goes_on_in_another_way_has_the_parameters_that_it_began_with(store: str, tmp_path: Path) -> None:
    configs = [TrainConfig.model_validate({"zero": {"stage": stage}}) for stage in (2, 3)]
    params = begun_twice(store, tmp_path, configs, configs)
    assert params["zero.stage"] == "2" and params["steps"] == "1500"


def test_where_pretrained_weights_lie_may_change(store: str, tmp_path: Path) -> None:
    """The folder is told to MLflow as the run begins; the noun's own config, of which its identity is made, has none."""
    encoder = {"digest": "0" * 64, "settings": {"model_type": "siglip_vision_model"}}
    known, *told = (
        TrainConfig.model_validate({"model": {"image_encoder": {**encoder, "folder": folder}}})
        for folder in ("", "/models/siglip", "/moved/siglip")
    )
    params = begun_twice(store, tmp_path, [known, known], told)
    assert params["model.image_encoder.folder"] == "/models/siglip" and params["steps"] == "1500"


def test_one_rejected_value_costs_only_itself(store: str, tmp_path: Path) -> None:
    tracker = Tracker.start(store, story="reject", out=tmp_path)
    with tracker, tracker.run("train", {"same": 1, "other": 2}, begin(tmp_path / "model")) as run:
        run.params({"same": 3, "third": 4})  # parameters cannot be changed
        run.metrics({"loss": 1})
    params = client(store).get_run(run.run_id).data.params
    assert params == {"same": "1", "other": "2", "third": "4"}


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9", "postgresql://u:secret@127.0.0.1:9/db", "https://no.such.host.invalid"]
)
def test_an_unreachable_server_is_told_at_once(uri: str, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(LaunchError, match="does not answer") as caught:
        Tracker.start(uri, story="x", out=tmp_path)
    assert time.monotonic() - started < 15
    assert "secret" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_what_is_no_store_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, and long enough to be seen as none " * 20)
    for uri in ("nonsense://x", f"sqlite:///{tmp_path}/text.db"):
        with pytest.raises(LaunchError, match="cannot be opened"):
            Tracker.start(uri, story="x", out=tmp_path).open()


def test_several_processes_may_open_a_new_store_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from mmlm.tracking import Tracker; Tracker.start(sys.argv[1], story='s', out=sys.argv[2]).open()"
    )
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/new.db", str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    told = [p.communicate(timeout=120) for p in started]
    assert [p.returncode for p in started] == [0, 0, 0], told
    assert told == [("", "")] * 3, "MLflow's chatter reaches the terminal"


def test_rows_of_a_spool(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\nrubbish\n[1]\n{"b": 2}\n{"half"')
    rows = list(spool.rows_after(path, 0))
    assert [r for r, _ in rows] == [{"a": 1}, {}, {}, {"b": 2}]
    assert list(spool.rows_after(path, rows[0][1]))[-1] == rows[-1]
    assert list(spool.rows_after(path, 10_000)) == []
    assert list(spool.rows_after(tmp_path / "none", 0)) == []


def test_nobody_tracks(tmp_path: Path) -> None:
    with NullTracker().run("scan", {}, begin(tmp_path / "manifest")) as run:
        run.metrics({"a": 1})
        run.text("a", "b")
        assert run.run_id is None


def test_default_and_relative_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_store.default_uri() == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracking_store.absolute("sqlite:///runs/x.db") == f"sqlite:///{tmp_path}/runs/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere")
    assert tracking_store.default_uri() == "http://somewhere"
    assert json.dumps(os.environ["MLFLOW_TRACKING_URI"])
