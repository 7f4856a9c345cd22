"""Tracking on a store that takes nothing for a while: its disk is full, or its database refuses."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from mmlm import spool, tracking_store
from mmlm.errors import Interrupted
from mmlm.tracking import Tracker
from tests.faults.stage import fill_blocks, make_room, small_disk
from tests.tracked import begin, client, elsewhere, finish, let_senders_end


def test_a_store_on_a_full_disk_gets_everything_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_store, "SEND_EVERY", 0.05)
    monkeypatch.setattr(tracking_store.Sender.finish, "__defaults__", (0.5,))
    with small_disk(tmp_path / "disk") as disk:
        uri, out = f"sqlite:///{disk}/mlflow.db", tmp_path / "out"
        with Tracker.start(uri, story="full", out=out) as tracker:
            work = begin(out / "model")
            with tracker.run("train", {"a": 1}, work) as run:
                time.sleep(0.3)
                fill_blocks(disk)
                started = time.monotonic()
                for step in range(5000):
                    run.metrics({"loss": step}, step)
                finish(work)
            assert time.monotonic() - started < 15
        assert len(client(uri).get_metric_history(run.run_id, "loss")) < 5000, "the disk was not full"
        let_senders_end()
        make_room(disk)
        monkeypatch.undo()  # as patient as ever: the machine may be busy
        Tracker.start(uri, story="full", out=out).close()
        c = client(uri)
        assert [m.value for m in c.get_metric_history(run.run_id, "loss")] == list(range(5000))
        assert {r.info.status for r in c.search_runs([tracker._experiment])} == {"FINISHED"}


def test_a_database_that_refuses_gets_everything_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow calls it a bad request, as it does a bad value."""
    monkeypatch.setattr(tracking_store, "SEND_EVERY", 0.05)
    monkeypatch.setattr(tracking_store.Sender.finish, "__defaults__", (0.5,))
    uri, tables = f"sqlite:///{tmp_path}/mlflow.db", ("metrics", "params", "tags")

    def execute(command: str) -> None:
        with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", timeout=30)) as database:
            for table in tables:
                database.execute(command.format(table=table))
            database.commit()

    with Tracker.start(uri, story="refusing", out=tmp_path / "out") as tracker:
        work = begin(tmp_path / "out" / "model")
        with tracker.run("train", {"a": 1}, work) as run:
            time.sleep(0.3)
            execute(
                "CREATE TRIGGER no_{table} BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'read-only for now'); END"
            )
            for step in range(50):
                run.metrics({"loss": step}, step)
            run.params({"later": 2})
            finish(work)
        let_senders_end()
        left = spool.State.load(work.path)
        assert left is not None and left.waiting and not left.dropped
    assert client(uri).get_metric_history(run.run_id, "loss") == []
    execute("DROP TRIGGER no_{table}")
    monkeypatch.undo()
    Tracker.start(uri, story="refusing", out=tmp_path / "out").close()
    c = client(uri)
    assert [m.value for m in c.get_metric_history(run.run_id, "loss")] == list(range(50))
    assert c.get_run(run.run_id).data.params == {"a": "1", "later": "2"}
    assert {r.info.status for r in c.search_runs([tracker._experiment])} == {"FINISHED"}
    left = spool.State.load(work.path)
    assert left is not None and not left.waiting and not left.dropped


def test_a_database_that_refuses_ends_and_forgets_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a stage that goes on nor the note of a parent run takes that for the word that its run is gone."""
    monkeypatch.setattr(tracking_store, "SEND_EVERY", 0.05)
    monkeypatch.setattr(tracking_store.Sender.finish, "__defaults__", (0.5,))
    uri, out = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "out"

    def execute(command: str) -> None:
        with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", timeout=30)) as database:
            for event, table in (("UPDATE", "runs"), ("UPDATE", "tags"), ("INSERT", "tags")):
                database.execute(command.format(name=f"no_{event}_{table}", event=event, table=table))
            database.commit()

    def attempt(tracker: Tracker, error: BaseException | None) -> str | None:
        work = begin(out / "model")
        with contextlib.suppress(Interrupted), tracker.run("train", {"a": 1}, work) as run:
            if error:
                raise error
            finish(work)
        work.release()
        return run.run_id

    with Tracker.start(uri, story="closed", out=out) as tracker:
        first = attempt(tracker, Interrupted("enough"))
    parent = elsewhere(uri, out, ".tracking-parent-x.json")
    with Tracker(uri, "closed", out) as tracker:
        tracker._begin()
        (out / ".tracking-parent-x.json").write_text(
            json.dumps({"uri": tracker._key, "parent": parent, "status": None, "time": 1})
        )
        execute("CREATE TRIGGER {name} BEFORE {event} ON {table} BEGIN SELECT RAISE(ABORT, 'read-only for now'); END")
        with pytest.raises(MlflowException, match="read-only for now"):
            tracker.replay()
        assert (out / ".tracking-parent-x.json").exists()
        again = attempt(tracker, None)
        let_senders_end()
        execute("DROP TRIGGER {name}")
    monkeypatch.undo()
    Tracker.start(uri, story="closed", out=out).close()
    c = client(uri)
    assert first == again
    assert c.get_run(first).info.status == "FINISHED" and c.get_run(parent).info.status == "KILLED"
    assert not (out / ".tracking-parent-x.json").exists()
