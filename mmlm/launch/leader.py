"""A verb under torchrun: rank 0 leads, the other ranks follow.

A verb locks its folder, tracks its run and writes its noun: one process may do that. So `lead(work)` runs the verb on
rank 0 only; when the verb launches its ranks, `announce` tells the waiting ranks what to call. Words pass through the
TCPStore of torchrun's agent, or one that rank 0 opens on MASTER_PORT + 1 where there is no agent.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mmlm import world
from mmlm.launch.rank import leave_group, resolve

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_announced = 0


def lead(work: Callable[[], int]) -> int:
    """Run `work` where this process is alone or rank 0; elsewhere call what rank 0 announces, until it is done.

    Returns the exit code of rank 0's work on every rank.
    """
    here = world.from_environment()
    if here.size == 1:
        return work()
    if not here.is_main:
        return _follow()
    code = 1
    try:
        code = work()
    finally:
        _say({"done": code})
    leave_group()
    return code


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
    heard = 0
    while True:
        word = json.loads(_store().get(_key(heard)))
        heard += 1
        if "done" in word:
            leave_group()
            return int(word["done"])
        resolve(word["target"])(**word["args"])


def _key(number: int) -> str:
    return f"mmlm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{number}"


@functools.cache
def _store() -> TCPStore:
    from torch.distributed import TCPStore

    here = world.from_environment()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = datetime.timedelta(days=7)  # rank 0 may scan and shard for long before it trains
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return TCPStore(address, port, None, False, wait)
    return TCPStore(address, port + 1, None, here.is_main, wait, wait_for_workers=False)
