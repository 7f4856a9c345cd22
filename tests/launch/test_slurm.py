"""Slurm: the script is a pure function of its settings, does what it says in bash, and brings a training to its end."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmlm import artifacts, world
from mmlm.artifacts import Artifact
from mmlm.cli import main
from mmlm.config import parse
from mmlm.errors import ConfigError, LaunchError
from mmlm.launch import local, slurm
from mmlm.launch.slurm import SlurmConfig
from tests.launch.slurm_here import RealSlurm, StandIns, wait_for

STOPPED_ONCE = 'trap "exit 4" USR1; [ -e {0} ] && exit 0; touch {0}; while :; do sleep 0.05; done'


def test_what_is_asked_for_stands_in_the_script() -> None:
    config = SlurmConfig(
        nodes=3, gpus_per_node=4, memory="64G", partition="gpu", options=["--constraint=a100"], warn=90
    )
    script = slurm.render(config, ["mmlm", "train", "demo"], "mmlm-train-demo")
    asked = {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")}
    assert asked >= {
        "--nodes=3", "--ntasks-per-node=4", "--gpus-per-node=4", "--mem=64G", "--partition=gpu", "--constraint=a100",
        "--signal=B:USR1@90", "--requeue",
    }  # fmt: skip
    assert script == slurm.render(config, ["mmlm", "train", "demo"], "mmlm-train-demo")
    assert not any("account" in line for line in asked)


def test_words_with_spaces_and_quotes_arrive_as_they_are(tmp_path: Path) -> None:
    words = ["a b", "it's", '"$HOME"', "x;y"]
    config = SlurmConfig(environment={"WHAT": "two words; $HOME"}, setup=["export LATER=$WHAT"])
    # one write each, because the two tasks share a log
    told = "import os, sys; os.write(1, f\"{sys.argv[1:]} {os.environ['LATER']}\\n\".encode())"
    command = ["python3", "-c", told, *words]
    queue = StandIns(tmp_path)
    queue.submit(slurm.render(config, command, "name"))
    assert queue.finish(30) == (0, 0)
    assert queue.log.read_text() == f"{words} two words; $HOME\n" * 2


def test_a_stopped_job_goes_back_into_the_queue_and_a_failed_one_does_not(tmp_path: Path) -> None:
    for name, command, expected in (("stop", STOPPED_ONCE, (0, 1)), ("fail", "exit 3", (3, 0))):
        (tmp_path / name).mkdir()
        queue = StandIns(tmp_path / name)
        words = ["bash", "-c", command.format(f"{tmp_path}/up-$SLURM_PROCID")]
        queue.submit(slurm.render(SlurmConfig(), words, "name"))
        if name == "stop":
            wait_for(lambda: len(list(tmp_path.glob("up-*"))) == 2, 30)
            queue.warn()
        assert queue.finish(30) == expected


def test_a_preempted_job_goes_back_into_the_queue(tmp_path: Path) -> None:
    queue = StandIns(tmp_path)
    words = ["bash", "-c", STOPPED_ONCE.replace("USR1", "TERM").format(f"{tmp_path}/up-$SLURM_PROCID")]
    queue.submit(slurm.render(SlurmConfig(), words, "name"))
    wait_for(lambda: len(list(tmp_path.glob("up-*"))) == 2, 30)
    queue.preempt()
    assert queue.finish(30) == (0, 1)


@pytest.mark.parametrize(
    ("state", "restarts"),
    [
        ("JobState=RUNNING Reason=None", 1),
        ("JobState=COMPLETING Reason=None", 0),
        ("JobState=CANCELLED Reason=None", 0),
        ("JobState=COMPLETING PreemptTime=2026-11-29T16:10:28", 1),
        ("JobState=COMPLETING PreemptTime=None", 0),
    ],
)
def test_a_cancelled_job_that_saved_stays_cancelled(tmp_path: Path, state: str, restarts: int) -> None:
    """`scontrol requeue` would take it out of its end, and it would run again."""
    queue = StandIns(tmp_path)
    queue.says(state)
    queue.submit(slurm.render(SlurmConfig(restarts=1), ["bash", "-c", "exit 4"], "name"))
    assert queue.finish(30) == (4, restarts)


def test_a_job_that_was_warned_of_its_end_goes_back_even_while_slurm_ends_it(tmp_path: Path) -> None:
    queue = StandIns(tmp_path)
    queue.says("JobState=COMPLETING Reason=TimeLimit")
    queue.submit(
        slurm.render(SlurmConfig(), ["bash", "-c", STOPPED_ONCE.format(f"{tmp_path}/up-$SLURM_PROCID")], "name")
    )
    wait_for(lambda: len(list(tmp_path.glob("up-*"))) == 2, 30)
    queue.warn()
    assert queue.finish(30) == (0, 1)


@pytest.mark.slow
@pytest.mark.skipif(bool(RealSlurm.missing) or bool(os.geteuid()), reason="no Slurm here, or not root")
def test_scancel_ends_a_job_for_good(tmp_path: Path) -> None:
    saves = f'trap "exit 4" TERM; touch {tmp_path}/up-$SLURM_PROCID; while :; do sleep 0.05; done'
    with RealSlurm.started() as queue:
        queue.submit(slurm.render(SlurmConfig(log=str(queue.log)), ["bash", "-c", saves], "name"))
        wait_for(lambda: len(list(tmp_path.glob("up-*"))) == 2, 60)
        assert queue.cancel() == "CANCELLED"


def test_the_number_of_restarts_has_an_end(tmp_path: Path) -> None:
    queue = StandIns(tmp_path)
    queue.submit(slurm.render(SlurmConfig(restarts=2), ["bash", "-c", "exit 4"], "name"))
    assert queue.finish(30) == (4, 2)


def test_a_killed_job_goes_back_unless_it_is_killed_at_once(tmp_path: Path) -> None:
    for seconds, expected in ((600, (137, 0)), (0, (137, 2))):
        (tmp_path / str(seconds)).mkdir()
        queue = StandIns(tmp_path / str(seconds))
        config = SlurmConfig(restarts=2, killed_after=seconds)
        queue.submit(slurm.render(config, ["bash", "-c", "kill -9 $$"], "name"))
        assert queue.finish(30) == expected


def test_a_value_stays_one_value_for_sbatch() -> None:
    """Which splits `#SBATCH` lines as shlex does with comments: at spaces outside quotes, and up to a `#`."""
    config = SlurmConfig(log="/our logs/#1 %j.log", account="team's", partition="gpu")
    lines = [line for line in slurm.render(config, ["x"], "mmlm-train-it's").splitlines() if line.startswith("#SBATCH")]
    words = [shlex.split(line.removeprefix("#SBATCH"), comments=True) for line in lines]
    assert all(len(found) == 1 for found in words)
    found = {word for one in words for word in one}
    assert found >= {
        "--output=/our logs/#1 %j.log",
        "--account=team's",
        "--partition=gpu",
        "--job-name=mmlm-train-it's",
    }


def test_settings_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="did you mean `nodes`"):
        parse(SlurmConfig, {"nods": 2}, "--cluster")
    with pytest.raises(ConfigError, match="partition"):
        parse(SlurmConfig, {"partition": "gpu\n#SBATCH --uid=0"}, "--cluster")
    for wrong in (["--cluster", "nods=2"], ["--ranks", "2"]):
        assert main(["train", "demo", "--on", "slurm", "--print", *wrong]) == 2
    assert main(["train", "demo", "--print"]) == 2  # of a run here there is nothing to print
    assert "nods" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("time=12:00:00", "#SBATCH --time=12:00:00"),
        ("time='12:00:00'", "#SBATCH --time=12:00:00"),
        ("time=5", "#SBATCH --time=5"),
        ("account=1234", "#SBATCH --account=1234"),
        ("account=0012", "#SBATCH --account=0012"),
        ("qos=2026-13-45", "#SBATCH --qos=2026-13-45"),
        ("memory=1", "#SBATCH --mem=1"),
        ("environment.OMP_NUM_THREADS=8", "export OMP_NUM_THREADS=8"),
        ("environment.A=yes", "export A=yes"),
        ("environment.NO=2.60", "export NO=2.60"),
        ("environment.A=null", "export A=null"),
        ("environment.A=#fff", "export A='#fff'"),
        ('environment.A={"a": 1}', """export A='{"a": 1}'"""),
        ("environment={A: no, Y: 1e3}", "export A=no"),
        ("setup=module load x", "module load x"),
        ("setup=echo 'a: b'", "echo 'a: b'"),
        ("setup=[module load x, module load 1.10]", "module load 1.10"),
        ("options=--constraint=a100", "#SBATCH --constraint=a100"),
    ],
)
def test_texts_are_taken_as_they_were_written(
    asked: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, _, value = asked.partition("=")
    outer, _, inner = key.partition(".")
    given = ["train", "demo", "--on", "slurm", "--print", "--out", str(tmp_path / "o")]
    assert main([*given, "--cluster", asked, "--cluster", "nodes=3", "--cluster", "partition=null"]) == 0
    script = capsys.readouterr().out.splitlines()
    assert line in script and "#SBATCH --nodes=3" in script and "partition" not in "".join(script)
    if "'a: b'" in asked or value in ("null", "#fff") or value.startswith('{"'):
        return  # YAML makes nothing, a comment or a mapping of them
    (tmp_path / "cluster.yaml").write_text(f"{outer}:\n  {inner}: {value}\n" if inner else f"{key}: {value}\n")
    assert main([*given, "--cluster", str(tmp_path / "cluster.yaml")]) == 0
    assert line in capsys.readouterr().out.splitlines()


def test_what_is_no_text_is_read_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("base: &b {A: 1}\nnodes: 0x2\nenvironment: {<<: *b, B: on}\npartition:\nsetup: [a, 3]\n")
    asked = ["train", "demo", "--on", "slurm", "--print", "--cluster", str(cluster)]
    assert main(asked) == 2  # a key that is none
    assert "unknown key `base`" in capsys.readouterr().err
    cluster.write_text(cluster.read_text().replace("base: &b {A: 1}\n", "").replace("<<: *b", "A: 1"))
    assert main([*asked, "--cluster", "environment.LONG=" + 300 * "x"]) == 0
    script = capsys.readouterr().out
    assert all(line in script for line in ("--nodes=2\n", "export A=1\n", "export B=on\n", "\na\n3\n"))
    assert "partition" not in script and f"LONG={300 * 'x'}\n" in script
    for wrong, said in (("nodes=two", "`nodes` = 'two'"), ("nodes=true.5", "`nodes`"), ("time=[1, 2]", "")):
        assert main([*asked, "--cluster", wrong]) == (2 if said else 0)
        assert said in capsys.readouterr().err
    cluster.write_text("- nodes\n")
    assert main(asked) == 2 and "holds list" in capsys.readouterr().err


def test_the_command_line_shows_what_it_would_submit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cluster.yaml").write_text("nodes: 2\nranks_per_node: 8\n")
    given = ["--cluster", str(tmp_path / "cluster.yaml"), "--cluster", "nodes=5", "--set", "train.seed=3"]
    assert main(["train", "demo", "--on", "slurm", "--print", "--out", str(tmp_path / "o"), "--replace", *given]) == 0
    script = capsys.readouterr().out
    assert "--nodes=5\n" in script and "--ntasks-per-node=8\n" in script
    assert f"train demo --out {tmp_path / 'o'} --set train.seed=3 --replace &" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_paths_are_resolved_and_the_tracking_servers_password_is_no_argument(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("best.yaml").write_text("train: {seed: 3}\n")
    given = ["--set", "@best.yaml", "--shards", "made/shards", "--tracking-uri", "http://me:secret@mlflow:5000"]
    assert main(["train", "demo", "--on", "slurm", "--print", "--out", "o", *given]) == 0
    script = capsys.readouterr().out
    (command,) = (line for line in script.splitlines() if line.startswith("srun"))
    assert f"--set @{tmp_path}/best.yaml --shards {tmp_path}/made/shards" in command
    assert "secret" not in command and "\nexport MLFLOW_TRACKING_URI=http://me:secret@mlflow:5000\n" in script
    assert main(["shard", "demo", "--on", "slurm", "--print", "--out", "o", "--mirror", "s3://bucket/set"]) == 0
    assert "--mirror s3://bucket/set" in capsys.readouterr().out


def test_without_slurm_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no `sbatch` here"):
        slurm.submit("#!/bin/bash\n")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu07", "gpu07"), ("gpu[03-05,9],cpu1", "gpu03"), ("a[1,4]-ib,b2", "a1-ib"), ("a1,a2", "a1"), ("n-3-[7-9]", "n-3-7")],
)  # fmt: skip
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert world.first_host(nodes) == first


def test_a_task_of_srun_is_a_rank_and_a_batch_script_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("SLURM_") or n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]:
        monkeypatch.delenv(name)
    batch = {"SLURM_JOB_ID": "5003", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    step = {
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "gpu[3-4]", "SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_CPUS_PER_TASK": "3",
    }  # fmt: skip
    monkeypatch.setattr(os, "environ", {**batch})
    world.adopt_slurm()
    assert "RANK" not in os.environ
    monkeypatch.setattr(os, "environ", {**batch, **step})
    world.adopt_slurm()
    assert world.from_environment() == world.World(6, 8, 2)
    said = [os.environ[k] for k in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")]
    assert said == ["gpu3", "20006", "4", "3"]
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_one_task_is_one_rank_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") and name != "RANK"}
    job = {**bare, "SLURM_JOB_ID": "5003", "SLURM_PROCID": "0"}
    step = {**job, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}
    default = local.gpus() or min(2, world.cores())
    for environment, wanted in ((bare, default), (job, default), (step, 1), ({**job, "SLURM_NTASKS": "4"}, default)):
        monkeypatch.setattr(os, "environ", {**environment})
        world.adopt_slurm()
        assert "RANK" not in os.environ
        assert local.choose().ranks == wanted
    monkeypatch.setattr(os, "environ", {**job, "SLURM_NTASKS": "1"})
    assert world.is_one_task() and not world.is_one_task(gpus=4)
    monkeypatch.setattr(os, "environ", step)
    assert world.is_one_task(gpus=4)
    assert local.ranks(2 if local.gpus() != 1 else 1).ranks == (2 if local.gpus() != 1 else 1)


@pytest.fixture(params=["stand-ins", "slurm"])
def queue(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StandIns | RealSlurm]:
    if request.param == "stand-ins":
        (tmp_path / "bin").mkdir()
        yield StandIns(tmp_path / "bin")
        return
    if RealSlurm.missing or os.geteuid():
        pytest.skip(f"no {', '.join(RealSlurm.missing) or 'root'} here (Debian: slurmctld slurmd slurm-client munge)")
    with RealSlurm.started() as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["its time is over", "preempted"])
def test_a_training_is_stopped_queued_again_and_finished(
    queue: StandIns | RealSlurm, keypad_shards: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    if how == "preempted" and isinstance(queue, RealSlurm):
        pytest.skip("a Slurm that preempts wants partitions or qualities of service of its own")
    out, steps = tmp_path / "out", 400
    shutil.copytree(keypad_shards.path, out / "shards")
    sets = [f"steps={steps}", "save_every=1000", "log_every=1", "data.batch=16", "model.width=32", "model.heads=2"]
    given = [word for change in sets for word in ("--set", f"train.{change}")]
    where = ["--out", str(out), "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db", "--cluster", f"log={queue.log}"]
    assert main(["train", "demo", "--on", "slurm", "--print", *where, *given]) == 0
    rows = out / "model" / "metrics.jsonl"
    queue.submit(capsys.readouterr().out)
    wait_for(lambda: rows.exists() and rows.read_text().count("\n") > 5, 250)
    if isinstance(queue, StandIns) and how == "preempted":
        queue.preempt()
    else:
        queue.warn()
    code, restarts = queue.finish(300)
    log = queue.log.read_text()
    assert (code, restarts) == (0, 1), log[-3000:]
    at = [log.find(said) for said in ("is saved at step", "back into the queue", "train: going on from step")]
    assert -1 not in at and at == sorted(at), log[-3000:]
    assert ("(SIGTERM)" if how == "preempted" else "(SIGUSR1)") in log
    made = artifacts.read(out / "model")
    assert made.counts["steps"] == steps and made.counts["ranks"] == 2
    table = [json.loads(row) for row in rows.read_text().splitlines()]
    seen = [row["step"] for row in table if "loss" in row["metrics"]]
    assert seen == list(range(1, steps + 1))
