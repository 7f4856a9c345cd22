"""A Ray cluster on this machine whose second node, at 127.0.0.2, can be killed or frozen."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from mmlm.shards.faultpoints import VARIABLE
from mmlm.world import quiet_environment
from tests.faults.stage import MARK, NOTICE, ROOT, Hold, marked, wait_for

HEAD, SECOND = "127.0.0.1", "127.0.0.2"


class Cluster:
    """The head node, with one core. Its first task waits at `hold` in each cell, so that the second node gets one, too."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mf-", dir="/tmp"))  # Ray's sockets need a short path
        self.mark, self.port = uuid.uuid4().hex, _free_port()
        self.address = f"{HEAD}:{self.port}"
        self.hold = Hold(folder / "head", "before_temporary")
        self.log = folder / "ray.log"

    @classmethod
    @contextlib.contextmanager
    def started(cls, folder: Path) -> Iterator[Cluster]:
        made = cls(folder)
        try:
            made._start(made.mark, made.hold, "--head", f"--port={made.port}", f"--node-ip-address={HEAD}",
                        "--include-dashboard=false", f"--ray-client-server-port={_free_port()}",
                        f"--temp-dir={made.folder}")  # fmt: skip
            wait_for("the head node", lambda: made.alive() == 1, 60)
            yield made
        finally:
            _kill(made.mark)
            shutil.rmtree(made.folder, ignore_errors=True)

    def _start(self, mark: str, hold: Hold | None, *flags: str) -> None:
        environment = {
            **{name: value for name, value in os.environ.items() if name != VARIABLE},
            **quiet_environment(), **NOTICE, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), MARK: mark,
            **(hold.environment if hold else {}),
        }  # fmt: skip
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--num-cpus=1", "--object-store-memory=100000000"]
        with self.log.open("ab") as log:
            done = subprocess.run(
                [*ray, "--disable-usage-stats", *flags], env=environment, cwd=ROOT, stdout=log, stderr=log, timeout=90
            )
        assert done.returncode == 0, self.log.read_text()[-2000:]

    def alive(self) -> int:
        """Nodes that the cluster takes for alive."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        try:
            nodes = GcsClient(address=self.address).get_all_node_info(timeout=5)
            return sum(node.state == 0 for node in nodes.values())
        except Exception:  # its errors are of many kinds while a head comes up
            return -1

    @contextlib.contextmanager
    def second(self, hold: Hold | None) -> Iterator[Node]:
        """A second node of one core whose workers are held at `hold`. It is gone afterwards, whatever it became."""
        wait_for("one node alone", lambda: self.alive() == 1, 60)
        self.hold.reset()
        mark = uuid.uuid4().hex
        try:
            self._start(mark, hold, f"--address={self.address}", f"--node-ip-address={SECOND}")
            wait_for("two nodes", lambda: self.alive() == 2, 60)
            yield Node(mark)
        finally:
            self.hold.go()
            _kill(mark)


class Node:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def kill(self) -> None:
        """As if the machine had lost its power."""
        _kill(self.mark)

    def freeze(self) -> None:
        for pid in marked(self.mark):
            os.kill(pid, signal.SIGSTOP)


def _kill(mark: str) -> None:
    for _ in range(100):
        found = marked(mark)
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            return
        wait_for("killed", lambda found=found: not set(found) & set(marked(mark)), 20)  # type: ignore[misc]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((HEAD, 0))
        port: int = s.getsockname()[1]
        return port
