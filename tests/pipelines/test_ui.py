"""`make ui`: a taken port is told, and what was started ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmlm.errors import LaunchError
from pipelines import ui


def test_a_taken_port_is_a_sentence() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} is already in use.*MLFLOW_PORT={port + 1}"):
            ui.require_free(port, "MLFLOW_PORT")


def test_a_server_of_mlflow_that_is_there_is_shown_and_none_started(tmp_path: Path) -> None:
    """MLflow's server takes a database for its store, and ends at once when it is given another server."""
    ports = {"MLflow": 5000, "Dagster": 3000}
    pages, commands = ui.arrange("https://me:secret@mlflow.example/team/", tmp_path, ports)
    assert pages == {"MLflow": "https://mlflow.example/team", "Dagster": "http://127.0.0.1:3000"}
    assert list(commands) == ["Dagster"]
    pages, commands = ui.arrange("sqlite:///runs/mlflow.db", tmp_path, ports)
    assert pages["MLflow"] == "http://127.0.0.1:5000" and list(commands) == ["MLflow", "Dagster"]


@pytest.mark.parametrize("told", ["abc", "70000", "0", "-1"])
def test_what_is_no_port_is_a_sentence(told: str, tmp_path: Path) -> None:
    environment = {**os.environ, "MLFLOW_PORT": told, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "pipelines.ui"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"mmlm: MLFLOW_PORT is '{told}'; wanted a port, 1 to 65535\n"


def test_stop_ends_a_server_and_its_children(tmp_path: Path) -> None:
    """Even a child that does not listen to SIGTERM, and a parent that is gone before its child."""
    script = (
        "import os, signal, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(15, signal.SIG_IGN); "
        "print(1, flush=True); time.sleep(600)'], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(600)"
    )
    log = tmp_path / "log"
    server = ui.start([sys.executable, "-c", script], dict(os.environ), log)
    deadline = time.monotonic() + 20
    while not log.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = int(log.read_text())
    ui.stop([server], seconds=1)
    assert server.poll() is not None
    time.sleep(0.2)
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()


def test_a_server_gets_default_signals(tmp_path: Path) -> None:
    """A shell's background job ignores SIGINT, and would hand that down."""
    log = tmp_path / "log"
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    caller = (
        "import os, signal, sys; from pathlib import Path; from pipelines import ui\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"ui.start([sys.executable, '-c', {code!r}], dict(os.environ), Path({str(log)!r})).wait()"
    )
    subprocess.run([sys.executable, "-c", caller], check=True, cwd=Path(__file__).parents[2])
    assert log.read_text().strip() == "True"
