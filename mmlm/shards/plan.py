"""Which records make which shard: a pure function of the manifest, the recipe and, for a corpus that grew, the last plan.

A slot is a run of records of one split and one generation, in order of id. Its unit id covers the records and
everything that turns them into bytes (the recipe), so a finished shard is known again by its name, and what is not
known again is made anew. Planning reads a few small columns, batch by batch; only the slots stay in memory (about 600
bytes for each shard to be). The rows of a slot are read when its turn comes.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import soundfile
from PIL import features as pillow

from mmlm.config import identity
from mmlm.corpus.manifest_files import files_of, reading
from mmlm.corpus.records import SCHEMA, SPLITS
from mmlm.errors import DataError
from mmlm.features.config import FeaturesConfig
from mmlm.features.spec import FeatureSpec
from mmlm.features.video import version as video_version
from mmlm.shards import encoders
from mmlm.shards.config import ShardConfig
from mmlm.storage import sha256_json

RECIPE = 7
"""Bump when the code changes the bytes of shards."""
OVERHEAD = 4096
"""Estimated bytes of a sample beside its media: headers, padding, JSON."""
TEXT_FACTOR = 6
"""Estimated bytes of a sample for each byte of text: a token of 4 bytes at most, and the text itself in JSON."""
IDENTITY = ("id", "task", "split", "group", "lang", "source", "content_hash")
"""What of a row decides the bytes of its sample. Where media lie does not: their content has a hash."""
_COLUMNS = (*IDENTITY, "text_bytes", "inline_bytes", "images", "sounds", "videos", "generation")
_BATCH = 65_536


@dataclass(frozen=True, slots=True)
class Slot:
    """One shard to be. Its records are those of its split and generation from row `first_row` to `last_row`."""

    unit_id: str
    split: str
    generation: int
    index: int
    """Number within the split; -1 while planning."""
    records: int
    first_id: str
    last_id: str
    first_row: int
    last_row: int
    """Positions in the manifest, in order of id, both included."""

    @property
    def name(self) -> str:
        """`train-00003-1a2b3c4d`: the shard's file name without its ending."""
        return f"{self.split}-{self.index:05d}-{self.unit_id[:8]}"


@dataclass(frozen=True)
class Unit:
    """A slot with its rows in hand: what a worker is given."""

    slot: Slot
    table: pa.Table
    """Rows of `records.SCHEMA`, in order of id."""

    def rows(self) -> Iterator[dict[str, Any]]:
        for batch in self.table.to_batches(max_chunksize=64):
            yield from batch.to_pylist()


Key = tuple[int, str]
"""(generation, split)."""
Boundaries = Mapping[Key, list[tuple[str, int]]]
"""Of an earlier plan: for each key (last id, index) of its units, in order of id."""


@functools.cache
def codec_versions(video: bool = False) -> dict[str, str]:
    """Versions of all that decodes, resamples or encodes; of the video decoder where there are videos."""
    names = ("pillow", "simplejpeg", "opencv-python-headless", "soundfile", "soxr", "resvg_py", "numpy", "scipy")
    libraries = {name: version(name) for name in names}
    native = {name: str(pillow.version(name)) for name in ("zlib", "webp", "jpg", "littlecms2")}
    if video:
        libraries["av"] = video_version()
    return {**libraries, **native, "libsndfile": str(soundfile.__libsndfile_version__), "numpy": np.__version__}


def dropped(features: FeaturesConfig) -> dict[str, int]:
    """The version of how padding is left out; nothing where it is kept, whose shards are the same in all versions."""
    return {"dropped": 2} if features.image and features.image.padding == "drop" else {}


def recipe_digest(config: ShardConfig, spec: FeatureSpec) -> str:
    """Hash of everything that changes the bytes of a shard, the records themselves aside.

    The tasks and the figures of fields are no part of it: more data change them, and not what was sharded before.
    """
    return sha256_json(
        {
            "recipe": RECIPE,
            "features": {k: v for k, v in identity(config.features).items() if k not in ("tokenizer", "encoders")},
            "tokenizer": spec.tokenizer_digest,
            "fields": [sorted(spec.fields.numbers), sorted(spec.fields.categories)] if spec.fields else None,
            "image_codec": [config.image_codec, config.image_quality],
            "chat": spec.chat_template,
            "versions": codec_versions(video=spec.video is not None),
            **encoders.recipe(config.features, spec),
            **dropped(config.features),
        }
    )


def plan(manifest: Path, config: ShardConfig, spec: FeatureSpec, earlier: Boundaries | None = None) -> list[Slot]:
    """All slots of the manifest in folder `manifest`.

    `earlier` keeps the borders and numbers of shards that are there already: records of their generations stay with
    them, and new ones are numbered after them. Raises DataError when the manifest is not sorted, or older than that.
    """
    planner = _Planner(config, spec, earlier or {})
    for batch in _batches(manifest):
        planner.add(batch)
    planner.close_all()
    return planner.numbered()


