"""A real MLflow server, frozen, killed and restarted under a training: it goes on, and the curves are complete."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mmlm.artifacts import Artifact
from mmlm.spool import State
from mmlm.tracking import Tracker
from mmlm.world import quiet_environment
from tests.faults.stage import fill_blocks, make_room, small_disk, wait_for
from tests.train.runs import SMALL, Training, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Server:
    """`mlflow server` on SQLite, always at the same port. `disk`: where its database lies, by default in `folder`."""

    def __init__(self, folder: Path, disk: Path | None = None) -> None:
        folder.mkdir(parents=True)
        self.folder, self.disk = folder, disk or folder
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port: int = s.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        command += [
            "--backend-store-uri",
            f"sqlite:///{self.disk}/mlflow.db",
            "--artifacts-destination",
            str(self.folder),
        ]
        environment = {**os.environ, **quiet_environment(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.txt").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        wait_for("the server answers", self.answers, 120)

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200)
        return False

    def send(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait(30)


@contextlib.contextmanager
def started(folder: Path, disk: Path | None = None) -> Iterator[Server]:
    made = Server(folder, disk)
    made.start()
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):
            made.send(signal.SIGKILL)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with started(tmp_path / "server") as made:
        yield made


class Gateway(ThreadingHTTPServer):
    """What stands before a server, hands everything on, and forbids everything while it is `shut`."""

    def __init__(self, server: Server) -> None:
        super().__init__(("127.0.0.1", 0), _Handing)
        self.behind, self.shut = server.uri, False
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"


class _Handing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        gateway: Any = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        if gateway.shut:
            self._answer(403, b"your session is over")
            return
        kept = {name: self.headers[name] for name in ("Content-Type",) if name in self.headers}
        asked = urllib.request.Request(gateway.behind + self.path, body, kept, method=self.command)
        try:
            with urllib.request.urlopen(asked, timeout=30) as came:
                self._answer(came.status, came.read(), came.headers.get("Content-Type", ""))
        except urllib.error.HTTPError as error:
            self._answer(error.code, error.read(), error.headers.get("Content-Type", ""))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def curve(uri: str, name: str) -> tuple[list[Any], str]:
    """Points of the training's curve, and the run's status."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("faults")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.stage = 'train'")
    assert len(runs) == 1
    return client.get_metric_history(runs[0].info.run_id, name), runs[0].info.status


def is_complete(uri: str, out: Path, steps: int) -> None:
    points, status = curve(uri, "loss")
    assert status == "FINISHED"
    assert sorted(p.step for p in points) == list(range(1, steps + 1))  # none missing, none twice
    assert {p.step: p.value for p in points} == losses(out)


def test_a_server_frozen_killed_and_restarted_costs_no_point(keypad_shards: Artifact, tmp_path: Path, server: Server):
    steps = 1500
    out = tmp_path / "run" / "model"
    run = Training(keypad_shards, out, 1, {**SMALL, "steps": steps, "save_every": 500}, server.uri)
    run.until("step 100", lambda: run.step() >= 100)
    server.send(signal.SIGSTOP)
    run.until("step 250, the server being frozen", lambda: run.step() >= 250)
    server.send(signal.SIGCONT)
    run.until("step 400", lambda: run.step() >= 400)
    server.send(signal.SIGKILL)
    run.until("step 550, the server being dead", lambda: run.step() >= 550)
    assert not server.answers()
    server.start()
    restarted_at = run.step()
    assert run.end() == 0, run.words()
    with Tracker.start(server.uri, story="faults", out=tmp_path / "run"):
        pass  # sends what was left, if the end came before the server
    print(f"the server was back at step {restarted_at} of {steps}")
    is_complete(server.uri, out, steps)


