"""One Unit → one tar under a temporary name, with its offsets index; what fails becomes a quarantine row.

Runs inside a Ray worker or in the calling process; the bytes are the same. Nothing becomes visible here: that is the
committer's work.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmlm.corpus.records import REFUSED, Part, Record, from_row
from mmlm.errors import DataError
from mmlm.features.encode import Encoder
from mmlm.features.failures import SampleError
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec
from mmlm.features.text import Tokenizer
from mmlm.heap import keep_freed_memory
from mmlm.shards.codec import pack, sample_key, stored_images
from mmlm.shards.config import ShardConfig
from mmlm.shards.encoders import Ask, make_encoders, with_features
from mmlm.shards.faultpoints import point
from mmlm.shards.plan import Slot, Unit
from mmlm.shards.tar import TarWriter
from mmlm.storage import MAX_FILE_BYTES, is_remote, prefetch, read_uri, sha256_bytes
from mmlm.stores import blank

TEMPORARY = ".tmp"
"""Folder below the shard set for what is not published yet."""
AHEAD = 64
"""Records whose media are fetched together where they lie elsewhere."""
CACHED_MEDIA = 64
"""Decoded pictures and sounds kept inside one unit: neighbouring records often share them."""
KEPT = 64 << 20
"""Freed bytes that stay with the process: decoded pictures and spectra come and go by the megabyte. Given back each time, they
cost 330 page faults a picture of 1024 pixels, a fifth of its time."""
INDEX = pa.schema([("key", pa.string()), ("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
QUARANTINE = REFUSED.append(pa.field("unit_id", pa.string()))
"""Columns of the table of failed samples."""


@dataclass
class Written:
    """What became of a unit. `temporary` is the path of its tar without an ending, or "" when no sample was left."""

    unit_id: str
    name: str
    split: str
    generation: int
    index: int
    first_id: str
    last_id: str
    records: int
    temporary: str = ""
    sha256: str = ""
    bytes: int = 0
    samples: int = 0
    images: int = 0
    sounds: int = 0
    tokens: int = 0
    image_bytes: int = 0
    audio_bytes: int = 0
    audio_frames: int = 0
    cut_sounds: int = 0
    left_out: int = 0
    quarantine: list[dict[str, str]] = field(default_factory=list)
    """Rows of QUARANTINE."""
    seconds: float = 0.0
    """How long the unit took; goes to the straggler report, never into a shard."""
    worker: str = ""
    """`host:process` that wrote it; likewise."""

    @classmethod
    def of(cls, slot: Slot) -> Written:
        return cls(
            slot.unit_id, slot.name, slot.split, slot.generation, slot.index, slot.first_id, slot.last_id, slot.records
        )

    def row(self) -> dict[str, Any]:
        """For the journal: everything but where it was written first."""
        row = asdict(self)
        del row["temporary"]
        return row


class UnitWriter:
    """Writes units for one shard set. Made once per worker; holds the tokenizer."""

    def __init__(self, spec: FeatureSpec, tokenizer: Tokenizer, config: ShardConfig, data: str, out: Path) -> None:
        self.spec, self.tokenizer, self.config = spec, tokenizer, config
        self.data, self.folder = data, out / TEMPORARY
        self.encoders: Mapping[str, Ask] = make_encoders(config.features, spec)

    def write(self, unit: Unit) -> Written:
        """Write `unit` to a new temporary name, flushed to the disk. Raises OSError when that fails."""
        keep_freed_memory(KEPT)
        started, result = time.perf_counter(), Written.of(unit.slot)
        encoder = Encoder(self.spec, self.tokenizer, CACHED_MEDIA, self.config.features.on_long == "keep")
        index: dict[str, list[Any]] = {name: [] for name in INDEX.names}
        stem = self.folder / f"{result.name}-{uuid.uuid4().hex}"
        tar_path, index_path = stem.with_suffix(".tar"), stem.with_suffix(".index.parquet")
        point("before_temporary")
        try:
            with tar_path.open("xb") as file:
                tar = TarWriter(file)
                samples = self._samples(unit, encoder, result)
                if self.encoders:
                    samples = with_features(samples, self.encoders, self._stored_images)
                for sample, members in samples:
                    _add(tar, index, sample_key(sample.id), members)
                    _count(result, sample, members)
                tar.close()
                file.flush()
                os.fsync(file.fileno())
            result.seconds = round(time.perf_counter() - started, 4)
            result.worker = f"{socket.gethostname()}:{os.getpid()}"
            if not result.samples:
                tar_path.unlink()
                return result
            with index_path.open("xb") as file:
                pq.write_table(pa.table(index, schema=INDEX), file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            tar_path.unlink(missing_ok=True)
            index_path.unlink(missing_ok=True)
            raise
        result.temporary, result.sha256, result.bytes = str(stem), tar.sha256.hexdigest(), tar.offset
        result.cut_sounds, result.left_out = encoder.cut_sounds, encoder.left_out
        point("after_fsync")
        return result

    def _samples(self, unit: Unit, encoder: Encoder, result: Written) -> Iterator[tuple[Sample, dict[str, bytes]]]:
        """The samples of `unit` and their members; what fails goes into the quarantine of `result`."""
        for at, record in enumerate(self._records(unit)):
            if at == unit.slot.records // 2:
                point("mid_tar")
            try:
                sample = encoder.encode(record, self._read)
            except SampleError as error:
                result.quarantine.append({**quarantine_row(record, error), "unit_id": result.unit_id})
                continue
            yield sample, self._pack(sample)

    def _records(self, unit: Unit) -> Iterator[Record]:
        """The records of `unit`; what of their media lies elsewhere is fetched AHEAD of them, side by side."""
        records = map(from_row, unit.rows())
        while some := list(islice(records, AHEAD)):
            uris = [part.uri for record in some for part in record.parts if part.uri]
            prefetch(uris, self.data, MAX_FILE_BYTES)
            yield from some

    def _pack(self, sample: Sample) -> dict[str, bytes]:
        patch = self.spec.image.patch if self.spec.image else None
        return pack(sample, self.config.image_codec, self.config.image_quality, patch)

    def _stored_images(self, sample: Sample, members: Mapping[str, bytes]) -> list[np.ndarray]:
        """The pictures of `sample` as its shard holds them; decoded again where storing them loses something."""
        codec, quality = self.config.image_codec, self.config.image_quality
        lossy = codec == "jpeg" or (codec == "webp" and quality is not None)
        return stored_images(members) if lossy else sample.images

    def _read(self, part: Part) -> bytes:
        return read_part(part, self.data)


def read_part(part: Part, data: str) -> bytes:
    """The bytes of a media part, inline or below `data`. Raises SampleError `missing_file`, `too_large` or `changed`.

    What the scan hashed is hashed again, 4 % of a picture's time: a folder that was swapped for another keeps sizes, dates
    and the inodes' times of change.
    """
    if part.data is not None:
        return part.data
    if not part.uri:
        raise SampleError("missing_file", f"the {part.kind} has neither a path nor content")
    try:
        found = read_uri(part.uri, data)
    except DataError as error:
        reason = "too_large" if "larger than" in error.found else "missing_file"
        raise SampleError(reason, error.found, cure=error.cure) from None
    if part.sha256 is not None and (len(found) != part.size or sha256_bytes(found) != part.sha256):
        raise SampleError(
            "changed", f"{blank(part.uri)} is not the file that was scanned", wanted="the same bytes",
            cure="scan again; the shards of what is as it was are taken over",
        )  # fmt: skip
    return found


def quarantine_row(record: Record, error: SampleError) -> dict[str, str]:
    """Where a failed record came from and why it failed. The source is its media file, or what the corpus said."""
    media = [blank(part.uri) for part in record.parts if part.uri]
    detail = str(error)
    if len(media) > 1:
        detail += " (files: " + ", ".join(media) + ")"
    source = media[0] if len(media) == 1 else record.source or (media[0] if media else "")
    return {"source": source, "id": record.id, "reason": error.reason, "detail": detail}


def _add(tar: TarWriter, index: dict[str, list[Any]], key: str, members: dict[str, bytes]) -> None:
    for extension, data in members.items():
        offset = tar.add(f"{key}.{extension}", data)
        for name, value in zip(INDEX.names, (key, extension, offset, len(data)), strict=True):
            index[name].append(value)


def _count(result: Written, sample: Sample, members: dict[str, bytes]) -> None:
    result.samples += 1
    result.images += len(sample.images)
    result.sounds += len(sample.sounds)
    result.tokens += len(sample.tokens)
    result.audio_frames += sum(map(len, sample.sounds))
    result.image_bytes += sum(len(data) for name, data in members.items() if name.startswith("image"))
    result.audio_bytes += sum(len(data) for name, data in members.items() if name.startswith("audio"))


def absolute(data: Path | str) -> str:
    """The data folder as it is handed to workers: absolute, or a URI."""
    return str(data) if is_remote(str(data)) else os.path.abspath(data)
