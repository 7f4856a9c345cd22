"""Ranks on Ray: a stop of the driver reaches them as a file and is saved; losses count from the last checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.errors import ArtifactError, Interrupted, LaunchError, WorkLost
from mmlm.launch.local import count_signals
from mmlm.launch.ray_train import RESTARTS, STOP_WAIT, Asked, Losses, RayRanks, fitting, patience, stoppable
from mmlm.train.control import Stop, Where
from mmlm.world import quiet_environment
from tests.faults.stage import wait_for

ROOT = Path(__file__).parents[2]
STEPS = 400


def test_a_rank_off_the_main_thread_sees_the_drivers_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMLM_STOP_FILE", str(tmp_path / "stop"))
    seen: list[bool] = []

    def rank() -> None:
        with Stop(Where()) as stop:
            for _ in range(2):
                stop._looked = 0.0
                seen.append(stop.wanted(1, 1))
                (tmp_path / "stop").touch()

    thread = threading.Thread(target=rank)
    thread.start()
    thread.join()
    assert seen == [False, True]


def send(number: int, *, times: int, after: float = 0.1) -> None:
    def later() -> None:
        for _ in range(times):
            time.sleep(after)
            os.kill(os.getpid(), number)

    threading.Thread(target=later, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_becomes_a_file_and_the_work_ends_by_itself(tmp_path: Path, number: signal.Signals) -> None:
    stop, saved = tmp_path / "stop", []

    def work() -> None:
        while not stop.exists():
            time.sleep(0.01)
        saved.append(True)

    before = signal.getsignal(number)
    send(number, times=1)
    with count_signals(Asked()) as asked:
        stoppable(work, stop, asked, 20)
    assert saved and asked.signals == 1 and signal.getsignal(number) is before


@pytest.mark.parametrize(("times", "seconds"), [(1, 0.2), (2, 600)], ids=["too long", "a second signal"])
def test_the_wait_after_a_stop_has_an_end(tmp_path: Path, times: int, seconds: float) -> None:
    never = threading.Event()
    send(signal.SIGTERM, times=times, after=1.1)
    with count_signals(Asked()) as asked, pytest.raises(Interrupted, match="before it could save") as caught:
        stoppable(lambda: never.wait(60) and None, tmp_path / "stop", asked, seconds)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("sent", "counted"),
    [
        ("USR1 TERM", 1),
        ("USR1 USR1 USR1", 1),
        ("TERM USR1", 1),
        ("USR1 TERM TERM", 2),
        ("USR1 INT", 2),
        ("TERM INT", 2),
    ],
)
def test_an_order_after_a_notice_is_not_the_second_one(sent: str, counted: int) -> None:
    """A spot machine says SIGUSR1 and later SIGTERM, and so does Slurm at the end of a job's time: the ranks save on."""
    with count_signals(Asked()) as asked:
        for name in sent.split():
            os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
            time.sleep(1.1)
    assert asked.signals == counted


def test_what_the_work_raises_comes_out(tmp_path: Path) -> None:
    def work() -> None:
        raise ArtifactError("found this")

    with pytest.raises(ArtifactError, match="found this"):
        stoppable(work, tmp_path / "stop", Asked(), 1)


def test_ray_kills_only_after_our_own_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for told, seconds in (("600", 585), ("10", 5), ("soon", 585), (None, 585)):
        monkeypatch.setenv(STOP_WAIT, told) if told else monkeypatch.delenv(STOP_WAIT)
        assert patience() == seconds


def test_a_new_checkpoint_starts_the_count_of_losses_anew(tmp_path: Path) -> None:
    losses = Losses(tmp_path)
    for week in range(3):
        (tmp_path / f"step-{week:08d}").mkdir()
        assert [losses.survivable() for _ in range(RESTARTS)] == [True] * RESTARTS
    assert not losses.survivable()
    (tmp_path / "step-00000009").mkdir()
    assert losses.survivable()
    (tmp_path / "step-00000009").rmdir()  # rolled back: no progress
    assert losses.survivable() and losses.count == 2


def test_ranks_may_be_as_many_as_the_cluster_may_grow_to(capfd: pytest.CaptureFixture[str]) -> None:
    up = {"CPU": 4.0, "GPU": 2.0, "memory": 1e9}
    assert fitting(None, up, {}) == RayRanks(2, gpu=True, threads=2)
    assert fitting(8, up, {"CPU": 16, "GPU": 8}) == RayRanks(8, gpu=True, threads=2)
    assert fitting(None, up, {"CPU": 16, "GPU": 8}).ranks == 2
    assert fitting(None, {"CPU": 1.0}, {"CPU": 16, "GPU": 8}).gpu
    for most in ({}, {"CPU": 16, "GPU": 8}):
        with pytest.raises(LaunchError, match=r"9 ranks on a Ray cluster with \d GPUs"):
            fitting(9, up, most)
    assert not capfd.readouterr().err
    assert fitting(None, {"CPU": 4.0}, {}) == RayRanks(2, gpu=False, threads=2)
    assert "no GPU on the Ray cluster now" in capfd.readouterr().err


