"""Training batches from shards, against the loaders people use today: `python -m benchmarks.loading --json FILE`.

Parts: one, two (workers), one-decoder, two-decoder (the peers with our decoder), threads, start (`--only NAME`).
Everything is made on the spot and cached below ~/.cache/mmlm-bench ($MMLM_BENCH).
See docs/benchmarks.md for what is measured and how.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import inputs
from benchmarks.harness.command import run_parts
from benchmarks.harness.measure import Contestant, Log, contest, last_core, row

OURS = "mmlm"
BATCH = 64
PEERS = {
    "webdataset": ("webdataset_loader", "webdataset-loading"),
    "LitData": ("litdata_loader", "litdata-loading"),
    "MosaicML Streaming": ("mosaic_loader", "streaming-loading"),
    "HF datasets": ("hf_loader", "datasets-loading"),
}
"""Name → script, environment."""


@dataclass(frozen=True)
class Amounts:
    runs: int
    pairs: int
    starts: int = 60
    clock: str = "wall"


FULL = Amounts(runs=3, pairs=2048)
QUICK = Amounts(runs=1, pairs=512, starts=3)
WARM = 256


def loading(amounts: Amounts, log: Log, workers: int, decoder: str) -> list[dict[str, Any]]:
    """JPEG of 224 pixels and about 200 tokens → batches of 64, in which pictures are standardised float32."""
    source, warm = inputs.pairs(amounts.pairs), inputs.pairs(WARM)
    cores = sorted(os.sched_getaffinity(0))[-workers:]
    options = {"workers": workers, "batch": BATCH, "decoder": decoder, "per_shard": 512}
    ours = Contestant(OURS, "loading", options)
    peers = [Contestant(name, script, options, home) for name, (script, home) in PEERS.items()]
    found = contest([ours, *peers], source, warm, amounts.runs, log, cores=cores)
    mine, theirs = found[OURS], [found[peer.name] for peer in peers]
    kind = "" if decoder == "pillow" else ", peers with our decoder"
    name = f"loading, {workers} worker{'s' if workers > 1 else ''}{kind}"
    goal = 1.5 if decoder == "pillow" else None
    return [
        row(name, "samples/s", mine, theirs, clock=amounts.clock, goal=goal),
        *(row(f"{name}: {peer.contestant.name}", "samples/s", mine, [peer], clock=amounts.clock) for peer in theirs),
    ]


def start(amounts: Amounts, log: Log) -> list[dict[str, Any]]:
    """From nothing to the first batch, at step 1,000,000 and at step 0, of the same loader."""
    source, warm = inputs.pairs(amounts.pairs), inputs.pairs(WARM)
    options = {"batch": BATCH, "times": amounts.starts}
    late = Contestant(OURS, "loading", {**options, "step": 1_000_000})
    early = Contestant("mmlm at step 0", "loading", {**options, "step": 0})
    found = contest([late, early], source, warm, amounts.runs, log, cores=[last_core()])
    return [
        row("start-up at step 1,000,000", "starts/s", found[OURS], [found[early.name]], clock=amounts.clock, goal=0.9)
    ]


def threads(amounts: Amounts, log: Log) -> list[dict[str, Any]]:
    """Our batches made by processes against the same made by threads."""
    source, warm = inputs.pairs(amounts.pairs), inputs.pairs(WARM)
    rows = []
    for count in (1, 2):
        cores = sorted(os.sched_getaffinity(0))[-count:]
        ours = Contestant(OURS, "loading", {"workers": count, "batch": BATCH})
        other = Contestant("mmlm by threads", "loading", {"threads": count, "batch": BATCH})
        found = contest([ours, other], source, warm, amounts.runs, log, cores=cores)
        name = f"{count} process{'es' if count > 1 else ''} against as many threads"
        rows.append(row(name, "samples/s", found[OURS], [found[other.name]], clock=amounts.clock))
    return rows


PARTS: dict[str, Callable[[Amounts, Log], list[dict[str, Any]]]] = {
    "one": functools.partial(loading, workers=1, decoder="pillow"),
    "two": functools.partial(loading, workers=2, decoder="pillow"),
    "one-decoder": functools.partial(loading, workers=1, decoder="simplejpeg"),
    "two-decoder": functools.partial(loading, workers=2, decoder="simplejpeg"),
    "threads": threads,
    "start": start,
}


def main() -> int:
    return run_parts("loading", __doc__, PARTS, FULL, QUICK)


if __name__ == "__main__":
    sys.exit(main())
