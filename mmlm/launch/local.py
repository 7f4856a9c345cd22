"""Ranks on this machine: subprocesses that die and stop with their parent, and whose errors come back as themselves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

from mmlm.errors import Interrupted, LaunchError, WorkLost
from mmlm.launch import rank as rank_process
from mmlm.progress import Progress
from mmlm.storage import write_json
from mmlm.world import cores, is_one_task, quiet_environment

SAVE_SECONDS = 60.0
"""How long the other ranks may take to end once one has ended after a stop: they save together. Saving itself has no
limit: a large model takes minutes, and a second stop (or the watchdog of a hung step) ends what does not come."""
GRACE_SECONDS = 10.0
"""How long the other ranks may take to end after one of them failed."""
STOPPED = Interrupted.exit_code


def again(log: Path) -> str:
    """What to do after a stop or a loss, by whether there is a checkpoint beside the folder `log`."""
    if any((log.parent / "checkpoints").glob("step-*")):
        return "run the same command again, it continues from the last checkpoint"
    return "run the same command again, it begins anew: there was no checkpoint yet"


class Launch(Protocol):
    """Runs `target` ("package.module:function") with JSON-able `args` on `ranks` ranks and returns when all are done.

    Raises Interrupted when a signal stopped the ranks after they saved, the MmlmError that a rank raised, or
    WorkLost when a rank died. What the ranks say goes to `log/rank-N.log`.
    """

    @property
    def ranks(self) -> int: ...

    def __call__(self, target: str, args: dict[str, Any], *, log: Path) -> None: ...


class Stoppable(Protocol):
    signals: int
    """Stop signals that this process got."""
    number: int
    """Which was the first; 0: none."""


C = TypeVar("C", bound=Stoppable)


class RankCrashed(LaunchError):
    """A rank ended with an exception that is nobody's bad input: our fault."""

    exit_code = 1


def gpus() -> int:
    """GPUs that a process here may use; torch is imported only where a driver is."""
    if not any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")):
        return 0
    import torch

    return torch.cuda.device_count()


def choose(n: int | None = None) -> Launch:
    """The launch for this process: itself when torchrun, Slurm or Ray Train made it a rank, else `ranks(n)`.

    Raises LaunchError when it is a rank of another number of ranks than `n`.
    """
    if "RANK" not in os.environ:
        return ranks(n)
    launch = inprocess()
    if n is not None and n != launch.ranks:
        raise LaunchError(
            f"--ranks {n} in one of {launch.ranks} ranks that are started already", wanted=f"none, or --ranks {launch.ranks}",
            cure="whoever starts them says how many, such as torchrun --nproc-per-node",
        )  # fmt: skip
    return launch


def ranks(n: int | None = None) -> Launch:
    """A launch of `n` local ranks; by default one in the one task that Slurm was asked for, else one per GPU, or two on a
    machine of two cores or more."""
    if n is not None and n < 1:
        raise LaunchError(f"{n} ranks", wanted="at least 1", cure="give --ranks a positive number")
    available = gpus()
    if n and available and n > available:
        raise LaunchError(f"{n} ranks", wanted=f"at most {available}, one per GPU", cure="give a smaller --ranks")
    one = 1 if is_one_task(available) else 0
    return LocalRanks(n or one or available or min(2, cores()), gpu=available > 0)


def inprocess() -> Launch:
    """A launch in this very process, which is one rank of several already (torchrun, Slurm, Ray Train)."""
    from mmlm.launch.leader import announce

    return InProcess(int(os.environ.get("WORLD_SIZE", 1)), announce)


@dataclass(frozen=True)
class InProcess:
    """Calls the target here; `announce` first tells the other ranks (see launch/leader.py) to call it too."""

    ranks: int
    announce: Callable[[str, dict[str, Any]], None]

    def __call__(self, target: str, args: dict[str, Any], *, log: Path) -> None:
        self.announce(target, args)
        rank_process.call(target, args)


