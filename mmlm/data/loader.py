"""Loader: `batch(step)` of one rank. Its whole state is the step; everything else follows from seed and digests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmlm.data.augment import augment
from mmlm.data.collate import Batch, collate
from mmlm.data.config import DataConfig
from mmlm.data.modalities import drop_modalities
from mmlm.data.order import Order, share
from mmlm.data.reader import ShardReader
from mmlm.errors import ConfigError, DataError
from mmlm.features.sample import Sample
from mmlm.world import World


class Loader:
    """Training batches from the train split of a ShardSet."""

    def __init__(self, shards: Path, config: DataConfig, seed: int, world: World) -> None:
        self.reader = ShardReader(shards, ("train",), config.cache_bytes)
        self.config, self.seed, self.world = config, seed, world
        if not len(self.reader):
            raise DataError(f"{shards} has no training samples", cure="look at its quarantine.parquet, or add data")
        if config.batch < world.size:
            raise DataError(f"a batch of {config.batch}", wanted=f"at least one record for each of {world.size} ranks")
        self.order = Order(self._pool(), config.batch, seed)

    def _pool(self) -> list[int]:
        if not self.config.repeat:
            return list(range(len(self.reader)))
        tasks = self.reader.tasks()
        unknown = sorted(set(self.config.repeat) - set(tasks))
        if unknown:
            raise DataError(f"repeat names the task {unknown[0]!r}", wanted=f"one of {sorted(set(tasks))}")
        return [i for i, task in enumerate(tasks) for _ in range(self.config.repeat.get(task, 1))]

    def batch(self, step: int) -> Batch:
        """This rank's share of the global batch of `step`, changed as training wants it."""
        return self.batches(step, 1)[0]

    def batches(self, step: int, pieces: int) -> list[Batch]:
        """The same share cut into `pieces` micro-batches, none empty."""
        if self.config.batch < self.world.size * pieces:
            raise ConfigError(
                f"a batch of {self.config.batch}",
                wanted=f"at least one record for each of {pieces} micro-batches on each of {self.world.size} ranks",
                cure="give a larger data.batch, a smaller accumulate or fewer ranks",
            )
        places = np.arange(step * self.config.batch, (step + 1) * self.config.batch)
        mine = zip(*(share(x, self.world.rank, self.world.size) for x in (self.order.step(step), places)), strict=True)
        samples = [self._sample(int(number), int(place)) for number, place in mine]
        cuts = np.array_split(np.arange(len(samples)), pieces)
        return [collate([samples[i] for i in cut], self.reader.spec) for cut in cuts]

    def _sample(self, number: int, place: int) -> Sample:
        """Sample `number`, changed as its `place` in the whole training says."""
        rng = np.random.default_rng((self.seed, 2, place))
        sample = drop_modalities(self.reader[number], self.config.modality_dropout, rng)
        return augment(sample, self.config.augment, rng)

    def probe(self, size: int = 32) -> Batch:
        """A fixed batch, the same at every call and every world size, for proving that a resumed model is the saved one."""
        count = min(size, len(self.reader))
        return collate([self.reader[i] for i in range(count)], self.reader.spec)
