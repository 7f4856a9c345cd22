"""What the launch tests run on ranks; imported by the rank processes themselves."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mmlm.artifacts import ArtifactConflict
from mmlm.errors import ArtifactError, Interrupted, WorkLost
from mmlm.progress import Progress


def note_environment(folder: str, names: list[str]) -> None:
    """Write what this process was exec'ed with (not what it set later)."""
    pairs = dict(p.split("=", 1) for p in Path("/proc/self/environ").read_text().split("\0") if "=" in p)
    text = "\n".join(f"{name}={pairs.get(name, '')}" for name in names)
    Path(folder, f"rank-{os.environ['RANK']}.txt").write_text(text)


def sum_of_ranks(folder: str) -> None:
    """All-reduce over gloo, as real training does; ranks hold rank + 1."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    Path(folder, f"sum-{dist.get_rank()}.txt").write_text(str(total.item()))


def refuse(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        raise ArtifactError("found this", wanted="that", cure="do so")
    time.sleep(60)


def lose(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        raise WorkLost("a worker ended", cure="again")
    time.sleep(60)


def lose_times(folder: str, times: int, then: str) -> None:
    """Be lost so many times: by a hang that the rank itself tells of, then by death; after that `then`."""
    attempt = len(list(Path(folder).glob("attempt-*")))
    Path(folder, f"attempt-{attempt}").touch()
    if attempt < times and attempt % 2 == 0:
        raise WorkLost("a hang", cure="again")
    if attempt < times:
        os.kill(os.getpid(), signal.SIGKILL)
    if then == "refuse":
        refuse(0)


def conflict() -> None:
    raise ArtifactConflict(Path("/somewhere"), "a" * 64, "b" * 64)


def crash() -> None:
    print("some words before", flush=True)
    raise ZeroDivisionError("the words of the crash")


def kill_self(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def stop_before_training() -> None:
    """Rank 0 signals the parent before any rank minds signals as training does."""
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGUSR1)
    time.sleep(60)


def save_on_stop(folder: str, stop: bool = False, seconds: float = 0.0, number: int = signal.SIGTERM) -> None:
    """Like training: a signal finishes the step, saves (for `seconds`) and ends resumable. With `stop` rank 0 signals
    the parent."""
    asked: list[int] = []
    for stops in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(stops, lambda by, frame: asked.append(by))
    Path(folder, f"up-{os.environ['RANK']}").write_text(str(os.getpid()))
    while stop and len(list(Path(folder).glob("up-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.02)
    if stop and os.environ["RANK"] == "0":
        os.kill(os.getppid(), number)
    while not asked:
        time.sleep(0.02)
    time.sleep(seconds)
    Path(folder, f"saved-{os.environ['RANK']}").write_text(signal.Signals(asked[0]).name)
    raise Interrupted("training was stopped and saved at step 7", cure="run the same command again")


def end_well(folder: str, seconds: float) -> None:
    """Like training after its last step: it looks for no stop any more."""
    Path(folder, "up").touch()
    time.sleep(seconds)
    Path(folder, "done").touch()


def progress(total: int) -> None:
    print("talk for the log", file=sys.stderr, flush=True)
    with Progress("train", total, "steps") as p:
        p.shown -= 10
        p.add(total)


def record(folder: str, value: Any) -> None:
    Path(folder, f"told-{os.environ['RANK']}").write_text(repr(value))


def note_node(folder: str) -> None:
    """On which node of a Ray cluster this rank runs, once all ranks have met."""
    import ray

    sum_of_ranks(folder)
    Path(folder, f"node-{os.environ['RANK']}.txt").write_text(ray.get_runtime_context().get_node_id())
