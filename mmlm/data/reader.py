"""ShardReader: random access to the samples of a ShardSet, through the manifest and the offsets index only."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmlm import artifacts
from mmlm.data.files import Opened, open_files
from mmlm.errors import ArtifactError, DataError, MmlmError
from mmlm.features import spec as feature_spec
from mmlm.features.sample import Sample
from mmlm.shards import codec

INDEX_BYTES = 64 << 20
"""Of offsets kept in memory; a shard of 1,000 samples takes about 50 kB."""
FETCHES = 8
"""Shards fetched side by side, where they lie elsewhere."""
OPEN_SHARDS = 512
"""Shards mapped at a time; a process may map 65,530 by default."""
READERS = 2
"""Readers of a rank: of its batches, and of a validation split."""


@dataclass(frozen=True, slots=True)
class Index:
    """Where the members of a shard's samples lie. The members of sample s are `starts[s]` to `starts[s + 1]`."""

    starts: np.ndarray
    ext: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    names: list[str]
    """Extension by its number in `ext`."""

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.starts, self.ext, self.offset, self.size))


def read_index(path: Path) -> Index:
    """The index in file `path`. Raises ArtifactError when it cannot be read."""
    try:
        table = pq.read_table(path).combine_chunks()
        keys = table["key"].combine_chunks()
        ext = table["ext"].combine_chunks().dictionary_encode()
        ext = ext.combine_chunks() if isinstance(ext, pa.ChunkedArray) else ext
        begins = np.flatnonzero(pc.not_equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)) + 1
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ArtifactError(
            f"the index {path} cannot be read ({error})", cure="run `mmlm verify` on the shard set"
        ) from None
    return Index(
        np.concatenate([[0], begins, [len(keys)]]), ext.indices.to_numpy().astype(np.uint16),
        table["offset"].to_numpy(), table["size"].to_numpy(), ext.dictionary.to_pylist(),
    )  # fmt: skip