def read_units(manifest: Path, slots: Iterable[Slot]) -> Iterator[Unit]:
    """The units of `slots`, in order of their last rows; row groups of the manifest that hold none are not read."""
    waiting = sorted(slots, key=lambda slot: slot.first_row, reverse=True)
    active: list[tuple[Slot, list[pa.Table]]] = []
    base = 0
    for path in files_of(manifest):
        with reading(path) as file:
            for number in range(file.num_row_groups):
                count = file.metadata.row_group(number).num_rows
                while waiting and waiting[-1].first_row < base + count:
                    active.append((waiting.pop(), []))
                if active:
                    table = file.read_row_group(number, columns=SCHEMA.names)
                    for slot, pieces in active:
                        pieces.append(_rows_of(slot, table, base))
                    done = [one for one in active if one[0].last_row < base + count]
                    active = [one for one in active if one[0].last_row >= base + count]
                    for slot, pieces in sorted(done, key=lambda one: one[0].last_row):
                        yield Unit(slot, pa.concat_tables(pieces).combine_chunks())
                base += count


def _rows_of(slot: Slot, table: pa.Table, base: int) -> pa.Table:
    first, last = max(0, slot.first_row - base), min(table.num_rows - 1, slot.last_row - base)
    part = table.slice(first, last - first + 1)
    return part.filter(_is_key(part, (slot.generation, slot.split)))


def _is_key(table: pa.Table | pa.RecordBatch, key: Key) -> Any:
    mine = pc.and_(pc.equal(table["generation"], key[0]), pc.equal(table["split"], key[1]))
    return (
        mine
        if key[1] != SPLITS[0]
        else pc.or_(mine, pc.and_(pc.equal(table["generation"], key[0]), pc.equal(table["split"], "")))
    )


def _batches(manifest: Path) -> Iterator[pa.RecordBatch]:
    for path in files_of(manifest):
        with reading(path) as file:
            if missing := set(_COLUMNS) - set(file.schema_arrow.names):
                raise DataError(
                    f"{path} has no column {sorted(missing)[0]!r}: an older mmlm made it", cure="scan again"
                )
            yield from file.iter_batches(_BATCH, columns=list(_COLUMNS), use_threads=False)


@dataclass
class _Open:
    """A slot that is still taking records."""

    index: int
    pieces: list[pa.RecordBatch] = field(default_factory=list)
    records: int = 0
    bytes: int = 0
    first_row: int = 0
    last_row: int = 0


