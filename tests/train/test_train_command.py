"""`mmlm train` as people call it, by itself and under a real torchrun: killed, hung, and what `--resume` refuses."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard
from mmlm.train import checkpoint
from tests.faults.stage import MARK, ROOT, marked, wait_for
from tests.train.runs import losses, saved, stopped

STEPS = 24
SETS = [f"steps={STEPS}", "save_every=4", "keep=9", "log_every=1", "data.batch=12"]
SETS += ["model.width=32", "model.layers=1", "model.heads=2"]


class Command:
    """The verb `train` of the story demo in a process of its own, on the shards that lie in `out`."""

    def __init__(self, out: Path, *flags: str, agent: tuple[str, ...] | None = None, **env: str) -> None:
        """`agent`: flags of torchrun, which starts two ranks unless they say otherwise; None: the command without torchrun."""
        self.mark, self.said = uuid.uuid4().hex, out.parent / f"said-{uuid.uuid4().hex}.txt"
        start = [sys.executable, "jobs/train.py"]
        if agent is not None:
            start = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                *agent,
                "--",
                "jobs/train.py",
            ]
        sets = [word for change in SETS for word in ("--set", f"train.{change}")]
        command = [
            *start,
            "demo",
            "--out",
            str(out),
            "--tracking-uri",
            f"sqlite:///{out.parent}/mlflow.db",
            *sets,
            *flags,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: self.mark, **env}
        with self.said.open("wb") as file:
            self.process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip

    def words(self) -> str:
        return self.said.read_text(errors="replace")

    def end(self) -> int:
        """The exit code; nothing of it is left."""
        try:
            return self.process.wait(240)
        finally:
            for pid in marked(self.mark):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def rank(self, number: int) -> int:
        """Its process id."""
        for pid in marked(self.mark):
            with contextlib.suppress(OSError):
                if f"RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    return pid
        raise AssertionError(f"no rank {number}: {self.words()}")


def placed(shards: Artifact, out: Path) -> Path:
    shutil.copytree(shards.path, out / "shards")
    return out


@pytest.fixture(scope="module")
def whole(keypad_shards: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A training under torchrun that nothing befell."""
    out = placed(keypad_shards, tmp_path_factory.mktemp("whole") / "out")
    run = Command(out, agent=())
    assert run.end() == 0, run.words()
    return artifacts.read(out / "model")


def struck(whole: Artifact, out: Path, step: int = 8) -> Path:
    """As if that training had been killed after it had saved `step`."""
    shutil.copytree(whole.path.parent, out, ignore=shutil.ignore_patterns("model"))
    stopped(whole, out / "model", step)
    return out


def test_a_training_under_torchrun_comes_to_its_end(whole: Artifact):
    assert sorted(losses(whole.path)) == list(range(1, STEPS + 1)) and whole.counts["ranks"] == 2
    assert checkpoint.steps(whole.path / "checkpoints") == set(range(4, STEPS + 1, 4))
    assert not list((whole.path / "logs").glob("*.error.json"))
    [said] = [file.read_text() for file in whole.path.parent.parent.glob("said-*.txt")]
    found = re.search(r"train: done: .* plan ([\d.]+) ms a step \(planned ([\d.]+)\)", said)
    assert found and all(0 < float(milliseconds) < 10_000 for milliseconds in found.groups())


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_is_killed_costs_no_more_than_what_was_not_saved(
    whole: Artifact, keypad_shards: Artifact, tmp_path: Path, victim: int, restarts: int
):
    """The same command with --resume goes on, to the very end of the training that nothing befell; so does torchrun itself
    where it was told to start lost ranks again."""
    out = placed(keypad_shards, tmp_path / "out")
    run = Command(out, agent=("--max-restarts", str(restarts)))
    wait_for("a checkpoint", lambda: saved(out / "model") or run.process.poll() is not None, 200, run.words)
    os.kill(run.rank(victim), signal.SIGKILL)
    if restarts:
        assert run.end() == 0, run.words()
    else:
        assert run.end() == 1 and not (out / "model" / artifacts.NAME).exists()
        assert 4 <= saved(out / "model") < STEPS
        run = Command(out, "--resume", agent=())
        assert run.end() == 0, run.words()
    assert "train: going on from step " in run.words()
    assert losses(out / "model") == losses(whole.path)
    assert artifacts.read(out / "model").digest == whole.digest


