"""The whole keypad story at its smallest, through the public commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.runs import losses

SMALLEST = [
    "--set", "scan.sources=[{kind: keypad, images: 120, renderings: 1, renderings_held_out: 1}]",
    "--set", "train.steps=6", "--set", "train.data.batch=32",
    "--set", "distill.steps=4", "--set", "distill.data.batch=32",
    "--set", "shard.shard_records=40",
    "--set", "evaluate.bootstrap.samples=100",
]  # fmt: skip


def mmlm(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))} | variables
    command = [sys.executable, "-m", "mmlm.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the story was run once."""
    folder = tmp_path_factory.mktemp("story")
    done = mmlm(folder, "run", "demo", *SMALLEST)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "digit" in done.stdout and "report.html" in done.stdout
    return folder


def summary(folder: Path) -> dict[str, object]:
    return json.loads((folder / "runs/demo/summary.json").read_text())


def test_every_record_is_accounted_for(told: Path):
    stages = {s["name"]: s["counts"] for s in summary(told)["stages"]}  # type: ignore[attr-defined]
    assert list(stages) == ["scan", "shard", "train", "distill", "evaluate", "register"]
    assert stages["scan"]["found"] == stages["scan"]["kept"] + stages["scan"]["refused"] == 120
    assert stages["shard"]["records"] == stages["shard"]["samples"] + stages["shard"]["quarantined"] == 120
    assert stages["train"]["ranks"] == 2 and stages["train"]["zero_stage"] == 2


def test_the_second_run_recomputes_nothing(told: Path):
    done = mmlm(told, "run", "demo", *SMALLEST)
    assert done.returncode == 0 and "nothing was recomputed" in done.stdout
    assert all(s["skipped"] for s in summary(told)["stages"])  # type: ignore[attr-defined]


def test_the_champion_answers_on_the_command_line(told: Path):
    picture = next((told / "runs/demo/raw/keypad").rglob("*.png"))
    sound = next((told / "runs/demo/raw/keypad").rglob("*.wav"))
    lines = [
        {"text": "Which number is it?", "image": str(picture)},
        {"audio": str(sound)},
        {"image": str(told / "gone.png")},
    ]
    (told / "ask.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = mmlm(told, "predict", "--model", "models:/mmlm-demo@champion", "--input", "ask.jsonl", "--json")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 2 and len(answers) == 3
    assert all(set(a) >= {"answer", "score", "label_scores"} for a in answers[:2])
    assert sum(answers[0]["label_scores"].values()) == pytest.approx(1, abs=1e-3)
    assert "gone.png" in answers[2]["error"]


def test_shards_verify_and_every_noun_can_be_inspected(told: Path):
    assert mmlm(told, "verify", "runs/demo/shards").returncode == 0
    done = mmlm(told, "inspect", "runs/demo", "--json")
    assert set(json.loads(done.stdout)["nouns"]) == {"manifest", "shards", "model", "student", "report", "registered"}


def test_a_finished_training_is_up_to_date_however_it_is_to_run(told: Path):
    made = (told / "runs/demo/model/artifact.json").read_bytes()
    done = mmlm(told, "train", "demo", *SMALLEST, "--set", "train.zero.stage=3", "--set", "train.keep=7")
    assert done.returncode == 0 and "train: already there" in done.stdout, done.stderr
    assert "runs/demo/model is finished, with other zero, keep: that is how it ran" in done.stderr
    assert (told / "runs/demo/model/artifact.json").read_bytes() == made
    done = mmlm(told, "distill", "demo", *SMALLEST, "--set", "distill.accumulate=2")
    assert done.returncode == 0 and "distill: already there" in done.stdout, done.stderr
    assert "runs/demo/student is finished, with other accumulate: that is how it ran" in done.stderr
    done = mmlm(told, "train", "demo", *SMALLEST, "--set", "train.precision=fp32")
    assert done.returncode == 2 and "made from another config" in done.stderr


@pytest.mark.slow
def test_a_stopped_training_goes_on_at_another_stage_and_on_other_ranks(told: Path):
    """From stage 2 over 3 to 1 on one rank; each attempt finds the wish to stop, and takes one step."""
    settings = [*SMALLEST, "--shards", "runs/demo/shards", "--out", "elsewhere"]
    (told / "stop").touch()
    for number, stage in ((1, 2), (2, 3)):
        way = ["--ranks", "2", "--set", f"train.zero.stage={stage}"]
        done = mmlm(told, "train", "demo", *settings, *way, MMLM_STOP_FILE=str(told / "stop"))
        assert done.returncode == 4 and f"saved at step {number} of 6 ({told / 'stop'} is there)" in done.stderr
        assert json.loads((told / "elsewhere/model/plan.json").read_text())["how"]["zero"]["stage"] == stage
    way = ["--ranks", "1", "--resume", "--set", "train.zero.stage=1", "--set", "train.accumulate=2"]
    done = mmlm(told, "train", "demo", *settings, *way)
    assert done.returncode == 0 and "going on from step 2, proved on the probe batch" in done.stderr, done.stderr
    whole, cut = losses(told / "runs/demo/model"), losses(told / "elsewhere/model")
    assert whole.keys() == cut.keys() == {6} and cut[6] == pytest.approx(whole[6], rel=2**-8)  # bf16 keeps 8 bits
    made = [json.loads((told / f / "model/artifact.json").read_text()) for f in ("runs/demo", "elsewhere")]
    assert made[0]["fingerprint"] == made[1]["fingerprint"] and made[1]["counts"]["zero_stage"] == 1


@pytest.mark.slow
def test_one_changed_number_reruns_what_depends_on_it_and_back_again(told: Path):
    done = mmlm(told, "run", "demo", *SMALLEST, "--set", "distill.steps=5")
    assert done.returncode == 0, done.stderr[-2000:]
    skipped = {s["name"]: s["skipped"] for s in summary(told)["stages"]}  # type: ignore[attr-defined]
    assert skipped == {
        "scan": True,
        "shard": True,
        "train": True,
        "distill": False,
        "evaluate": False,
        "register": False,
    }
    done = mmlm(told, "run", "demo", *SMALLEST)
    assert done.returncode == 0
    assert all(s["skipped"] for s in summary(told)["stages"])  # type: ignore[attr-defined]
