"""Time limits, stop files, signals, and where they come from."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.errors import ConfigError, Interrupted
from mmlm.tracking import NullTracker
from mmlm.train.config import TrainConfig
from mmlm.train.control import SAVE_RATE, START_SECONDS, Stop, Where, first_save, seconds_of
from mmlm.train.peak import peak_flops
from mmlm.train.planning import saved_bytes
from mmlm.train.train import run_ranks
from tests.faults.stage import ROOT, wait_for
from tests.train.runs import losses


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3:59:00", 14340),
        ("1-12:00:00", 129600),
        ("59:30", 3570),
        ("90", 90),
        ("1.5h", 5400),
        ("45m", 2700),
        ("2d", 172800),
    ],
)
def test_durations(text: str, seconds: float):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "3:", "4 weeks", "-5", "1:2:3:4"])
def test_what_is_no_duration_is_refused(text: str):
    with pytest.raises(ConfigError, match="3:59:00"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("MMLM_HANG_SECONDS", "30m"), ("MMLM_DEADLINE", "soon"), ("SLURM_JOB_END_TIME", "nan"), ("MMLM_DEADLINE", "-1"),
        ("MMLM_PEAK_TFLOPS", "0"), ("MMLM_PEAK_TFLOPS", "989T"),
    ],
)  # fmt: skip
def test_a_variable_that_is_no_number_is_named(name: str, told: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, told)
    read = Where.from_environment if "PEAK" not in name else lambda: peak_flops(torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match=f"{name} is '{told}'"):
        read()


def test_a_time_limit_leaves_room_for_the_step_and_the_save():
    left = START_SECONDS + 10
    with Stop(Where(deadline=time.time() + left)) as stop:
        assert not stop.wanted(step_seconds=2, save_seconds=4)
        assert not stop.reason
        assert stop.wanted(step_seconds=2, save_seconds=6)
        assert "time is over" in stop.why
        assert stop.wanted(step_seconds=0, save_seconds=0.1)  # once asked, always asked


def test_a_time_limit_leaves_room_for_the_looks_that_are_due():
    with Stop(Where(deadline=time.time() + START_SECONDS + 20)) as stop:
        assert not stop.wanted(step_seconds=2, save_seconds=4, look_seconds=8)
        assert stop.wanted(step_seconds=2, save_seconds=4, look_seconds=13)


def test_compiling_at_stage_3_is_refused():
    with pytest.raises(ConfigError, match=r"compile does not work at zero\.stage 3"):
        parse(TrainConfig, {"compile": True, "zero": {"stage": 3}}, "test")
    assert parse(TrainConfig, {"compile": True, "zero": {"stage": 2}}, "test").compile


def test_before_a_save_was_measured_its_size_tells():
    config = parse(TrainConfig, {}, "test")
    assert first_save(saved_bytes(config, 1e6, 0)) == 20
    assert first_save(saved_bytes(config, 7e9, 0)) == pytest.approx(12 * 7e9 / SAVE_RATE)
    small = parse(TrainConfig, {"optimizer": {"kind": "lion"}, "ema": {"decay": 0.9}}, "test")
    assert saved_bytes(small, 10, 5) == (4 + 4 + 4) * 10 + 4 * 5


def test_the_earlier_of_flag_and_slurm_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MMLM_DEADLINE", "2000")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    assert Where.from_environment().deadline == 1000
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert Where.from_environment().deadline == 2000
    assert Where(**Where.from_environment().plain()) == Where.from_environment()


def test_a_file_and_a_signal_ask_to_stop(tmp_path: Path):
    before = signal.getsignal(signal.SIGUSR1)
    with Stop(Where(stop_file=str(tmp_path / "stop"))) as stop:
        assert not stop.wanted(1, 1)
        (tmp_path / "stop").touch()
        stop._looked = 0.0
        assert stop.wanted(1, 1)
    with Stop(Where()) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.wanted(1, 1)
        assert stop.why == " (SIGUSR1)"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_student_without_a_teacher_need_not_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It begins after the one that `mmlm distill --resume` means, and has no checkpoint then."""
    monkeypatch.setenv("MMLM_RESUME", "1")
    told = {}

    def launch(target: str, arguments: dict[str, Any], *, log: Path) -> None:
        told[target] = arguments["where"]["resume"]
        raise Interrupted("enough")

    config = parse(TrainConfig, {}, "test")
    for verb in ("train", "distill", "distill-scratch"):
        work = artifacts.begin(tmp_path / verb, "checkpoint", recipe=1, config=config, parents={})
        with pytest.raises(Interrupted):
            run_ranks(work, config, verb, {}, launch, NullTracker(), verb)
    assert told == {"train": True, "distill": True, "distill-scratch": False}


def test_who_asked_is_known_and_a_time_limit_is_nobody(tmp_path: Path):
    for where in (Where(deadline=time.time()), Where(stop_file=str(tmp_path))):
        with Stop(where) as stop:
            assert stop.wanted(1, 1)
            assert stop.asked == (where.deadline is None)
    with Stop(Where(deadline=time.time())) as stop:
        assert stop.wanted(1, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked


def one_rank(out: Path, log: Path) -> subprocess.Popen[bytes]:
    """`mmlm train` as the only rank of a torchrun, or task of a Slurm job."""
    sets = ["steps=20", "log_every=1", "data.batch=8", "model.width=32", "model.layers=1", "model.heads=2"]
    command = [sys.executable, "-m", "mmlm.cli", "train", "demo", "--out", str(out)]
    command += ["--tracking-uri", f"sqlite:///{out.parent}/mlflow.db"]
    command += [word for change in sets for word in ("--set", f"train.{change}")]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519"}
    with log.open("ab") as f:
        return subprocess.Popen(
            command, env={**os.environ, **rank, "PYTHONPATH": str(ROOT)}, cwd=ROOT, stdout=f, stderr=f
        )


def test_a_stop_after_the_last_step_ends_the_command(keypad_shards: Artifact, tmp_path: Path):
    """What would follow it in `mmlm run` is not to begin; the next attempt has only the model to write."""
    out, log = tmp_path / "out", tmp_path / "log.txt"
    shutil.copytree(keypad_shards.path, out / "shards")
    rank = one_rank(out, log)
    try:
        rows = out / "model" / "metrics.jsonl"
        wait_for(
            "the last step",
            lambda: rank.poll() is not None or (rows.exists() and '"step": 20,' in rows.read_text()),
            200,
            log.read_text,
        )
        rank.send_signal(signal.SIGTERM)
        assert rank.wait(60) == Interrupted.exit_code, log.read_text()
    finally:
        rank.kill()
    assert "is saved at step 20 of 20 (SIGTERM)" in log.read_text()
    assert not (out / "model" / artifacts.NAME).exists()
    rank = one_rank(out, log)
    try:
        assert rank.wait(200) == 0, log.read_text()
    finally:
        rank.kill()
    assert "going on from step 20" in log.read_text()
    assert sorted(losses(out / "model")) == list(range(1, 21))
    assert artifacts.read(out / "model").counts["steps"] == 20
