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
from urllib.parse import urlsplit, urlunsplit

from mmlm.errors import ConfigError, LaunchError, MmlmError
from mmlm.storage import write_bytes
from mmlm.world import quiet_environment

MLFLOW_PORT, DAGSTER_PORT = 5000, 3000
START_SECONDS = 120


def main() -> int:
    """Start both servers, say where they are, and end them when told. Exit code 2 with a sentence when they cannot."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    servers: dict[str, subprocess.Popen[bytes]] = {}
    runs = Path("runs").resolve()
    runs.mkdir(exist_ok=True)
    try:
        ports = {"MLflow": port("MLFLOW_PORT", MLFLOW_PORT), "Dagster": port("DAGSTER_PORT", DAGSTER_PORT)}
        environment = {**quiet_environment(), **os.environ}
        uri = tracking_uri(environment, runs)
        pages, commands = arrange(uri, runs, ports)
        for name in commands:
            require_free(ports[name], f"{name.upper()}_PORT")
        environment = dagster_environment({**environment, "MMLM_MLFLOW_PAGE": pages["MLflow"]}, runs)
        for name, command in commands.items():
            servers[name] = start(command, environment, runs / f"{name.lower()}-ui.log")
        for name, page in pages.items():
            if name in servers:
                wait(name, page, servers, runs)
            print(f"{name:<8} {page}", flush=True)
        print(f"Ctrl-C ends {' and '.join(servers)}.", flush=True)
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


def port(variable: str, default: int) -> int:
    """The port that `variable` names. Raises ConfigError when it is none."""
    told = os.environ.get(variable) or str(default)
    if not told.isascii() or not told.isdigit() or not 0 < int(told) < 65536:
        raise ConfigError(f"{variable} is {told!r}", wanted="a port, 1 to 65535")
    return int(told)


def arrange(uri: str, runs: Path, ports: dict[str, int]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The pages, and the commands of the servers to start for them: where `uri` is a server of MLflow, that one has its page."""
    pages = {name: f"http://127.0.0.1:{number}" for name, number in ports.items()}
    commands = {"MLflow": mlflow_command(uri, runs, ports["MLflow"]), "Dagster": dagster_command(ports["Dagster"])}
    if uri.startswith(("http://", "https://")):
        parts = urlsplit(uri)
        pages["MLflow"] = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
        del commands["MLflow"]
    return pages, commands


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
