"""The loader on a shard set of pictures and text: batches of patches and tokens."""

from __future__ import annotations

import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.peers.clock import Watch, contest
from mmlm.data.collate import Batch
from mmlm.data.config import DataConfig
from mmlm.data.loader import Loader
from mmlm.world import World


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    os.environ["MMLM_DATA_CACHE_BYTES"] = "0"  # every picture is decoded, as it is by the peers
    if "step" in options:
        return start(source, options, watch)
    if "threads" in options:
        return threads(source, options, watch)
    config = DataConfig(batch=options["batch"], modality_dropout=0.0)
    loader = Loader(source / "shards", config, 0, World(), workers=options["workers"], steps=1 << 40)
    steps = len(loader.reader) // options["batch"]
    items, positions = 0, loader.batch(0).tokens_BT.numel()
    with watch.lap("work"):
        for step in range(1, steps):
            batch = loader.batch(step)
            items += len(batch.tokens_BT)
            positions += batch.tokens_BT.numel()
    assert batch.patches_PD.shape[1] == 16 * 16 * 3 and abs(float(batch.patches_PD[:196].mean())) < 1e-3
    loader.close()
    return {"items": items, "positions": positions}


def threads(source: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """The same batches made by threads, each with a loader of its own, two batches of each ahead: what was not chosen."""
    config = DataConfig(batch=options["batch"], modality_dropout=0.0)
    count = options["threads"]
    loaders = [Loader(source / "shards", config, 0, World(), workers=0, steps=1 << 40) for _ in range(count)]
    pools = [ThreadPoolExecutor(1) for _ in loaders]
    steps = len(loaders[0].reader) // options["batch"]
    asked: deque[Future[Batch]] = deque()
    items = 0

    def ask(step: int) -> None:
        if step < steps:
            asked.append(pools[step % count].submit(loaders[step % count].batch, step))

    for step in range(2 * count):
        ask(step)
    asked.popleft().result()
    with watch.lap("work"):
        for step in range(1, steps):
            ask(step - 1 + 2 * count)
            items += len(asked.popleft().result().tokens_BT)
    return {"items": items}


def start(source: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """How long it takes from nothing to the first batch of a step."""
    config = DataConfig(batch=options["batch"], modality_dropout=0.0)
    with watch.lap("work"):
        for _ in range(options["times"]):
            loader = Loader(source / "shards", config, 0, World(), workers=0, steps=1 << 40)
            loader.batch(options["step"])
            loader.close()
    return {"items": options["times"], "at": time.time()}


if __name__ == "__main__":
    contest(work)
