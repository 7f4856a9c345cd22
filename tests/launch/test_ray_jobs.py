"""Ray jobs: bad addresses fail fast with a sentence; a real two-node cluster runs commands and ranks."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mmlm.cli import main
from mmlm.errors import Interrupted, LaunchError
from mmlm.launch import ray_jobs
from mmlm.world import quiet_environment
from tests import digits

ROOT = Path(__file__).parents[2]


def test_nobody_at_the_address_is_a_sentence_within_seconds() -> None:
    start = time.monotonic()
    with pytest.raises(LaunchError, match=r"no Ray cluster answers at http://127\.0\.0\.1:9"):
        ray_jobs.submit(["true"], "127.0.0.1:9")
    assert time.monotonic() - start < 10


def test_a_listener_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "PROBE_SECONDS", 0.5)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(LaunchError, match="no Ray cluster answers"):
            ray_jobs.probe(f"http://127.0.0.1:{s.getsockname()[1]}")


def test_something_else_at_the_address_is_told_apart() -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(LaunchError, match="is not a Ray cluster"):
            ray_jobs.probe(f"127.0.0.1:{server.server_port}")
        server.shutdown()


def test_a_ray_client_address_is_refused() -> None:
    with pytest.raises(LaunchError, match="is not a job address"):
        ray_jobs.probe("ray://127.0.0.1:10001")


def test_a_job_gets_time_to_save_and_the_file_that_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMLM_STOP_FILE", "stop")
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    environment = ray_jobs.job_environment({})
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "600" and environment["MMLM_STOP_FILE"] == str(
        Path.cwd() / "stop"
    )
    assert environment.items() >= quiet_environment().items()
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    assert ray_jobs.job_environment({})["RAY_JOB_STOP_WAIT_TIME_S"] == "60"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def alive_nodes(dashboard: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/nodes?view=summary", timeout=5) as reply:
        summary = json.loads(reply.read())["data"]["summary"]
    return sum(node["raylet"].get("state") == "ALIVE" for node in summary)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two raylets on this machine, one CPU each, away from the default ports. Yields the dashboard's address."""
    folder = Path("/tmp") / f"mmlm-ray-{os.getpid()}"  # Ray's sockets need a short path
    gcs, dashboard, client, agent, grpc, agent2, grpc2 = _free_ports(7)
    env = {**os.environ, **quiet_environment(), "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--num-cpus=1", "--object-store-memory=100000000"]
    head = [
        *ray, "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}", f"--temp-dir={folder}",
        "--node-ip-address=127.0.0.1",
    ]  # fmt: skip
    second = [
        *ray, "--block", f"--address=127.0.0.1:{gcs}", f"--dashboard-agent-listen-port={agent2}",
        f"--dashboard-agent-grpc-port={grpc2}", "--node-ip-address=127.0.0.1",
    ]  # fmt: skip
    log = (tmp_path_factory.mktemp("ray") / "ray.log").open("wb")
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for command in (head, second):
            nodes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
            deadline = time.monotonic() + 60
            while len(nodes) == 1:
                try:
                    ray_jobs.probe(f"127.0.0.1:{dashboard}")
                    break
                except LaunchError:
                    assert time.monotonic() < deadline, Path(log.name).read_text()[-2000:]
                    time.sleep(0.5)
        deadline = time.monotonic() + 60
        while alive_nodes(dashboard) < 2:
            assert time.monotonic() < deadline, Path(log.name).read_text()[-2000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
        log.close()


@pytest.fixture(autouse=True)
def _mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.mark.slow
def test_log_and_status_come_back(cluster: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert ray_jobs.submit([sys.executable, "-c", "print('hello from the job')"], cluster) == "SUCCEEDED"
    shown = capfd.readouterr()
    assert "hello from the job" in shown.out
    assert "job raysubmit_" in shown.err


@pytest.mark.slow
def test_bad_input_inside_the_job_is_bad_input_here(cluster: str) -> None:
    code = "import sys; print('mmlm: there is no story', flush=True); sys.exit(2)"
    with pytest.raises(LaunchError, match="exit code 2: there is no story") as caught:
        ray_jobs.submit([sys.executable, "-c", code], cluster)
    assert caught.value.exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("stop", [False, True])
def test_an_interrupted_follower_leaves_the_job_alone_unless_asked(cluster: str, tmp_path: Path, stop: bool) -> None:
    from ray.job_submission import JobSubmissionClient

    started = tmp_path / "started"
    code = f"import time, pathlib; pathlib.Path({str(started)!r}).touch(); time.sleep(600)"

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted, match="was stopped" if stop else "goes on without us"):
        ray_jobs.submit([sys.executable, "-c", code], cluster, stop_on_interrupt=stop)
    client = JobSubmissionClient(cluster)
    job = max(client.list_jobs(), key=lambda j: j.start_time or 0).submission_id
    assert job
    if stop:
        assert client.get_job_status(job).value == "STOPPED"
    else:
        assert client.get_job_status(job).value == "RUNNING"
        client.stop_job(job)


@pytest.mark.slow
def test_a_stopped_job_has_longer_than_rays_three_seconds(cluster: str, tmp_path: Path) -> None:
    started = tmp_path / "started"
    code = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n    time.sleep(6)\n    print('mmlm: saved at step 7', flush=True)\n    sys.exit(4)\n"
        f"signal.signal(signal.SIGTERM, stop)\npathlib.Path({str(started)!r}).touch()\ntime.sleep(600)"
    )

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted, match="was stopped: saved at step 7") as caught:
        ray_jobs.submit([sys.executable, "-c", code], cluster, stop_on_interrupt=True)
    assert caught.value.exit_code == 4


