"""A verb under torchrun: rank 0 leads, the other ranks follow.

A verb locks its folder, tracks its run and writes its noun: one process may do that. So `lead(work)` runs the verb on
rank 0 only; when the verb launches its ranks, `announce` tells the waiting ranks what to call. Words pass through the
TCPStore of torchrun's agent, or one that rank 0 opens on MASTER_PORT + 1 where there is no agent.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mmlm import world
from mmlm.errors import Interrupted, LaunchError
from mmlm.launch.rank import call, die_with_parent, leave_group

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PATIENCE = 30.0
"""Seconds that a stopped rank waits for the word of rank 0."""
_announced = 0


def lead(work: Callable[[], int], guard: Callable[[Callable[[], int]], int] | None = None) -> int:
    """Run `work` where this process is alone or rank 0; elsewhere call what rank 0 announces, until it is done.

    A rank of torchrun ends with it, however that ends. Returns the exit code of rank 0's work on every rank. `guard` turns
    what a following rank raises into an exit code.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun that is killed itself ends nobody
        die_with_parent()
    here = world.from_environment()
    with _on_stop(_interrupt if here.is_main else _end_soon):
        if here.size == 1:
            return work()
        part = functools.partial(_lead, work, here.size) if here.is_main else _follow
        return guard(part) if guard else part()


def _lead(work: Callable[[], int], size: int) -> int:
    _require_new_store(size)
    code = 1
    try:
        code = work()
    finally:
        _say({"done": code})
        _wait_until(lambda: int(_store().add(_heard(), 0)) >= size - 1)  # the store may end with this process
    leave_group()
    return code


@contextlib.contextmanager
def _on_stop(call: Callable[[], None]) -> Iterator[None]:
    """While this is entered, what a stop does outside training, which has its own handlers: there is nothing to save."""
    before = {number: signal.signal(number, lambda *_: call()) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _end_soon() -> None:
    timer = threading.Timer(PATIENCE, os._exit, (Interrupted.exit_code,))
    timer.daemon = True
    timer.start()


def _interrupt() -> None:
    raise KeyboardInterrupt  # not an Exception: a handler for bad samples must not take it for one


def announce(target: str, args: dict[str, Any]) -> None:
    """Tell the following ranks to call `target(**args)` now. Nothing to say when alone or not leading."""
    here = world.from_environment()
    if here.size > 1 and here.is_main:
        _say({"target": target, "args": args})


def _say(word: dict[str, Any]) -> None:
    global _announced
    _store().set(_key(_announced), json.dumps(word))
    _announced += 1


def _follow() -> int:
    _require_new_store(world.from_environment().size)
    heard = 0
    while True:
        word = _hear(_key(heard))
        heard += 1
        if "done" in word:
            _store().add(_heard(), 1)
            leave_group()
            return int(word["done"])
        try:
            call(word["target"], word["args"])
        except Interrupted as stopped:  # on all ranks: rank 0 has its run to end yet
            print(f"rank {world.from_environment().rank}: {stopped}", file=sys.stderr, flush=True)
            _end_soon()


def _hear(key: str) -> dict[str, Any]:
    """What rank 0 says next. Asked for again and again, since a stop is not noticed within a call of the store."""
    from torch.distributed import DistError

    try:
        _wait_until(lambda: bool(_store().check([key])), float("inf"))
        word: dict[str, Any] = json.loads(_store().get(key))
    except DistError as error:
        raise LaunchError(f"rank 0 is gone ({str(error).splitlines()[0][:200]})", cure="see its log") from None
    return word


def _wait_until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)


def _heard() -> str:
    return _key(-1)


def _key(number: int) -> str:
    """A store that outlives the ranks keeps the words of their last attempt, too; agents of several nodes do not count them
    alike."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _outlives() else "0"
    return f"mmlm/{attempt}/{number}"


def _outlives() -> bool:
    """Whether the store is that of torchrun's agent."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _require_new_store(size: int) -> None:
    """Raise LaunchError where ranks of several nodes were started again with the store of their last attempt."""
    if _outlives() and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 and _store().add("mmlm/starts", 1) > size:
        raise LaunchError(
            "torchrun started the ranks of several nodes again, with a store that their last attempt used",
            wanted="a store for each attempt",
            cure="give torchrun --rdzv-backend c10d, and set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node",
        )  # fmt: skip


@functools.cache
def _store() -> TCPStore:
    from torch.distributed import TCPStore

    here = world.from_environment()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = datetime.timedelta(days=7)  # rank 0 may scan and shard for long before it trains
    if _outlives():
        return TCPStore(address, port, None, False, wait)
    return TCPStore(address, port + 1, None, here.is_main, wait, wait_for_workers=False)