class Nodes:
    """Two torchruns, each with one rank, that find each other as those of two nodes do."""

    def __init__(self, out: Path, **env: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        agent: tuple[str, ...] = (
            "--nproc-per-node",
            "1",
            "--nnodes",
            "2",
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            "nodes",
        )
        agent += ("--rdzv-endpoint", f"127.0.0.1:{port}", "--max-restarts", "2")
        self.runs = [Command(out, agent=agent, **env) for _ in range(2)]

    def words(self) -> str:
        return "".join(run.words() for run in self.runs)

    def kill(self, number: int) -> None:
        """The process of a rank, on whichever node it is."""
        for run in self.runs:
            with contextlib.suppress(AssertionError):
                return os.kill(run.rank(number), signal.SIGKILL)
        raise AssertionError(self.words())

    def end(self) -> list[int]:
        return [run.end() for run in self.runs]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_of_two_nodes_are_started_again_and_go_on(
    whole: Artifact, keypad_shards: Artifact, tmp_path: Path, victim: int
):
    """The agents count their attempts each for itself; who survived says that the other was lost, not that it is wrong."""
    out = placed(keypad_shards, tmp_path / "out")
    nodes = Nodes(out, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for("a checkpoint", lambda: saved(out / "model"), 200, nodes.words)
    nodes.kill(victim)
    assert nodes.end() == [0, 0], nodes.words()
    assert "train: going on from step " in nodes.words() and "a fault of ours" not in nodes.words()
    assert losses(out / "model") == losses(whole.path) and artifacts.read(out / "model").digest == whole.digest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_that_meet_at_a_used_store_say_what_helps(keypad_shards: Artifact, tmp_path: Path):
    out = placed(keypad_shards, tmp_path / "out")
    nodes = Nodes(out)
    wait_for("a checkpoint", lambda: saved(out / "model"), 200, nodes.words)
    nodes.kill(1)
    assert nodes.end() == [1, 1], nodes.words()
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node" in nodes.words()
    assert "a fault of ours" not in nodes.words() and checkpoint.newest(out / "model" / "checkpoints") is not None


def refused(run: Command) -> str:
    """Its sentence: it ended as wrong input does, and told it once."""
    assert run.end() == 2, run.words()
    [sentence] = [line for line in run.words().splitlines() if line.startswith("mmlm: ")]
    return sentence


def test_resume_refuses_another_model_and_other_data(
    whole: Artifact, keypad_manifest: Artifact, keypad_shards: Artifact, tmp_path: Path
):
    """Before any rank is started, and nothing of what is there is touched."""
    out = struck(whole, tmp_path / "out")
    before = {path: path.read_bytes() for path in (out / "model").rglob("*") if path.is_file()}
    found = f"mmlm: {out / 'model'} holds {whole.fingerprint[:12]}, made from another config or other inputs; wanted "
    said = refused(Command(out, "--resume", "--set", "train.model.width=64"))
    assert said.startswith(found) and "; choose another --out, or set it aside: " in said
    made_of = parse(ShardConfig, {**keypad_shards.config, "shard_records": 50}, "test")
    shutil.rmtree(out / "shards")
    shard(
        made_of, keypad_manifest, data=keypad_manifest.path.parent / "raw", out=out / "shards", workers=1, tracker=None
    )
    other = refused(Command(out, "--resume"))
    assert other.startswith(found) and other != said
    assert before == {path: path.read_bytes() for path in (out / "model").rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("missing", [True, False])
def test_resume_refuses_where_no_checkpoint_is_whole(whole: Artifact, tmp_path: Path, missing: bool):
    out = struck(whole, tmp_path / "out")
    folder = out / "model" / "checkpoints"
    if missing:
        shutil.rmtree(folder)
    else:
        for step in checkpoint.steps(folder):
            damage(folder, step)
    run = Command(out, "--resume", "--ranks", "1")
    wanted = f"mmlm: {folder} holds no intact checkpoint; wanted one to go on from (--resume); leave --resume away to begin anew"
    assert refused(run) == wanted
    told = (out / "model" / "logs" / "rank-0.log").read_text()
    assert all((f"step-{step:08d} is damaged" in told) != missing for step in (4, 8))
    assert not (out / "model" / artifacts.NAME).exists()
    under = Command(struck(whole, tmp_path / "under", 0), "--resume", agent=())
    assert under.end() == 1 and "holds no intact checkpoint; wanted one to go on from" in under.words()


@pytest.mark.slow
def test_resume_under_torchrun_takes_the_checkpoint_before_a_damaged_one(whole: Artifact, tmp_path: Path):
    out = struck(whole, tmp_path / "out")
    damage(out / "model" / "checkpoints", 8)
    run = Command(out, "--resume", agent=())
    assert run.end() == 0, run.words()
    assert "step-00000008 is damaged (weight.safetensors does not match its hash): set aside" in run.words()
    assert "train: going on from step 4, proved on the probe batch" in run.words()
    assert losses(out / "model") == losses(whole.path) and artifacts.read(out / "model").digest == whole.digest


def damage(folder: Path, step: int) -> None:
    """Turn one bit of its weights round."""
    path = folder / checkpoint.name_of(step) / "weight.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_hang_says_whether_there_is_a_checkpoint(keypad_shards: Artifact, tmp_path: Path, with_checkpoint: bool):
    """One of two ranks is frozen in mid training."""
    out = placed(keypad_shards, tmp_path / "out")
    every = "4" if with_checkpoint else "1000"
    sets = ["--set", "train.steps=1000", "--set", f"train.save_every={every}"]
    run = Command(out, "--ranks", "2", "--hang", "5", *sets)
    rows = out / "model" / "metrics.jsonl"

    def under_way() -> bool:
        return saved(out / "model") > 0 if with_checkpoint else rows.exists() and bool(losses(out / "model"))

    wait_for("a step", lambda: run.process.poll() is not None or under_way(), 200, run.words)
    os.kill(run.rank(1), signal.SIGSTOP)
    assert run.end() == 4, run.words()
    goes_on = (
        "it continues from the last checkpoint" if with_checkpoint else "it begins anew: there was no checkpoint yet"
    )
    [said] = {line for line in run.words().splitlines() if line.startswith("mmlm: ")}  # of the rank, and of the command
    assert re.search(
        r"train hangs: nothing came forward for \S+ s in .*, and rank 1 does not even answer; wanted a step", said
    )
    assert said.endswith(f"{out / 'model' / 'logs'}/rank-*.stacks; run the same command again, {goes_on}")
