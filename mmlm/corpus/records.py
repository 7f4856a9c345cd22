"""Record: one sample as it is in the world; and its row in a manifest.

A manifest is a folder with `records-*.parquet` (SCHEMA, sorted by id), `refused.parquet` (REFUSED) and `artifact.json`,
whose `extra` says per task: kind, labels, questions. Media URIs are relative to the data folder (`--data`) wherever
they can be; `content_hash` covers the text and the bytes of the media, so the same sample elsewhere has the same hash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from mmlm.corpus.manifest_files import files_of, reading
from mmlm.storage import sha256_bytes, sha256_json

Kind = Literal["text", "image", "audio", "video", "fields"]
KINDS: tuple[str, ...] = ("text", "image", "audio", "video", "fields")
LARGEST = 1e30
"""Size of the largest number that is taken, in a corpus or in a question: sums of squares must not overflow."""
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a record: text inline; image, audio, video by `uri` or inline `data`; `fields` as named values.

    `role` is `user` (the question and what it is about), `context` (text beside the question that may be taken
    away, such as a caption), `system`, or in a dialogue also `assistant` and `tool`. Answers are the record's target,
    never a part.
    """

    kind: str
    role: str = "user"
    text: str | None = None
    uri: str | None = None
    data: bytes | None = None
    fields: dict[str, float | str | None] | None = None
    turn: int = 0
    """Of a dialogue: 0 is the turn that is answered, -1 the one before it, and so on."""
    size: int | None = None
    """Bytes of what the scan found behind `uri`, so that a file that changes afterwards is noticed."""
    sha256: str | None = None
    """Likewise."""

    @property
    def beside(self) -> bool:
        """Whether it is text beside the question: a context, or what was said in an earlier turn."""
        return self.kind == "text" and (self.role == "context" or (self.turn < 0 and self.role != "system"))

    @property
    def modality(self) -> str:
        """The name under which evaluation gives it or takes it away: image, audio, video, fields, context, text."""
        return "context" if self.beside else self.kind


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be answered: a class, several classes, a number, a text; `label` and `text` may both be given."""

    label: str | None = None
    labels: tuple[str, ...] | None = None
    number: float | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One sample. Records of one `group` never fall into two splits. `lang` is a code, or "" when unknown."""

    id: str
    parts: tuple[Part, ...]
    task: str = "answer"
    target: Target = field(default_factory=Target)
    split: str = ""
    group: str = ""
    lang: str = ""
    source: str = ""
    license: str = ""
    content_hash: str = ""

    def modalities(self) -> tuple[str, ...]:
        """Sorted names of what this record gives, `text` (the question) included when there is one."""
        return tuple(sorted({p.modality for p in self.parts}))