@pytest.mark.slow
def test_ranks_of_a_job_are_placed_on_both_nodes(cluster: str, tmp_path: Path) -> None:
    code = (
        f"from pathlib import Path\nfrom mmlm.launch import ray_train\nout = {str(tmp_path)!r}\n"
        "ray_train.ranks(2)('tests.launch.targets:note_node', {'folder': out}, log=Path(out, 'log'))"
    )
    assert ray_jobs.submit([sys.executable, "-c", code], cluster) == "SUCCEEDED"
    assert [(tmp_path / f"sum-{r}.txt").read_text() for r in (0, 1)] == ["3.0", "3.0"]
    assert len({(tmp_path / f"node-{r}.txt").read_text() for r in (0, 1)}) == 2


@pytest.mark.slow
def test_a_search_over_data_makes_its_sets_and_trials_on_the_cluster(
    cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    story = digits.story(tmp_path / "story")
    shard = yaml.safe_load((story / "shard.yaml").read_text()) | {"ray_from": 0}
    (story / "shard.yaml").write_text(yaml.safe_dump(shard))
    command = ["tune", str(story), "--out", str(tmp_path / "out"), "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    command += ["--on", "ray", "--address", cluster, "--search", "shard.features.image.size=[8,16]", "--json"]
    assert main(command) == 0, capfd.readouterr().err
    found = json.loads((tmp_path / "out" / "search" / "results.json").read_text())
    assert len({trial["shards"] for trial in found["trials"]}) == 2
    assert any(trial["state"] == "finished" for trial in found["trials"])


@pytest.mark.slow
def test_an_error_of_a_ray_rank_comes_back_as_itself(cluster: str, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom mmlm.errors import ArtifactError\nfrom mmlm.launch import ray_train\ntry:\n"
        f"    ray_train.ranks(1)('tests.launch.targets:refuse', {{'rank': 0}}, log=Path({str(tmp_path)!r}, 'log'))\n"
        "except ArtifactError as error:\n    print('mmlm:', error, flush=True); raise SystemExit(2)"
    )
    with pytest.raises(LaunchError, match="found this; wanted that; do so"):
        ray_jobs.submit([sys.executable, "-c", code], cluster)
