"""`make ui`: Dagster's page beside MLflow's, on loopback, until Ctrl-C.

Both servers get a session of their own with signals as they are by default (a shell's background job ignores SIGINT,
and its children inherit that), and are ended as a group, so that no child goes on scheduling alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from mmlm.errors import LaunchError, MmlmError
from mmlm.storage import write_bytes
from mmlm.world import quiet_environment

MLFLOW_PORT, DAGSTER_PORT = 5000, 3000
START_SECONDS = 120


def main() -> int:
    """Start both servers, say where they are, and end them when told. Exit code 2 with a sentence when they cannot."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    mlflow_port = int(os.environ.get("MLFLOW_PORT", MLFLOW_PORT))
    dagster_port = int(os.environ.get("DAGSTER_PORT", DAGSTER_PORT))
    servers: dict[str, subprocess.Popen[bytes]] = {}
    runs = Path("runs").resolve()
    runs.mkdir(exist_ok=True)
    try:
        for name, port in (("MLFLOW_PORT", mlflow_port), ("DAGSTER_PORT", dagster_port)):
            require_free(port, name)
        pages = {"MLflow": f"http://127.0.0.1:{mlflow_port}", "Dagster": f"http://127.0.0.1:{dagster_port}"}
        environment = {**quiet_environment(), **os.environ, "MMLM_MLFLOW_PAGE": pages["MLflow"]}
        uri = tracking_uri(environment, runs)
        servers["MLflow"] = start(mlflow_command(uri, runs, mlflow_port), environment, runs / "mlflow-ui.log")
        servers["Dagster"] = start(
            dagster_command(dagster_port), dagster_environment(environment, runs), runs / "dagster-ui.log"
        )
        for name, page in pages.items():
            wait(name, page, servers, runs)
            print(f"{name:<8} {page}", flush=True)
        print("Ctrl-C ends both.", flush=True)
        watch(servers, runs)
    except KeyboardInterrupt:
        print()
    except MmlmError as error:
        print(f"mmlm: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # ending is under way
        stop(list(servers.values()))
    return 0


def require_free(port: int, variable: str) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            raise LaunchError(
                f"port {port} is already in use",
                cure=f"end what uses it, or choose another: make ui {variable}={port + 1}",
            ) from None


def tracking_uri(environment: dict[str, str], runs: Path) -> str:
    """Where the runs are; a new database is made whole first, since servers' workers race on an empty one."""
    from mmlm.tracking_store import open_client

    uri = environment.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}"
    open_client(uri)
    return uri


def mlflow_command(uri: str, runs: Path, port: int) -> list[str]:
    return [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--default-artifact-root",
        str(runs / "mlartifacts"), "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip


def dagster_command(port: int) -> list[str]:
    return [
        sys.executable, "-m", "dagster", "dev", "-m", "pipelines.definitions", "--host", "127.0.0.1",
        "--port", str(port),
    ]  # fmt: skip


def dagster_environment(environment: dict[str, str], runs: Path) -> dict[str, str]:
    home = runs / "dagster"
    if not (home / "dagster.yaml").exists():
        write_bytes(home / "dagster.yaml", Path(__file__).with_name("dagster.yaml").read_bytes())
    return {**environment, "DAGSTER_HOME": str(home)}


def start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", _DEFAULT_SIGNALS, *command],
            env={**environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


_DEFAULT_SIGNALS = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # told to end when `make ui` itself is killed
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def wait(name: str, page: str, servers: dict[str, subprocess.Popen[bytes]], runs: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(page, timeout=5):
                return
        except (OSError, urllib.error.URLError):
            check(servers, runs)
            if time.monotonic() > deadline:
                raise LaunchError(f"{name} does not answer", cure=f"see {runs / f'{name.lower()}-ui.log'}") from None
            time.sleep(0.5)


def watch(servers: dict[str, subprocess.Popen[bytes]], runs: Path) -> None:
    while True:
        check(servers, runs)
        time.sleep(1)


def check(servers: dict[str, subprocess.Popen[bytes]], runs: Path) -> None:
    for name, server in servers.items():
        if server.poll() is not None:
            raise LaunchError(
                f"{name} ended with code {server.returncode}", cure=f"see {runs / f'{name.lower()}-ui.log'}"
            )


def stop(servers: list[subprocess.Popen[bytes]], seconds: float = 10.0) -> None:
    """Each server and all it started: asked first, made after `seconds`."""
    for server in servers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    for server in servers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(max(0.1, deadline - time.monotonic()))
    while time.monotonic() < deadline and any(_group_lives(server.pid) for server in servers):
        time.sleep(0.1)
    for server in servers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
