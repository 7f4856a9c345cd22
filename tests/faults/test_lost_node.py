"""Training on two Ray nodes with addresses of their own; one is lost in mid-run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.launch.ray_backend import interface_of
from mmlm.world import quiet_environment
from tests.faults import networks
from tests.faults.cluster import _free_port, _kill
from tests.faults.networks import HEAD, SECOND, Hosts
from tests.faults.stage import MARK, NOTICE, ROOT, wait_for

STEPS, SAVE = 800, 40


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.1") is None


class Pair:
    """The two nodes, one core each, and what runs on them; each has a mark of its own."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.address = f"{HEAD}:{_free_port()}"
        self.marks = {hosts.head: uuid.uuid4().hex, hosts.second: uuid.uuid4().hex}
        self.temporary = Path("/tmp") / f"mn-{uuid.uuid4().hex[:8]}"  # Ray's sockets need a short path

    def environment(self, host: str) -> dict[str, str]:
        return {
            **os.environ, **quiet_environment(), **NOTICE, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT),
            MARK: self.marks[host], "RAY_ADDRESS": self.address,
        }  # fmt: skip

    def start(self, host: str, *flags: str) -> None:
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--num-cpus=1", "--object-store-memory=100000000"]
        with (self.folder / "ray.log").open("ab") as log:
            done = subprocess.run(
                self.hosts.on(host, *ray, "--disable-usage-stats", *flags),
                env={k: v for k, v in self.environment(host).items() if k != "RAY_ADDRESS"},
                cwd=ROOT, stdout=log, stderr=log, timeout=120,
            )  # fmt: skip
        assert done.returncode == 0, (self.folder / "ray.log").read_text()[-2000:]

    def close(self) -> None:
        for mark in self.marks.values():
            _kill(mark)
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    if why := networks.missing():
        pytest.skip(why)
    with Hosts.joined() as hosts:
        made = Pair(hosts, tmp_path)
        try:
            port = made.address.partition(":")[2]
            made.start(hosts.head, "--head", f"--port={port}", f"--node-ip-address={HEAD}",
                       "--include-dashboard=false", f"--temp-dir={made.temporary}")  # fmt: skip
            made.start(hosts.second, f"--address={made.address}", f"--node-ip-address={SECOND}")
            yield made
        finally:
            made.close()


def lose_power(pair: Pair) -> None:
    _kill(pair.marks[pair.hosts.second])


def lose_cable(pair: Pair) -> None:
    pair.hosts.unplug()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lose", [lose_power, lose_cable], ids=lambda lose: str(lose.__name__))
def test_training_goes_on_from_the_last_checkpoint(
    pair: Pair, lose: Callable[[Pair], None], keypad_shards: Artifact, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(keypad_shards.path, out / "shards")
    sets = [f"steps={STEPS}", f"save_every={SAVE}", "log_every=1", "data.batch=16", "model.width=32", "model.heads=2"]
    command = [sys.executable, "-m", "mmlm.cli", "train", "demo", "--out", str(out), "--ranks", "2", "--inside-ray"]
    command += ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    command += [word for change in sets for word in ("--set", f"train.{change}")]
    rows, saved = out / "model" / "metrics.jsonl", out / "model" / "checkpoints"
    log = tmp_path / "train.log"
    with log.open("wb") as f:
        head = pair.hosts.head
        driver = subprocess.Popen(
            pair.hosts.on(head, *command), env=pair.environment(head), cwd=ROOT, stdout=f, stderr=f
        )

    def at_work() -> bool:
        assert driver.poll() is None, log.read_text()[-3000:]
        return len(list(saved.glob("step-*"))) > 0 and rows.read_text().count("\n") > SAVE

    wait_for("a checkpoint", at_work, 180, lambda: log.read_text()[-3000:])
    assert f"(ip={SECOND}, pid=" in log.read_text()  # a rank is on the second node
    lost_at = time.time() * 1000
    last = max(int(path.name.partition("-")[2]) for path in saved.glob("step-*"))
    assert last < STEPS - SAVE
    lose(pair)
    assert driver.wait(300) == 0, log.read_text()[-5000:]
    made = artifacts.read(out / "model")
    assert made.counts["steps"] == STEPS
    assert made.counts["ranks"] == 1  # one node is left
    table = [row for row in map(json.loads, rows.read_text().splitlines()) if "loss" in row["metrics"]]
    assert [row["step"] for row in table] == list(range(1, STEPS + 1))
    assert all(row["time"] <= lost_at for row in table if row["step"] <= last - SAVE)  # not trained again
    assert any(row["time"] > lost_at for row in table)
