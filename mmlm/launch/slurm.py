"""A command as a Slurm job: one task a rank, saved and put back into the queue when Slurm wants the nodes back.

`render` is pure: settings and a command give the text of the batch script; `submit` hands that to sbatch. Every task of
`srun` runs the command; `mmlm.world.adopt_slurm` makes it a rank, and rank 0 leads (launch/leader.py). Paths must mean
the same on all nodes.
"""

from __future__ import annotations

import shlex
import subprocess
from typing import Annotated

from pydantic import Field, StringConstraints

from mmlm.config import Config
from mmlm.errors import LaunchError

VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")]
Line = Annotated[str, StringConstraints(pattern=r"^[^\n\r]+$")]
"""One line: what stands after `#SBATCH` must not begin another one."""


class SlurmConfig(Config):
    """What is asked of Slurm. Where a job runs is never part of its identity."""

    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0)
    """GPUs asked for on each node; 0 trains on CPUs."""
    ranks_per_node: int | None = Field(None, ge=1)
    """Tasks on each node; by default one a GPU, or two."""
    cpus_per_rank: int | None = Field(None, ge=1)
    """Cores of each task; default: what the cluster gives."""
    memory: Line | None = None
    """Memory of each node, such as 64G; default: what the cluster gives."""
    time: Line = "04:00:00"
    """Time limit of one stretch, after which the job is saved and queued again."""
    warn: int = Field(120, ge=10)
    """Seconds before the limit at which the job is told to save."""
    restarts: int = Field(100, ge=0)
    """How often the job may go back into the queue after it saved, or was killed."""
    killed_after: int = Field(600, ge=0)
    """Seconds after which a job whose rank the kernel killed (137) goes back, too, to its last checkpoint; one that is killed
    sooner would be so again, most often for lack of memory."""
    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    options: list[Line] = []
    """Further options of sbatch, such as `--constraint=a100`."""
    environment: dict[VariableName, str] = {}
    """Variables that the ranks get."""
    setup: list[str] = []
    """Lines of shell before the ranks start, such as `module load cuda`."""
    log: Line = "%x-%j.log"
    """Where the output goes, as sbatch writes patterns; relative to the folder of submission."""

    @property
    def ranks(self) -> int:
        """Tasks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 2


def render(config: SlurmConfig, command: list[str], name: str, environment: dict[str, str] | None = None) -> str:
    """The batch script that runs `command` on every rank. Same arguments, same text."""
    return "\n".join([*_options(config, name), "", *_body(config, command, environment or {})]) + "\n"


def _options(config: SlurmConfig, name: str) -> list[str]:
    asked = {
        "job-name": name,
        "nodes": config.nodes,
        "ntasks-per-node": config.ranks,
        "cpus-per-task": config.cpus_per_rank,
        "gpus-per-node": config.gpus_per_node or None,
        "mem": config.memory,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "time": config.time,
        "signal": f"B:USR1@{config.warn}",
        "output": config.log,
    }
    # sbatch takes quotes off as a shell does; without them a value ends at a space, and a line at `#`
    lines = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in asked.items() if value is not None]
    return ["#!/usr/bin/env bash", *lines, "#SBATCH --requeue", "#SBATCH --open-mode=append",
            *(f"#SBATCH {option}" for option in config.options)]  # fmt: skip


def _body(config: SlurmConfig, command: list[str], environment: dict[str, str]) -> list[str]:
    variables = {**environment, **config.environment}
    return [
        "set -uo pipefail",
        *(f"export {key}={shlex.quote(value)}" for key, value in sorted(variables.items())),
        *config.setup,
        "",
        "# a rank that is done early, or lost, ends the others only after a minute, in which they save",
        f"srun --kill-on-bad-exit=0 --wait=60 {shlex.join(command)} &",
        "step=$! warned=no",
        "trap 'warned=yes; kill -USR1 \"$step\"' USR1  # the time limit is near; srun passes it on to every rank",
        "trap 'kill -TERM \"$step\"' TERM  # preempted",
        'while kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a signal ends `wait` early',
        'wait "$step"; code=$?',
        "",
        *_requeue(config),
        'exit "$code"',
    ]


def _requeue(config: SlurmConfig) -> list[str]:
    """Back into the queue after a save or a kill. While Slurm ends a job itself it is COMPLETING, whatever for: of its time the
    job was warned, and for another job it has a PreemptTime; else somebody cancelled it."""
    return [
        "again=no",
        '[ "$code" -eq 4 ] && again="stopped and saved"',
        f'[ "$code" -eq 137 ] && [ "$SECONDS" -ge {config.killed_after} ] && again="a rank was killed"',
        "# what scancel ended stays ended; what Slurm ended for its time, or for another job, does not",
        'case "$(scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null)" in',
        "  *PreemptTime=[0-9]*) ;;",
        '  *JobState=COMPLETING*|*JobState=CANCELLED*) [ "$warned" = yes ] || again=no ;;',
        "esac",
        f'if [ "$again" != no ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {config.restarts} ]; then',
        '  echo "$again; back into the queue"',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
    ]


def submit(script: str) -> str:
    """Hand `script` to sbatch; returns the job's number. Raises LaunchError with what Slurm says against it."""
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LaunchError(
            "there is no `sbatch` here", cure="submit from a login node of the cluster, or see the script with --print"
        ) from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LaunchError(f"Slurm refuses the job: {said[-1].removeprefix('sbatch: error: ')}", cure="see --print")
    return done.stdout.strip().split(";")[0]
