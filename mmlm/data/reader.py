"""ShardReader: random access to the samples of a ShardSet, through the manifest and the offsets index only."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from mmlm import artifacts
from mmlm.errors import ArtifactError
from mmlm.features import spec as feature_spec
from mmlm.features.sample import Sample
from mmlm.shards import codec


class ShardReader:
    """Samples of some splits, numbered 0 … len-1 in order of the manifest; `reader[i]` decodes one.

    Decoded samples are kept up to `cache_bytes`, least recently used leave first. Safe to use from one thread.
    """

    def __init__(self, path: Path | str, splits: tuple[str, ...] = ("train",), cache_bytes: int = 0) -> None:
        self.path = Path(path)
        self.artifact = artifacts.read(self.path, "shards")
        self.spec = feature_spec.load(self.path)
        rows = [
            r for r in pq.read_table(self.path / "manifest.parquet").to_pylist() if r["split"] in splits and r["path"]
        ]
        self._maps: dict[int, mmap.mmap] = {}
        self._tars = [self.path / row["path"] for row in rows]
        self._members: list[tuple[int, list[tuple[str, int, int]]]] = []
        """Per sample: number of its tar, and (extension, offset, size) of each member."""
        for number, tar in enumerate(self._tars):
            index = pq.read_table(tar.with_suffix(".index.parquet")).to_pydict()
            last = None
            for key, ext, offset, size in zip(index["key"], index["ext"], index["offset"], index["size"], strict=True):
                if key != last:
                    self._members.append((number, []))
                    last = key
                self._members[-1][1].append((ext, offset, size))
        self._cache: OrderedDict[int, Sample] = OrderedDict()
        self._cache_bytes, self._cached = cache_bytes, 0

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Sample:
        found = self._cache.get(i)
        if found is not None:
            self._cache.move_to_end(i)
            return found
        number, members = self._members[i]
        view = self._open(number)
        sample = codec.unpack({ext: view[offset : offset + size] for ext, offset, size in members})
        self._remember(i, sample)
        return sample

    def tasks(self) -> list[str]:
        """The task of every sample, without decoding media."""
        names = []
        for number, members in self._members:
            _, offset, size = next(m for m in members if m[0] == "json")
            names.append(codec.task_of(self._open(number)[offset : offset + size]))
        return names

    def _open(self, number: int) -> mmap.mmap:
        if number not in self._maps:
            try:
                with self._tars[number].open("rb") as f:
                    self._maps[number] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ArtifactError(
                    f"the shard {self._tars[number]} cannot be read ({error})",
                    cure="run `mmlm verify` on the shard set",
                ) from None
        return self._maps[number]

    def _remember(self, i: int, sample: Sample) -> None:
        size = _size(sample)
        if size > self._cache_bytes:
            return
        self._cache[i] = sample
        self._cached += size
        while self._cached > self._cache_bytes:
            _, old = self._cache.popitem(last=False)
            self._cached -= _size(old)


def _size(sample: Sample) -> int:
    arrays: list[np.ndarray] = [sample.tokens, *sample.images, *sample.sounds]
    return sum(a.nbytes for a in arrays) + 1024