@dataclass(frozen=True)
class LocalRanks:
    """`ranks` subprocesses of this one. On a machine with GPUs each has its own (LOCAL_RANK)."""

    ranks: int
    gpu: bool

    def __call__(self, target: str, args: dict[str, Any], *, log: Path) -> None:
        log.mkdir(parents=True, exist_ok=True)
        for stale in log.glob("rank-*.error.json"):
            stale.unlink()
        write_json(log / "args.json", args)
        group = _Group(log)
        with count_signals(group):
            try:
                port = _free_port()
                for rank in range(self.ranks):
                    group.start(target, rank, self.environment(rank, port))
                group.wait()
            finally:
                group.kill()
        group.conclude()

    def environment(self, rank: int, port: int) -> dict[str, str]:
        """What the rank is started with. Thread counts are the user's where set."""
        ours = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "MMLM_PARENT": str(os.getpid()),
            "MMLM_QUIET": "1" if Progress.quiet else "",
        }
        defaults = {
            **quiet_environment(),
            "OMP_NUM_THREADS": str(max(1, cores() // self.ranks)),
            "GLOO_SOCKET_IFNAME": "lo",  # else gloo resolves the host's name, which fails without a network
            "PYTHONUNBUFFERED": "1",
        }
        if not self.gpu:
            defaults["DS_ACCELERATOR"] = "cpu"
        here = str(Path(rank_process.__file__).resolve().parents[2])  # ranks import the mmlm that started them
        path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH", "")) if p)
        return {**defaults, **os.environ, **ours, "PYTHONPATH": path}


@dataclass
class _Group:
    """The running ranks and what was learnt of them."""

    log: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    """Ranks that ended neither well nor as asked, in the order seen."""
    signals: int = 0
    """Stop signals that this process got."""
    number: int = 0
    """Which was the first; 0: none."""
    stopping: bool = False

    def start(self, target: str, rank: int, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "mmlm.launch.rank", target, str(self.log / "args.json"), str(self.log)]
        pass_fds: tuple[int, ...] = ()
        terminal = os.dup(2) if rank == 0 else None  # progress is for the user; all other talk goes to the log
        if terminal is not None:
            environment = {**environment, "MMLM_PROGRESS_FD": str(terminal)}
            pass_fds = (terminal,)
        try:
            with (self.log / f"rank-{rank}.log").open("ab") as file:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    pass_fds=pass_fds,
                )  # same process group: who kills the group kills the ranks
        finally:
            if terminal is not None:
                os.close(terminal)
        self.processes.append(process)

    def wait(self) -> None:
        """Until every rank has ended, forwarding a stop, and ending the rest when one has failed."""
        kill_at = float("inf")
        forwarded = False
        while None in [p.poll() for p in self.processes]:
            self.look()
            if (self.stopping or self.failed) and not forwarded:
                forwarded = True
                self.send(self.number or signal.SIGTERM)  # they tell by what they were stopped
            if self.stopping and any(p.poll() is not None for p in self.processes):
                kill_at = min(kill_at, time.monotonic() + SAVE_SECONDS)
            if self.failed:
                kill_at = min(kill_at, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > kill_at or self.signals > 1:
                self.kill()
            time.sleep(0.05)
        self.look()

    def look(self) -> None:
        """Note who stopped and who failed. Of ranks seen to fail together the killed one comes first, as the cause."""
        codes = {rank: p.returncode for rank, p in enumerate(self.processes) if p.returncode is not None}
        stopped = {rank for rank, code in codes.items() if code == STOPPED and not self.lost(rank)}
        failed = [rank for rank, code in codes.items() if code and rank not in stopped and rank not in self.failed]
        self.failed += sorted(failed, key=lambda rank: codes[rank] != -signal.SIGKILL)
        self.stopping |= self.signals > 0 or bool(stopped)

    def lost(self, rank: int) -> bool:
        """Whether the rank left word of a loss: it ends with the code of a stop, but the others will not."""
        return isinstance(read_error(self.log, rank), WorkLost)

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def conclude(self) -> None:
        """Return when all is well, else raise what the ranks (or their deaths) say."""
        if not self.failed and not self.stopping:
            return
        typed = {rank: error for rank in range(len(self.processes)) if (error := read_error(self.log, rank))}
        meant = [e for rank, e in typed.items() if rank in self.failed and not isinstance(e, RankCrashed)]
        if meant:
            raise meant[0]
        if self.signals or not self.failed:
            said = next((error for error in typed.values() if isinstance(error, Interrupted)), None)
            how = "training was stopped before it could save" if self.failed else "training was stopped"
            raise said or Interrupted(how, cure=again(self.log))
        first = self.failed[0]
        raise typed.get(first) or self._death(first)

    def _death(self, rank: int) -> LaunchError:
        """A rank that left no word: killed, or crashed in native code."""
        code, path = self.processes[rank].returncode, self.log / f"rank-{rank}.log"
        if code == -signal.SIGKILL:
            return WorkLost(
                f"rank {rank} was killed (signal 9), often for lack of memory",
                cure=f"free memory or give a smaller batch; {again(self.log)}",
            )
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return RankCrashed(f"rank {rank} {how}: {last_lines(path)}", cure=f"see {path}")


def read_error(log: Path, rank: int) -> Exception | None:
    """The error that rank.py left for a rank, as the class it was; a crash becomes RankCrashed."""
    path = log / f"rank-{rank}.error.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if said["kind"] == "crash":
        return RankCrashed(f"rank {rank} failed: {said['found']}", cure=f"see {log / f'rank-{rank}.log'}")
    return rank_process.rebuild(said)


def last_lines(path: Path, count: int = 5) -> str:
    """The end of a log on one line."""
    try:
        with path.open("rb") as f:
            f.seek(max(0, path.stat().st_size - 8192))
            lines = f.read().decode(errors="replace").splitlines()
    except OSError:
        return "no log"
    return " | ".join(line.strip() for line in lines[-count:] if line.strip())[-600:] or "it said nothing"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextmanager
def count_signals(into: C) -> Iterator[C]:
    """While ranks run, a stop is counted here, for who waits to pass it on; handlers can be set in the main thread only.

    The second one means "now": Ctrl-C after any other, or SIGTERM again. SIGUSR1 is a notice, which is never the second one,
    and which SIGTERM follows by itself on a spot machine or at the end of a job's time, while the ranks still save.
    """
    if threading.current_thread() is not threading.main_thread():
        yield into
        return

    last = 0.0
    ordered = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal last, ordered
        now, order = time.monotonic(), number != signal.SIGUSR1
        second = order and (ordered or number == signal.SIGINT)
        if not into.signals or (second and now - last > 1.0):  # one Ctrl-C may arrive twice (terminal and shell)
            into.signals, into.number, last = into.signals + 1, into.number or number, now
        elif order and not ordered:
            last = now
        ordered |= order

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield into
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