class _Planner:
    def __init__(self, config: ShardConfig, spec: FeatureSpec, earlier: Boundaries) -> None:
        self.config, self.spec, self.earlier = config, spec, earlier
        self.recipe = recipe_digest(config, spec)
        self.slots: list[Slot] = []
        self.open: dict[Key, _Open] = {}
        self.next_border = dict.fromkeys(earlier, 0)
        self.row = 0
        self.last_id = ""

    def add(self, batch: pa.RecordBatch) -> None:
        self._check_order(batch["id"])
        splits = pc.replace_with_mask(batch["split"], pc.equal(batch["split"], ""), pa.scalar(SPLITS[0]))
        for split in pc.unique(splits).to_pylist():
            if split not in SPLITS:
                at = pc.index(splits, split).as_py()
                raise DataError(
                    f"the record {batch['id'][at].as_py()!r} has the split {split!r}", wanted=" or ".join(SPLITS),
                    cure="scan again",
                )  # fmt: skip
        generations = batch["generation"].to_numpy()
        words = np.asarray(pc.index_in(splits, pa.array(SPLITS)))
        for generation in np.unique(generations).tolist():
            for number, split in enumerate(SPLITS):
                rows = np.flatnonzero((generations == generation) & (words == number))
                if len(rows):
                    self._add_key((generation, split), batch.take(pa.array(rows)), rows + self.row)
        self.row += batch.num_rows

    def _check_order(self, ids: pa.Array) -> None:
        if not len(ids):
            return
        rising = pc.less(ids[:-1], ids[1:])
        before, wrong = self.last_id, None
        if self.row and ids[0].as_py() <= before:
            wrong = ids[0].as_py()
        elif len(ids) > 1 and not pc.all(rising).as_py():
            wrong = ids[pc.index(rising, False).as_py() + 1].as_py()
        if wrong is not None:
            raise DataError(f"the manifest is not sorted by id at {wrong!r}, or has it twice", cure="scan again")
        self.last_id = ids[-1].as_py()

    def _add_key(self, key: Key, batch: pa.RecordBatch, rows: np.ndarray) -> None:
        sizes = self._sizes(batch)
        totals = np.concatenate([[0], np.cumsum(sizes)])
        ids = batch["id"]
        at, count = 0, batch.num_rows
        while at < count:
            if (border := self._border(key, ids[at].as_py())) is not None:
                last_id, index = border
                stop = bisect.bisect_right(_Texts(ids), last_id, at)
                self._take(key, index, batch, rows, at, stop, int(totals[stop] - totals[at]))
                if stop < count:
                    self._close(key)
                at = stop
                continue
            opened = self.open.get(key)
            held, room = (
                (opened.records, self.config.shard_bytes - opened.bytes) if opened else (0, self.config.shard_bytes)
            )
            fit = int(np.searchsorted(totals, totals[at] + room, "right")) - 1 - at
            take = min(self.config.shard_records - held, fit, count - at)
            if take <= 0 and opened:
                self._close(key)
                continue
            take = max(1, take)  # a record larger than a shard has one of its own
            self._take(key, -1, batch, rows, at, at + take, int(totals[at + take] - totals[at]))
            at += take
            if self.open[key].records >= self.config.shard_records:
                self._close(key)

    def _border(self, key: Key, first_id: str) -> tuple[str, int] | None:
        """(last id, index) of the earlier unit that `first_id` belongs to."""
        borders = self.earlier.get(key)
        if borders is None:
            return None
        at = self.next_border[key]
        while at < len(borders) and borders[at][0] < first_id:
            at += 1
        if at != self.next_border[key] and key in self.open:
            self._close(key)
        self.next_border[key] = at
        return borders[at] if at < len(borders) else None

    def _sizes(self, batch: pa.RecordBatch) -> np.ndarray:
        """An upper estimate of each record's bytes, in a shard and on its way there."""
        spec, sizes = (
            self.spec,
            OVERHEAD + TEXT_FACTOR * batch["text_bytes"].to_numpy() + batch["inline_bytes"].to_numpy(),
        )
        for column, each in (("images", spec.image_bytes), ("sounds", spec.audio_bytes), ("videos", spec.video_bytes)):
            if each:
                sizes = sizes + batch[column].to_numpy() * each
        return sizes

    def _take(
        self, key: Key, index: int, batch: pa.RecordBatch, rows: np.ndarray, start: int, stop: int, size: int
    ) -> None:
        opened = self.open.get(key)
        if opened is None:
            opened = self.open[key] = _Open(index, first_row=int(rows[start]))
        opened.pieces.append(batch.slice(start, stop - start))
        opened.records += stop - start
        opened.bytes += size
        opened.last_row = int(rows[stop - 1])

    def _close(self, key: Key) -> None:
        opened = self.open.pop(key)
        table = pa.Table.from_batches(opened.pieces).combine_chunks()
        unit_id = _unit_id(table, key[1], self.recipe)
        ids = table["id"]
        self.slots.append(
            Slot(
                unit_id, key[1], key[0], opened.index, opened.records, ids[0].as_py(), ids[-1].as_py(),
                opened.first_row, opened.last_row,
            )
        )  # fmt: skip

    def close_all(self) -> None:
        for key in sorted(self.open, key=lambda key: (key[0], SPLITS.index(key[1]))):
            self._close(key)

    def numbered(self) -> list[Slot]:
        """The slots with their numbers: those of an earlier plan keep theirs, the others follow by generation."""
        following = dict.fromkeys(SPLITS, 0)
        for (_, split), borders in self.earlier.items():
            following[split] = max([following[split], *(index + 1 for _, index in borders)])
        found = []
        for slot in sorted(self.slots, key=lambda slot: slot.generation):
            if slot.index < 0:
                slot = replace(slot, index=following[slot.split])
                following[slot.split] += 1
            found.append(slot)
        return found


class _Texts:
    """An Arrow array of texts as a sequence that `bisect` takes."""

    def __init__(self, array: pa.Array) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, at: int) -> str:
        text: str = self.array[at].as_py()
        return text


def _unit_id(table: pa.Table, split: str, recipe: str) -> str:
    """Hash of the recipe and of the identity columns, each as the lengths of its texts and their bytes."""
    whole = hashlib.sha256(f"{recipe}\0{split}\0{table.num_rows}".encode())
    for name in IDENTITY:
        values = table[name].combine_chunks() if isinstance(table[name], pa.ChunkedArray) else table[name]
        if isinstance(values, pa.ChunkedArray):
            values = pa.concat_arrays(values.chunks)
        if values.null_count:
            values = pc.fill_null(values, "")
        _, offsets, data = values.buffers()
        edges = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
        whole.update(np.diff(edges).astype("<i4").tobytes())
        if data is not None:
            whole.update(memoryview(data)[int(edges[0]) : int(edges[-1])])
    return whole.hexdigest()


def borders(rows: Collection[Mapping[str, Any]]) -> dict[Key, list[tuple[str, int]]]:
    """The Boundaries of a finished shard set, from the rows of its manifest table."""
    found: dict[Key, list[tuple[str, int]]] = {}
    for row in sorted(rows, key=lambda row: row["last_id"]):
        found.setdefault((row["generation"], row["split"]), []).append((row["last_id"], row["index"]))
    return found
