"""Slurm on this one machine: the real one (Debian's packages, run by root), or two stand-ins of ten lines on PATH."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SRUN = """\
#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1 SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=here
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks[rank]=$!; done
for name in USR1 TERM; do trap "kill -$name ${tasks[*]} 2>/dev/null" $name; done
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2>/dev/null; do wait "$task"; done
  wait "$task"; code=$?; worst=$((code > ${worst:-0} ? code : ${worst:-0}))
done
exit "$worst"
"""
SCONTROL = """\
#!/usr/bin/env bash
[[ $1 == show ]] && cat "$REQUEUED.state" 2>/dev/null
[[ $1 == requeue ]] && echo "$2" >> "$REQUEUED"
"""

CONF = """\
ClusterName=mmlm
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ctld}
SlurmdPort={d}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""
"""cred_expire: a job that was queued again waits for its last credential to expire, two minutes by default."""


class StandIns:
    """A queue of one job: `bash` runs the script, and again when it asked for that."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requeued, self.job = folder, folder / "requeued", "7"
        self.log = folder / "job.log"
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def submit(self, script: str) -> None:
        (self.folder / "job.sh").write_text(script)
        self._start(0)

    def _start(self, restart: int) -> None:
        env = {
            **os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", "REQUEUED": str(self.requeued),
            "SLURM_JOB_ID": self.job, "SLURM_PROCID": "0", "SLURM_RESTART_COUNT": str(restart),
        }  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(["bash", self.folder / "job.sh"], env=env, stdout=log, stderr=log)

    def warn(self) -> None:
        """The time limit comes near."""
        self.process.send_signal(signal.SIGUSR1)

    def preempt(self) -> None:
        """Another job takes the place of this one."""
        self.process.send_signal(signal.SIGTERM)

    def says(self, state: str) -> None:
        """What Slurm tells of the job from now on."""
        self.requeued.with_name(self.requeued.name + ".state").write_text(f"JobId={self.job} {state}\n")

    def finish(self, seconds: float) -> tuple[int, int]:
        """Wait for the end; the exit code, and how often the job was queued again."""
        restarts = 0
        while True:
            code = self.process.wait(seconds)
            asked = self.requeued.read_text().split() if self.requeued.exists() else []
            assert set(asked) <= {self.job}
            if len(asked) == restarts:
                return code, restarts
            restarts += 1
            self._start(restarts)


class RealSlurm:
    """A cluster of this machine alone, with its own keys, ports and folders."""

    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "job.log"

    @classmethod
    @contextlib.contextmanager
    def started(cls) -> Iterator[RealSlurm]:
        folder = Path(tempfile.mkdtemp(prefix="mmlm-slurm-", dir="/tmp"))
        folder.chmod(0o755)  # munged looks at who may write above its socket
        made = cls(folder)
        daemons: list[subprocess.Popen[bytes]] = []
        before = os.environ.get("SLURM_CONF")
        try:
            made._configure()
            os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
            for command in (
                ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
                 f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"],
                ["slurmctld", "-D"], ["slurmd", "-D"],
            ):  # fmt: skip
                log = (folder / "daemons.log").open("ab")
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
                time.sleep(0.5)
            wait_for(lambda: "idle" in made._ask("sinfo", "-h", "-o", "%t"), 30)
            yield made
        finally:
            if len(daemons) == 3 and hasattr(made, "job"):
                made._ask("scancel", "--signal=KILL", "--full", made.job)
                made._ask("scancel", made.job)
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in daemons:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(10)
                daemon.kill()
            os.environ.pop("SLURM_CONF", None) if before is None else os.environ.update(SLURM_CONF=before)
            shutil.rmtree(folder, ignore_errors=True)

    def _configure(self) -> None:
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        text = CONF.format(
            folder=self.folder, host=socket.gethostname(), ctld=free_port(), d=free_port(), cpus=os.cpu_count()
        )
        (self.folder / "slurm.conf").write_text(text)

    def _ask(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()

    def submit(self, script: str) -> None:
        from mmlm.launch import slurm

        self.job = slurm.submit(script)

    def warn(self) -> None:
        self._ask("scancel", "--batch", "--signal=USR1", self.job)

    def cancel(self) -> str:
        """What a person does; the state of the job when it is settled."""
        self._ask("scancel", self.job)
        wait_for(lambda: self.told("JobState") in ("CANCELLED", "PENDING"), 60)
        return self.told("JobState")

    def told(self, key: str) -> str:
        words = self._ask("scontrol", "show", "job", "-o", self.job).split()
        return dict(word.split("=", 1) for word in words if "=" in word).get(key, "")

    def finish(self, seconds: float) -> tuple[int, int]:
        told = self.told
        wait_for(lambda: told("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), seconds)
        return int(told("ExitCode").split(":")[0]), int(told("Restarts"))


def wait_for(true: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