def test_a_server_that_stays_dead_gets_everything_at_the_next_start(
    keypad_shards: Artifact, tmp_path: Path, server: Server
):
    steps = 120
    out = tmp_path / "run" / "model"
    run = Training(keypad_shards, out, 1, {**SMALL, "steps": steps}, server.uri)
    run.until("step 20", lambda: run.step() >= 20)
    server.send(signal.SIGKILL)
    assert run.end() == 0, run.words()
    assert (out / "artifact.json").exists()
    server.start()
    with Tracker.start(server.uri, story="faults", out=tmp_path / "run"):
        pass
    is_complete(server.uri, out, steps)


@pytest.mark.parametrize("comes_back", [True, False], ids=["comes back", "stays dead"])
def test_a_training_goes_on_without_a_server_that_knows_it(
    keypad_shards: Artifact, tmp_path: Path, server: Server, comes_back: bool
):
    """As after a stop that put its job back into the queue, while the server is away."""
    steps, out = 400, tmp_path / "run" / "model"
    config = {**SMALL, "steps": steps, "save_every": 500}
    run = Training(keypad_shards, out, 1, config, server.uri)
    run.until("step 20", lambda: run.step() >= 20)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 4, run.words()
    server.send(signal.SIGKILL)
    again = Training(keypad_shards, out, 1, config, server.uri)
    again.until("steps without a server", lambda: again.step() >= 60)
    if comes_back:
        server.start()
        again.until("its run goes on there", lambda: curve(server.uri, "loss")[1] == "RUNNING")
    assert again.end() == 0, again.words()
    assert "kept and sent later" in again.words()
    if not comes_back:
        server.start()
    with Tracker.start(server.uri, story="faults", out=tmp_path / "run") as tracker:
        client = tracker.open()
    is_complete(server.uri, out, steps)
    parents = client.search_runs([tracker._experiment], "attributes.run_name = 'faults'")
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert "seconds/train" in parents[0].data.metrics or not comes_back


@pytest.mark.parametrize("how", ["full", "forbidden"])
def test_a_store_that_takes_no_more_gets_everything_later(keypad_shards: Artifact, tmp_path: Path, how: str):
    """The disk of its database is full, or what stands before it lets nothing through, to the end of the training."""
    steps, out = 300, tmp_path / "run" / "model"
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(small_disk(tmp_path / "disk")) if how == "full" else None
        server = stack.enter_context(started(tmp_path / "server", disk))
        gateway = stack.enter_context(Gateway(server))
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        stack.callback(gateway.shutdown)
        run = Training(keypad_shards, out, 1, {**SMALL, "steps": steps, "save_every": 100}, gateway.uri)
        stack.callback(run.kill)
        run.until("step 50", lambda: run.step() >= 50)
        if disk:
            fill_blocks(disk)
        else:
            gateway.shut = True
        assert run.end() == 0, run.words()
        assert (out / "artifact.json").exists() and sorted(losses(out)) == list(range(1, steps + 1))
        assert run.words().count("they are kept and sent later") == 1, run.words()
        left = State.load(out)
        assert left is not None and left.waiting and left.dropped == 0 and not left.ended
        assert len(curve(server.uri, "loss")[0]) < steps
        if disk:
            make_room(disk)
        gateway.shut = False
        with Tracker.start(gateway.uri, story="faults", out=tmp_path / "run"):
            pass
        is_complete(server.uri, out, steps)
        left = State.load(out)
        assert left is not None and not left.waiting and left.dropped == 0 and left.ended


def test_a_killed_training_does_not_stay_running(keypad_shards: Artifact, tmp_path: Path, server: Server):
    out = tmp_path / "run" / "model"
    config = {**SMALL, "steps": 60}
    run = Training(keypad_shards, out, 1, config, server.uri)
    run.until("step 20", lambda: run.step() >= 20)
    run.kill()
    with Tracker.start(server.uri, story="faults", out=tmp_path / "run") as tracker:
        tracker.open()
    assert curve(server.uri, "loss")[1] == "KILLED"
    again = Training(keypad_shards, out, 1, config, server.uri)
    assert again.end() == 0, again.words()
    points, status = curve(server.uri, "loss")
    assert status == "FINISHED"
    assert {p.step for p in points} == set(range(1, 61))