def rank_on_ray(out: Path, target: str, **args: object) -> subprocess.Popen[str]:
    """The driver of one rank on a Ray of its own."""
    code = (
        "from pathlib import Path\nfrom mmlm.errors import MmlmError\nfrom mmlm.launch import ray_train\n"
        f"out = Path({str(out)!r})\nargs = {{'folder': str(out), **{args!r}}}\n"
        f"try:\n    ray_train.ranks(1)('tests.launch.targets:{target}', args, log=out / 'model' / 'log')\n"
        "except MmlmError as error:\n    print('mmlm:', error, flush=True)\n    raise SystemExit(error.exit_code)"
    )
    environment = {**os.environ, **quiet_environment(), "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def on_ray(out: Path, times: int, then: str) -> tuple[int, str]:
    """One rank that is lost `times` times. Exit code, and what was said."""
    driver = rank_on_ray(out, "lose_times", times=times, then=then)
    said = driver.communicate(timeout=280)[0]
    return driver.returncode, said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_hang_and_a_death_are_survived_and_bad_input_is_not(tmp_path: Path) -> None:
    status, said = on_ray(tmp_path, 2, "refuse")
    assert "starting the ranks again (1 of 3)" in said and "starting the ranks again (2 of 3)" in said, said[-3000:]
    assert status == ArtifactError.exit_code and "found this; wanted that; do so" in said, said[-3000:]
    assert len(list(tmp_path.glob("attempt-*"))) == 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_losses_without_a_new_checkpoint_have_an_end(tmp_path: Path) -> None:
    status, said = on_ray(tmp_path, 100, "")
    assert status == WorkLost.exit_code and "again (3 of 3)" in said and "4 of 3" not in said, said[-3000:]
    assert len(list(tmp_path.glob("attempt-*"))) == RESTARTS + 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stop_that_the_ranks_no_longer_see_ends_the_driver(tmp_path: Path) -> None:
    """Else the next stage would begin, and never hear of it."""
    driver = rank_on_ray(tmp_path, "end_well", seconds=4)
    try:
        wait_for("the rank is at work", lambda: (tmp_path / "up").exists() or driver.poll() is not None, 240)
        driver.send_signal(signal.SIGTERM)
        said = driver.communicate(timeout=120)[0]
    finally:
        driver.kill()
    assert (tmp_path / "done").exists(), said[-3000:]
    assert driver.returncode == Interrupted.exit_code and "asked to stop" in said, said[-3000:]


def train(out: Path, log: Path) -> subprocess.Popen[bytes]:
    """The driver of a Ray job, on a Ray of its own on this machine."""
    sets = [f"steps={STEPS}", "save_every=1000", "log_every=1", "data.batch=16", "model.width=32", "model.heads=2"]
    command = [sys.executable, "-m", "mmlm.cli", "train", "demo", "--out", str(out), "--ranks", "2", "--inside-ray"]
    command += ["--tracking-uri", f"sqlite:///{out.parent}/mlflow.db"]
    command += [word for change in sets for word in ("--set", f"train.{change}")]
    environment = {**os.environ, **quiet_environment(), "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as f:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=f, stderr=f, start_new_session=True)


def steps_of(rows: Path) -> list[int]:
    table = [json.loads(row) for row in rows.read_text().splitlines()] if rows.exists() else []
    return [row["step"] for row in table if "loss" in row["metrics"]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_training_on_ray_is_saved_and_goes_on(keypad_shards: Artifact, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "train.log"
    shutil.copytree(keypad_shards.path, out / "shards")
    driver = train(out, log)
    try:
        deadline = time.monotonic() + 240
        while len(steps_of(out / "model" / "metrics.jsonl")) < 20:
            assert driver.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(120) == 4, log.read_text()[-3000:]
    finally:
        driver.kill()
    steps = steps_of(out / "model" / "metrics.jsonl")
    (saved,) = (out / "model" / "checkpoints").glob("step-*")
    stopped = int(saved.name.partition("-")[2])
    assert steps == list(range(1, stopped + 1)) and stopped < STEPS
    assert f"saved at step {stopped} of {STEPS}" in log.read_text()

    again = train(out, log)
    try:
        assert again.wait(300) == 0, log.read_text()[-3000:]
    finally:
        again.kill()
    assert f"going on from step {stopped}" in log.read_text()
    assert artifacts.read(out / "model").counts["steps"] == STEPS
    assert steps_of(out / "model" / "metrics.jsonl") == list(range(1, STEPS + 1))