class ShardReader:
    """Samples of some splits, numbered 0 … len-1 in order of the manifest; `reader[i]` decodes one.

    `path` is a folder, or the address of a published set (s3://, gs://, https://). What is opened is small, however many
    shards there are: a row of the manifest for each; offsets and tars are opened when a sample of theirs is wanted, and
    let go again: of a published set, whose cache evicts no open shard, as soon as they are more than this reader's share
    of the cache, one of `readers` in each rank of this machine; one shard is always kept. Decoded samples are kept up to
    `cache_bytes`, least recently used leave first. Safe to use from one thread. Raises ArtifactError when a shard is
    missing or has another size than the manifest says.
    """

    def __init__(
        self, path: Path | str, splits: tuple[str, ...] = ("train",), cache_bytes: int = 0, readers: int = READERS
    ) -> None:
        self.files = open_files(path)
        self.path, self.splits = self.files.folder, splits
        self.artifact = artifacts.read(self.path, "shards")
        self.spec = feature_spec.load(self.path)
        self._encoded = any(one.read for one in self.spec.encoders.values())
        table = pq.read_table(self.path / "manifest.parquet")
        table = table.filter(pc.and_(pc.is_in(table["split"], pa.array(splits)), pc.not_equal(table["path"], "")))
        self._rows = table.combine_chunks()
        self._starts = np.concatenate([[0], np.cumsum(table["samples"].to_numpy(), dtype=np.int64)])
        """Number of the first sample of each shard, and of all samples."""
        self._bytes: list[int] = self._rows["bytes"].to_pylist()
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._keep = None if self.files.room is None else self.files.room // (readers * ranks)
        """Bytes of shards that may be open; None for any."""
        whole = self.shard_bytes <= 2 * (self.files.room or 0)  # the cache has room for all of them
        self._early = self.shard_bytes if whole else self._keep or 0
        """Bytes of shards that may be fetched before they are wanted."""
        self._indexes: OrderedDict[int, Index] = OrderedDict()
        self._index_bytes = 0
        self._maps: OrderedDict[int, tuple[mmap.mmap, Opened]] = OrderedDict()
        self._mapped = 0
        self._fetching: ThreadPoolExecutor | None = None
        self._begun: OrderedDict[int, None] = OrderedDict()
        """Shards that `ahead` asked for and that were not opened since; no more than fit beside each other."""
        self._cache: OrderedDict[int, Sample] = OrderedDict()
        self._cache_bytes, self._cached = cache_bytes, 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shard_bytes(self) -> int:
        """Of all tars together, which are mapped when they lie here."""
        return int(pc.sum(self._rows["bytes"]).as_py() or 0)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Sample:
        found = self._cache.get(i)
        if found is not None:
            self._cache.move_to_end(i)
            return found
        sample = codec.unpack(self.members(i), features=self._encoded)
        self._remember(i, sample)
        return sample

    def members(self, i: int) -> dict[str, bytes]:
        """Extension → bytes of sample `i`, as they are stored."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = int(np.searchsorted(self._starts, i, "right")) - 1
        index, view = self._index(shard), self._map(shard)
        row = i - int(self._starts[shard])
        here = slice(int(index.starts[row]), int(index.starts[row + 1]))
        return {
            index.names[ext]: view[offset : offset + size]
            for ext, offset, size in zip(
                index.ext[here].tolist(), index.offset[here].tolist(), index.size[here].tolist(), strict=True
            )
        }

    def glance(self, i: int) -> codec.Glance | None:
        """What a pack plan asks of sample `i`; None when it is damaged."""
        return None if isinstance(seen := self._glance(i), DataError) else seen

    def damage(self, i: int) -> str:
        """Where sample `i` is stored and why `glance` cannot read it; empty when it can."""
        seen = self._glance(i)
        return f"{self.place(i)} is damaged ({seen.found})" if isinstance(seen, DataError) else ""

    def _glance(self, i: int) -> codec.Glance | DataError:
        try:
            return codec.glance(self.members(i), self.spec)
        except DataError as error:
            return error

    def shard_of(self, i: int) -> str:
        """The file that sample `i` is stored in."""
        return str(self._rows["path"][int(np.searchsorted(self._starts, i, "right")) - 1])

    def shards(self) -> Iterator[range]:
        """The numbers of the samples of each shard."""
        return (range(int(a), int(b)) for a, b in zip(self._starts, self._starts[1:], strict=False))

    def place(self, i: int) -> str:
        """Where sample `i` is stored: the shard's file and the key of its members."""
        shard = int(np.searchsorted(self._starts, i, "right")) - 1
        row = self._rows.slice(shard, 1).to_pylist()[0]
        with self.files.index(row) as opened:
            keys = pq.read_table(opened.path, columns=["key"])["key"]
        at = self._index(shard).starts[i - int(self._starts[shard])]
        return f"{row['path']}/{keys[int(at)].as_py()}"

    def ahead(self, samples: np.ndarray) -> None:
        """Begin to fetch the shards of `samples`, in their order, where they lie elsewhere; returns at once.

        Where the cache is too small for all shards, no more than this reader may keep open (but one): what is fetched too
        early is evicted before it is read.
        """
        if not self.files.remote:
            return
        self._fetching = self._fetching or ThreadPoolExecutor(FETCHES, "fetch")
        shards = np.searchsorted(self._starts, samples, "right") - 1
        wanted = 0
        for shard in dict.fromkeys(shards.tolist()):
            if wanted and wanted + self._bytes[shard] > self._early:
                break
            wanted += self._bytes[shard]
            if shard not in self._maps and shard not in self._begun:
                self._begun[shard] = None
                self._fetching.submit(self._fetch, self._rows.slice(shard, 1).to_pylist()[0])
        begun = sum(self._bytes[shard] for shard in self._begun)
        while begun > self._early and len(self._begun) > 1:
            begun -= self._bytes[self._begun.popitem(last=False)[0]]

    def _fetch(self, row: dict[str, Any]) -> None:
        with contextlib.suppress(MmlmError):  # who reads it is told
            self.files.index(row).close()
            self.files.tar(row).close()

    def _index(self, shard: int) -> Index:
        found = self._indexes.get(shard)
        if found is not None:
            self._indexes.move_to_end(shard)
            return found
        row = self._rows.slice(shard, 1).to_pylist()[0]
        with self.files.index(row) as opened:
            found = read_index(opened.path)
        if len(found.starts) - 1 != row["samples"]:
            raise ArtifactError(
                f"the index of {row['path']} has {len(found.starts) - 1} samples", wanted=f"{row['samples']}",
                cure="run `mmlm verify` on the shard set",
            )  # fmt: skip
        self._indexes[shard] = found
        self._index_bytes += found.nbytes
        while self._index_bytes > INDEX_BYTES and len(self._indexes) > 1:
            self._index_bytes -= self._indexes.popitem(last=False)[1].nbytes
        return found

    def _map(self, shard: int) -> mmap.mmap:
        found = self._maps.get(shard)
        if found is not None:
            self._maps.move_to_end(shard)
            return found[0]
        self._begun.pop(shard, None)
        self._make_room(self._bytes[shard])  # before it is fetched, so that fetching may evict what is let go
        opened = self.files.tar(self._rows.slice(shard, 1).to_pylist()[0])
        with opened.path.open("rb") as f:
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps[shard] = (mapped, opened)
        self._mapped += self._bytes[shard]
        return mapped

    def _make_room(self, size: int) -> None:
        """Let go of the shards used longest ago until one more, of `size` bytes, may be opened."""
        while self._maps and (
            len(self._maps) >= OPEN_SHARDS or (self._keep is not None and self._mapped + size > self._keep)
        ):
            shard, (mapped, opened) = self._maps.popitem(last=False)
            mapped.close()
            opened.close()
            self._mapped -= self._bytes[shard]

    def close(self) -> None:
        """Let go of all shards that are open."""
        if self._fetching:
            self._fetching.shutdown(cancel_futures=True)
            self._fetching = None
        for mapped, opened in self._maps.values():
            mapped.close()
            opened.close()
        self._maps.clear()
        self._mapped = 0

    def _remember(self, i: int, sample: Sample) -> None:
        size = decoded_bytes(sample)
        if size > self._cache_bytes:
            return
        self._cache[i] = sample
        self._cached += size
        while self._cached > self._cache_bytes:
            _, old = self._cache.popitem(last=False)
            self._cached -= decoded_bytes(old)


def decoded_bytes(sample: Sample) -> int:
    """What a decoded sample takes in memory, about."""
    arrays = [sample.tokens, *sample.images, *sample.sounds, *(x for some in sample.features.values() for x in some)]
    return sum(a.nbytes for a in arrays) + 1024
