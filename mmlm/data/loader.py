"""Loader: `batches(step, pieces)` of one rank. Its whole state is the step; everything else follows from seed and digests."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mmlm.data.augment import refuse
from mmlm.data.collate import Batch, as_batch, collate
from mmlm.data.config import DataConfig
from mmlm.data.making import Maker, Share
from mmlm.data.plan import by_of, find_plan, needs_plan
from mmlm.data.pool import Pool
from mmlm.data.reader import READERS, ShardReader
from mmlm.errors import ConfigError, DataError
from mmlm.progress import tell
from mmlm.world import World, cores

CACHE_BYTES = 512 << 20
"""Decoded samples kept in memory by each rank, all its workers together, unless MMLM_DATA_CACHE_BYTES says otherwise."""
MOST_WORKERS = 8
"""Workers of a rank with a GPU, unless MMLM_DATA_WORKERS says otherwise; without one a rank makes its batches itself."""
SHARDS_TOLD = 10
"""Shards with damaged records that are named before training."""
PROBE = 32
"""Records of the probe batch."""
Made = tuple[dict[str, np.ndarray], list[str], list[str]]
"""(arrays, ids, notes) of a batch."""


class Loader:
    """Training batches from the train split of a ShardSet. `steps`: of the whole training, which phases are shares of.

    Where the work is done changes no batch: `workers` processes make them ahead, or none; `pin` puts them into
    page-locked memory, for a GPU. A `quiet` one tells nothing of its plan: it only looks. `plan` is the digest of the pack plan
    that a checkpoint names: where it is there, it is taken. `pieces`: micro-batches of a step on each rank.
    """

    def __init__(
        self,
        shards: Path | str,
        config: DataConfig,
        seed: int,
        world: World,
        steps: int = 1,
        *,
        workers: int | None = None,
        pin: bool = False,
        quiet: bool = False,
        plan: str | None = None,
        pieces: int = 1,
    ) -> None:
        self.workers = (
            _number("MMLM_DATA_WORKERS", _default_workers(world) if pin else 0) if workers is None else workers
        )
        self.pin = pin
        cache_bytes = _number("MMLM_DATA_CACHE_BYTES", CACHE_BYTES) // max(1, self.workers)
        self.cache_bytes = cache_bytes * max(1, self.workers)
        readers = READERS + self.workers
        self.reader = ShardReader(shards, ("train",), cache_bytes, readers)
        self.config, self.seed, self.world, self.steps = config, seed, world, steps
        if not len(self.reader):
            raise DataError(f"{shards} has no training samples", cure="look at its quarantine.parquet, or add data")
        refuse(config.augment, self.reader.spec)
        by = by_of(config.mixture)
        packed = needs_plan(self.reader, config.pack, by)
        self.plan = find_plan(self.reader, config.pack, by, plan) if packed else None
        self.maker = Maker(self.reader, self.plan, config, seed, steps)
        self._told = {
            "shards": str(shards), "config": config.model_dump(mode="json"), "seed": seed, "steps": steps,
            "cache_bytes": cache_bytes, "readers": readers, "plan": self.plan.digest if self.plan else None,
        }  # fmt: skip
        self._pool: Pool | None = None
        self._asked: deque[tuple[int, int, int]] = deque()
        """(step, piece, pieces) of what the pool was asked for."""
        self._thread = ThreadPoolExecutor(1, "pin") if pin else None
        self._next: tuple[tuple[int, int], Future[list[Batch]]] | None = None
        self._require(pieces)
        if world.is_main and not quiet:
            for line in self.describe(steps):
                tell(line)

    def _require(self, pieces: int) -> None:
        batch, ranks = self.config.batch, self.world.size
        if batch < ranks * pieces:
            alone = [("a smaller accumulate", batch >= ranks), ("fewer ranks", batch >= pieces)]
            enough = [cure for cure, helps in alone if helps] or ["fewer ranks and a smaller accumulate"]
            each = f" of {pieces} micro-batches on each" if pieces > 1 else ""
            raise ConfigError(
                f"data.batch: {batch}",
                wanted=f"{ranks * pieces} or more, a sequence for each{each} of {ranks} ranks",
                cure="give " + " or ".join(["a larger data.batch", *enough]),
            )  # fmt: skip

    def batch(self, step: int) -> Batch:
        """This rank's share of the global batch of `step`, changed as training wants it."""
        return self.batches(step)[0]

    def batches(self, step: int, pieces: int = 1) -> list[Batch]:
        """The same, cut into `pieces` micro-batches. Raises ConfigError when one would be empty."""
        self._require(pieces)
        if not self._thread:
            return self._batches(step, pieces)
        ready, self._next = self._next, None
        if ready and ready[0] != (step, pieces):
            ready[1].result()
            ready = None
        batches = ready[1].result() if ready else self._thread.submit(self._batches, step, pieces).result()
        if step + 1 < self.steps:  # pinned beside the computation of this step
            self._next = ((step + 1, pieces), self._thread.submit(self._batches, step + 1, pieces))
        return batches

    def _batches(self, step: int, pieces: int) -> list[Batch]:
        made = [self._make(step, piece, pieces) for piece in range(pieces)]
        for _, _, notes in made:
            _log(notes)
        batches = [as_batch(arrays, ids) for arrays, ids, _ in made]
        return [batch.pin() for batch in batches] if self.pin else batches

    def _make(self, step: int, piece: int, pieces: int) -> Made:
        rank, ranks = self.world.rank, self.world.size
        if not self.workers:
            arrays, ids = self.maker.make(step, Share(rank, ranks, piece, pieces))
            notes, self.maker.notes = self.maker.notes, []
            return arrays, ids, notes
        self._pool = self._pool or Pool(self._told, self.workers)
        if self._asked and self._asked[0] != (step, piece, pieces):
            self._pool.drop()
            self._asked.clear()
        following = self._asked[-1] if self._asked else None
        while self._pool.room > 0 or not self._asked:
            following = _after(following) if following else (step, piece, pieces)
            if self._asked and following[0] >= max(self.steps, step + 1):
                break
            self._pool.ask(following[0], Share(rank, ranks, *following[1:]))
            self._asked.append(following)
        self._asked.popleft()
        return self._pool.take()

    def close(self) -> None:
        """End the workers. They also end with the loader, and with this process, however it ends."""
        if self._next:
            self._next[1].cancel()
        if self._thread:
            self._thread.shutdown()
        if self._pool:
            self._pool.close()

    def probe(self, size: int = PROBE) -> Batch:
        """A fixed batch, the same at every call and every world size, for proving that a resumed model is the saved one."""
        return self.probes(1, size)[0]

    def probes(self, parts: int, size: int = PROBE) -> list[Batch]:
        """The same in so many parts, or one a record where there are fewer."""
        # the reader is safe to use from one thread, and the pinning one may be making the next batch
        return self._thread.submit(self._probes, parts, size).result() if self._thread else self._probes(parts, size)

    def _probes(self, parts: int, size: int) -> list[Batch]:
        count = min(size, len(self.reader))
        samples = [self.maker.cut(self.maker.record(i)) for i in range(count)]
        notes, self.maker.notes = self.maker.notes, []
        _log(notes)
        cuts = np.array_split(np.arange(count), min(parts, count))
        return [collate(samples[cut[0] : cut[-1] + 1], self.reader.spec) for cut in cuts]

    @property
    def left_out(self) -> int:
        """Records that are in no sequence, since they could not be read when these were planned."""
        return self.plan.counts["damaged"] if self.plan else 0

    def state(self) -> dict[str, str]:
        """Digests of all that a step's batch follows from; the step alone is missing."""
        return {
            "shards": self.reader.artifact.digest,
            "pack": self.plan.digest if self.plan else "none",
            "order": self.maker.order.digest,
        }

    def describe(self, steps: int) -> list[str]:
        """What is to be known before training: the padding of the plan, and how often each stream is gone through."""
        if not self.plan:
            return []
        counts, order = self.plan.counts, self.maker.order
        taken = order.taken(steps).tolist()
        padding, emptied = self.plan.padding(taken), self.maker.emptied(taken)
        after = ""
        if self.config.modality_dropout and self.plan.length:
            after = (
                " before modality dropout"
                if emptied is None
                else f" (about {padding + emptied:.1%} after modality dropout)"
            )
        lines = [
            f"pack: {counts['records']:,} records in {counts['sequences']:,} sequences, padding {padding:.2%}{after}; "
            f"{counts['split']:,} long records split into {counts['pieces']:,} pieces, {counts['refused']:,} left out"
        ]
        lost = [i for i in self.plan.damaged if self.reader.glance(i) is None]
        lines += self._left_out(lost)
        if others := self.left_out - len(lost):
            lines.append(f"pack: {others:,} records were damaged when this training was begun; it goes on without them")
        for name, size, count in zip(order.names, order.sizes.tolist(), taken, strict=True):
            lines.append(
                f"mixture: {name}: {count / (steps * order.batch):.1%} of {steps:,} batches, "
                f"{size:,} sequences {count / max(size, 1):.2f} times"
            )
        return lines

    def _left_out(self, damaged: Sequence[int]) -> list[str]:
        """Of each shard with damaged records: the first of them, and how many there are."""
        of_shard: dict[str, list[int]] = {}
        for i in damaged:
            of_shard.setdefault(self.reader.shard_of(i), []).append(i)
        lines = []
        for shard, lost in list(of_shard.items())[:SHARDS_TOLD]:
            lines.append(f"pack: {self.reader.damage(lost[0])} and left out; such records of {shard}: {len(lost):,}")
        if more := list(of_shard.values())[SHARDS_TOLD:]:
            lines.append(f"pack: {sum(map(len, more)):,} records of {len(more):,} more shards are damaged and left out")
        return [*lines, "pack: run `mmlm verify` on the shard set"] if lines else []


def _log(notes: list[str]) -> None:
    for note in notes:
        print(f"data: {note}", file=sys.stderr, flush=True)


def _after(asked: tuple[int, int, int]) -> tuple[int, int, int]:
    step, piece, pieces = asked
    return (step, piece + 1, pieces) if piece + 1 < pieces else (step + 1, 0, pieces)


def _default_workers(world: World) -> int:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return max(1, min(MOST_WORKERS, cores() // max(1, local) - 1))


def _number(name: str, default: int) -> int:
    """A whole number out of the environment. Raises ConfigError when it is none."""
    told = os.environ.get(name, "")
    if told and not told.isdigit():
        raise ConfigError(f"{name} is {told!r}", wanted="a whole number")
    return int(told or default)
