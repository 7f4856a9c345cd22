"""Loader: `batches(step, pieces)` of one rank. Its whole state is the step; everything else follows from seed and digests."""

from __future__ import annotations

import sys
from pathlib import Path

from mmlm.data.collate import Batch, as_batch, collate
from mmlm.data.config import DataConfig
from mmlm.data.making import Maker, Share
from mmlm.data.plan import by_of, find_plan, needs_plan
from mmlm.data.reader import ShardReader
from mmlm.errors import ConfigError, DataError
from mmlm.world import World

CACHE_BYTES = 512 << 20
"""Decoded samples kept in memory by each rank, bytes, unless MMLM_DATA_CACHE_BYTES says otherwise."""


class Loader:
    """Training batches from the train split of a ShardSet. `steps`: of the whole training, which phases are shares of."""

    def __init__(self, shards: Path | str, config: DataConfig, seed: int, world: World, steps: int = 1) -> None:
        self.reader = ShardReader(shards, ("train",), CACHE_BYTES)
        self.config, self.seed, self.world = config, seed, world
        if not len(self.reader):
            raise DataError(f"{shards} has no training samples", cure="look at its quarantine.parquet, or add data")
        by = by_of(config.mixture)
        self.plan = find_plan(self.reader, config.pack, by) if needs_plan(self.reader, config.pack, by) else None
        self.maker = Maker(self.reader, self.plan, config, seed, steps)
        self._require(1)
        if world.is_main:
            for line in self.describe(steps):
                print(line, file=sys.stderr, flush=True)

    def _require(self, pieces: int) -> None:
        if self.config.batch < self.world.size * pieces:
            raise ConfigError(
                f"a batch of {self.config.batch}",
                wanted=f"at least one sequence for each of {pieces} micro-batches on each of {self.world.size} ranks",
                cure="give a larger data.batch, a smaller accumulate or fewer ranks",
            )  # fmt: skip

    def batch(self, step: int) -> Batch:
        """This rank's share of the global batch of `step`, changed as training wants it."""
        return self.batches(step)[0]

    def batches(self, step: int, pieces: int = 1) -> list[Batch]:
        """The same, cut into `pieces` micro-batches. Raises ConfigError when one would be empty."""
        self._require(pieces)
        rank, ranks = self.world.rank, self.world.size
        made = [self.maker.make(step, Share(rank, ranks, piece, pieces)) for piece in range(pieces)]
        while self.maker.notes:
            print(f"data: {self.maker.notes.pop(0)}", file=sys.stderr, flush=True)
        return [as_batch(*one) for one in made]

    def probe(self, size: int = 32) -> Batch:
        """A fixed batch, the same at every call and every world size, for proving that a resumed model is the saved one."""
        count = min(size, len(self.reader))
        return collate([self.reader[i] for i in range(count)], self.reader.spec)

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
        counts = self.plan.counts
        lines = [
            f"pack: {counts['records']:,} records in {counts['sequences']:,} sequences, padding {self.plan.padding:.2%}; "
            f"{counts['split']:,} long records split into {counts['pieces']:,} pieces, {counts['refused']:,} left out"
        ]
        order = self.maker.order
        taken = order.taken(steps)
        for name, size, count in zip(order.names, order.sizes.tolist(), taken.tolist(), strict=True):
            lines.append(
                f"mixture: {name}: {count / (steps * order.batch):.1%} of {steps:,} batches, "
                f"{size:,} sequences {count / max(size, 1):.2f} times"
            )
        return lines
