"""A process that makes batches: `python -m mmlm.data.worker HANDLE`, the handle being its end of a pair of sockets.

It loads no torch, and touches no GPU. Signals that stop a training are not for it: it ends when its parent lets go of the
other end, in whatever way.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from typing import Any

from mmlm.config import parse
from mmlm.data.channel import Memory, describe, receive, send
from mmlm.data.config import DataConfig
from mmlm.data.making import Maker, Share
from mmlm.data.plan import by_of, named_plan
from mmlm.data.reader import ShardReader
from mmlm.errors import ArtifactError

LOOK_SECONDS = 5.0
"""How often it looks whether its parent is still the one that started it: a child that the parent forked may hold the
other end open."""


def make_maker(told: dict[str, Any]) -> Maker:
    """The Maker that `Loader` described."""
    config = parse(DataConfig, told["config"], "data")
    reader = ShardReader(told["shards"], ("train",), told["cache_bytes"], told["readers"])
    plan = named_plan(reader, config.pack, by_of(config.mixture), told["plan"]) if told["plan"] else None
    if told["plan"] and not plan:  # another one would make other batches than those of the ranks that kept it
        raise ArtifactError(
            f"the pack plan {told['plan']} of {told['shards']} is gone", wanted="the one that this training began with",
            cure="let nobody remove packs/ while it is trained on; run the same command again",
        )  # fmt: skip
    return Maker(reader, plan, config, told["seed"], told["steps"])


def serve(channel: socket.socket) -> None:
    """Answer what is asked over `channel` until the other side is gone."""
    parent = os.getppid()
    maker: Maker | None = None
    memories: dict[int, Memory] = {}
    while True:
        while not select.select([channel], [], [], LOOK_SECONDS)[0]:
            if os.getppid() != parent:
                return
        came = receive(channel)
        if came is None:
            return
        asked, handles = came
        reply: dict[str, Any]
        try:
            if maker is None:
                maker = make_maker(asked)
                continue
            if handles:
                memories[asked["memory"]] = Memory(handles[0])
            memory = memories[asked["memory"]]
            memory.clear()
            arrays, ids = maker.make(asked["step"], Share(*asked["share"]), memory.empty)
            layout, size = memory.write(arrays)
            reply = {"layout": layout, "size": size, "ids": ids, "notes": maker.notes}
            maker.notes = []
        except Exception as error:
            reply = {"error": describe(error)}
            if maker is None:  # it says so to whatever is asked first, and is of no more use
                receive(channel)
        try:
            send(channel, reply)
        except OSError:
            return
        if maker is None:
            return


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
