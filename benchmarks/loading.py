"""Training batches from shards, against the loaders people use today: `python -m benchmarks.loading --json FILE`.

Parts: one, two (workers), one-decoder, two-decoder (the peers with our decoder), threads, start (`--only NAME`).
Everything is made on the spot and cached below ~/.cache/mmlm-bench ($MMLM_BENCH).
See docs/benchmarks.md for what is measured and how.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import inputs
from benchmarks.harness.measure import Contestant, Log, contest, last_core, machine, row
from benchmarks.sharding import told

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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--only", action="append", choices=sorted(PARTS), help="one part; may be given several times")
    parser.add_argument("--quick", action="store_true", help="a look: little data, one run; its figures mean little")
    parser.add_argument("--runs", type=int, help="rounds of which the median counts (3)")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="wall", help="what the ratios go by (wall)")
    asked = parser.parse_args()
    amounts = replace(QUICK if asked.quick else FULL, clock=asked.clock)
    if asked.runs:
        amounts = replace(amounts, runs=max(1, asked.runs))
    log, rows = Log("loading"), []
    log.note("machine", **machine())
    for name, part in PARTS.items():
        if asked.only and name not in asked.only:
            continue
        print(f"part {name}", file=sys.stderr, flush=True)
        for made in part(amounts, log):
            rows.append(made)
            print(told(made), flush=True)
        if asked.json:
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            asked.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    log.note("machine", **machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
