"""Pool: processes that make batches ahead of when they are wanted, in the order in which they are asked for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import weakref
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmlm.data.channel import Memory, arrays_of, rebuild, receive, send
from mmlm.data.making import Share
from mmlm.errors import WorkLost

AHEAD = 2
"""Batches that each worker is asked for before the first of them is wanted."""
END_SECONDS = 5.0
"""How long a worker may take to end; one that reads from a drive that does not answer is killed then."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    channel: socket.socket
    free: list[int] = field(default_factory=list)
    """Numbers of memories that nobody reads any more."""
    memories: dict[int, Memory] = field(default_factory=dict)


class Pool:
    """`workers` processes with a Maker each. What it gives out is theirs until nothing refers to it any more.

    Raises what a worker raised, or WorkLost when one ended.
    """

    def __init__(self, told: dict[str, Any], workers: int) -> None:
        self._workers = [_start(told) for _ in range(workers)]
        self._asked: deque[tuple[_Worker, int]] = deque()
        """Who was asked, and the number of the memory that the batch goes into; the oldest first."""
        self._turn = 0
        self._finalizer = weakref.finalize(self, _end, self._workers)

    def __len__(self) -> int:
        """Batches that were asked for and not taken."""
        return len(self._asked)

    @property
    def room(self) -> int:
        """How many more should be asked for."""
        return AHEAD * len(self._workers) - len(self._asked)

    def ask(self, step: int, part: Share) -> None:
        worker = self._workers[self._turn % len(self._workers)]
        self._turn += 1
        number, handles = (worker.free.pop(), []) if worker.free else (len(worker.memories), None)  # type: ignore[var-annotated]
        if handles is None:
            worker.memories[number] = Memory()
            handles = [worker.memories[number].handle]
        share = [part.rank, part.ranks, part.piece, part.pieces]
        try:
            send(worker.channel, {"step": step, "share": share, "memory": number}, handles)
        except OSError:
            raise self._dead(worker) from None
        self._asked.append((worker, number))

    def take(self) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
        """(arrays, ids, notes) of the batch that was asked for first."""
        worker, number = self._asked.popleft()
        came = receive(worker.channel)
        if came is None:
            raise self._dead(worker)
        reply = came[0]
        if "error" in reply:
            worker.free.append(number)
            raise rebuild(reply["error"])
        memory = worker.memories[number]
        memory.reach(reply["size"])
        whole = np.frombuffer(memory.map, np.uint8)  # type: ignore[arg-type]
        # every array is a view of it, so it goes with the last of them
        weakref.finalize(whole, worker.free.append, number).atexit = False
        return arrays_of(whole, reply["layout"]), reply["ids"], reply["notes"]

    def drop(self) -> None:
        """Let go of what was asked for and is no longer wanted."""
        while self._asked:
            worker, number = self._asked.popleft()
            receive(worker.channel)
            worker.free.append(number)

    def close(self) -> None:
        self._finalizer()
        self._asked.clear()

    def _dead(self, worker: _Worker) -> WorkLost:
        code = worker.process.wait(END_SECONDS)
        return WorkLost(
            f"a process that makes batches ended with {code}",
            cure="is there enough memory? take fewer with MMLM_DATA_WORKERS; the same command again goes on",
        )


def _start(told: dict[str, Any]) -> _Worker:
    ours, theirs = socket.socketpair()
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "mmlm.data.worker", str(theirs.fileno())],
        pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env={**os.environ, **one, "PYTHONPATH": path},
    )  # fmt: skip
    theirs.close()
    send(ours, told)
    return _Worker(process, ours)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.channel.close()
        for memory in worker.memories.values():
            memory.close()
    for worker in workers:
        try:
            worker.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