PART = pa.struct(
    [
        ("kind", pa.string()),
        ("role", pa.string()),
        ("text", pa.string()),
        ("uri", pa.string()),
        ("data", pa.binary()),
        ("fields", pa.string()),  # JSON object of numbers, categories and nulls
        ("turn", pa.int32()),
        ("size", pa.int64()),  # bytes and hash of what the scan found behind `uri`
        ("sha256", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("group", pa.string()),
        ("lang", pa.string()),
        ("source", pa.string()),
        ("license", pa.string()),
        ("content_hash", pa.string()),
        ("label", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("number", pa.float64()),
        ("answer", pa.string()),
        ("parts", pa.list_(PART)),
        ("text_bytes", pa.int64()),  # UTF-8 bytes of all texts, the answer included
        ("inline_bytes", pa.int64()),  # bytes of media that lie in this very table
        ("images", pa.int32()),
        ("sounds", pa.int32()),
        ("videos", pa.int32()),
        ("generation", pa.int32()),  # which scan of a growing corpus added the record, from 0
    ]
)
"""One row per record. The counts before `generation` let shards be planned without reading the parts."""
REFUSED = pa.schema([("source", pa.string()), ("id", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


def to_row(record: Record) -> dict[str, Any]:
    """A record as a row of SCHEMA, of generation 0. A record without a content hash gets one that names its URIs."""
    target, kinds = record.target, [p.kind for p in record.parts]
    texts = [*(p.text for p in record.parts), target.text, target.label, *(target.labels or ())]
    return {
        "id": record.id, "task": record.task, "split": record.split, "group": record.group, "lang": record.lang,
        "source": record.source, "license": record.license, "content_hash": record.content_hash or _hash_by_name(record),
        "label": record.target.label,
        "labels": list(record.target.labels) if record.target.labels is not None else None,
        "number": record.target.number, "answer": record.target.text,
        "parts": [
            {"kind": p.kind, "role": p.role, "text": p.text, "uri": p.uri, "data": p.data,
             "fields": json.dumps(p.fields, ensure_ascii=False, sort_keys=True) if p.fields is not None else None,
             "turn": p.turn, "size": p.size, "sha256": p.sha256}
            for p in record.parts
        ],
        "text_bytes": sum(len(text.encode("utf-8", "replace")) for text in texts if text),
        "inline_bytes": sum(len(p.data or b"") for p in record.parts),
        "images": kinds.count("image"), "sounds": kinds.count("audio"), "videos": kinds.count("video"),
        "generation": 0,
    }  # fmt: skip


def _hash_by_name(record: Record) -> str:
    """Stands for a content hash where the media were not read: their URIs in place of their bytes."""
    parts = [
        [p.kind, p.role, p.text, p.uri, None if p.data is None else sha256_bytes(p.data), p.fields, p.turn]
        for p in record.parts
    ]
    target = record.target
    return sha256_json([parts, [target.label, target.labels, target.number, target.text]])


def from_row(row: dict[str, Any]) -> Record:
    """The inverse of `to_row`."""
    parts = tuple(
        Part(
            p["kind"], p["role"], p["text"], p["uri"], p.get("data"), json.loads(p["fields"]) if p["fields"] else None,
            p.get("turn") or 0, p.get("size"), p.get("sha256"),  # manifests of before have none
        )
        for p in row["parts"]
    )  # fmt: skip
    return Record(
        row["id"], parts, row["task"], target_of(row), row["split"], row["group"], row["lang"], row["source"], row["license"],
        row["content_hash"],
    )  # fmt: skip


def target_of(row: dict[str, Any]) -> Target:
    """What a row with the columns label, labels, number and answer asks for."""
    labels = tuple(row["labels"]) if row["labels"] is not None else None
    return Target(row["label"], labels, row["number"], row["answer"])


WITHOUT_MEDIA = [
    *(name for name in SCHEMA.names if name != "parts"),
    *(f"parts.list.element.{field.name}" for field in PART if field.name != "data"),
]
"""Columns of all but the media that lie in the table itself."""


def read_rows(
    manifest: Path, *, columns: list[str] | None = None, batch: int = 4096, keep: Callable[[str], bool] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of all `records-*.parquet` in a manifest folder, in order of id; a row group at a time is in memory.

    With `keep` only rows whose ids it answers with true, which `columns` must have. Raises ArtifactError for a broken file.
    """
    for chunk in read_batches(manifest, columns=columns, batch=batch):
        if keep:
            kept = [keep(name) for name in chunk.column("id").to_pylist()]
            chunk = chunk.filter(pa.array(kept, pa.bool_()))
        yield from chunk.to_pylist()


def read_batches(manifest: Path, *, columns: list[str] | None = None, batch: int = 4096) -> Iterator[pa.RecordBatch]:
    """The same as tables of at most `batch` rows."""
    for path in files_of(manifest):
        with reading(path) as f:
            for number in range(f.num_row_groups):
                yield from f.read_row_group(number, columns=columns).to_batches(max_chunksize=batch)


def read_records(
    manifest: Path, *, media: bool = True, batch: int = 4096, keep: Callable[[str], bool] | None = None
) -> Iterator[Record]:
    """The records of a manifest folder; without `media`, what lies inline in the table is left out. `keep`: see `read_rows`."""
    columns = None if media else WITHOUT_MEDIA
    return (from_row(row) for row in read_rows(manifest, columns=columns, batch=batch, keep=keep))
