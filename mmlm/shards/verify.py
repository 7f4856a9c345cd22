"""verify: is a ShardSet what its manifest says, bit by bit? And do its records still give the same bytes?"""

from __future__ import annotations

import hashlib
import io
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from mmlm import artifacts
from mmlm.config import parse
from mmlm.corpus.manifest_files import require_whole
from mmlm.errors import ArtifactError, ConfigError
from mmlm.features import spec as feature_spec
from mmlm.features.text import FILE as TOKENIZER
from mmlm.features.text import Tokenizer
from mmlm.progress import Progress
from mmlm.shards.commit import MANIFEST, QUARANTINE
from mmlm.shards.config import ShardConfig
from mmlm.shards.packs import verify_packs
from mmlm.shards.plan import borders, codec_versions, plan, read_units
from mmlm.shards.tar import members
from mmlm.shards.write import TEMPORARY, UnitWriter, absolute
from mmlm.storage import is_remote, sha256_bytes, sha256_file, sha256_json

TABLES = (MANIFEST, QUARANTINE, feature_spec.FILE, TOKENIZER)
"""What stands beside the shards and artifact.json."""


def verify(path: Path | str) -> list[str]:
    """Every problem of the ShardSet in folder `path`, one line each, naming the file; empty when it is sound.

    Raises ArtifactError when there is no finished ShardSet.
    """
    path = Path(path)
    problems, rows = verify_tables(path)
    if rows is None:
        return problems
    for row in rows:
        if row["path"]:
            tar, index = path / row["path"], (path / row["path"]).with_suffix(".index.parquet")
            read = index.read_bytes if index.is_file() else lambda: None
            problems += verify_shard(row, _blocks(tar) if tar.is_file() else None, read)
    problems += verify_packs(path, artifacts.read(path, "shards").digest, sum(row["samples"] for row in rows))
    return [*problems, *not_listed((tar.name for tar in path.glob("*.tar")), rows)]  # in folders lie sets of their own


def verify_tables(path: Path) -> tuple[list[str], list[dict[str, Any]] | None]:
    """Problems of all but the shards, and the rows of the manifest table; None when it cannot be read."""
    artifact = artifacts.read(path, "shards")
    problems = [f"{name} is missing" for name in TABLES if not (path / name).is_file()]
    if problems:
        return problems, None
    names = [MANIFEST, feature_spec.FILE, TOKENIZER]
    if sha256_json({name: sha256_file(path / name) for name in sorted(names)}) != artifact.digest:
        problems.append(f"{', '.join(names)}: not the bytes that artifact.json was written for")
    try:
        rows = rows_of(path)
        problems += _verify_counts(rows, artifact.counts)
        quarantined = pq.read_table(path / QUARANTINE).num_rows
    except (pa.ArrowException, KeyError, OSError) as error:
        return [*problems, f"{MANIFEST} or {QUARANTINE} cannot be read ({error})"], None
    if quarantined != sum(row["quarantined"] for row in rows):
        problems.append(
            f"{QUARANTINE}: {quarantined} rows, the manifest counts {sum(row['quarantined'] for row in rows)}"
        )
    return problems, rows


def rebuild(
    path: Path | str, manifest: Path | str, data: Path | str, count: int, seed: int = 0
) -> tuple[list[str], int]:
    """Make `count` shards of the set in `path` again, chosen at random, or all if it has fewer, and compare their bytes.

    Returns a line per problem, and how many shards were looked at.

    `manifest` is the folder of the Manifest that the set was made of, `data` the folder of the raw corpora. Raises
    ArtifactError when the manifest is another one, or when the libraries here are not those that made the set.
    """
    path = Path(path)
    if not is_remote(str(data)) and not Path(data).is_dir():
        raise ConfigError(f"there is no folder {data}", wanted="the raw corpora", cure="give them with --data")
    artifact, source = artifacts.read(path, "shards"), artifacts.read(manifest, "manifest")
    if source.digest != artifact.parents["manifest"]:
        raise ArtifactError(
            f"{manifest} holds manifest {source.digest[:12]}", wanted=f"{artifact.parents['manifest'][:12]}",
            cure="give the manifest that the shards were made of",
        )  # fmt: skip
    there = artifact.extra.get("codecs", {})
    here = codec_versions(video="av" in there)
    if here != there:
        both = sorted({*here, *there})
        other = ", ".join(f"{k} {there.get(k)} → {here.get(k)}" for k in both if there.get(k) != here.get(k))
        raise ArtifactError(
            f"other libraries made {path} ({other})",
            wanted="the same versions",
            cure="install those versions to rebuild",
        )
    require_whole(source.path, source.counts.get("kept"))
    config = parse(ShardConfig, artifact.config, str(path / artifacts.NAME))
    rows = rows_of(path)
    written = [row for row in rows if row["path"]]
    chosen = {row["unit_id"]: row for row in random.Random(seed).sample(written, min(count, len(written)))}
    spec, tokenizer = feature_spec.load(path), Tokenizer.load(path)
    slots = [slot for slot in plan(source.path, config, spec, borders(rows)) if slot.unit_id in chosen]
    problems = [
        f"{chosen[unit_id]['path']}: no such shard would be made here: a library that is part of its recipe has changed"
        for unit_id in chosen.keys() - {slot.unit_id for slot in slots}
    ]
    with tempfile.TemporaryDirectory() as folder, Progress("rebuild", len(slots), "shards") as progress:
        (Path(folder) / TEMPORARY).mkdir()
        writer = UnitWriter(spec, tokenizer, config, absolute(data), Path(folder))
        for unit in read_units(source.path, slots):
            made, row = writer.write(unit), chosen[unit.slot.unit_id]
            if made.sha256 != row["sha256"]:
                problems.append(
                    f"{row['path']}: made again, it has sha256 {made.sha256[:16]} instead of {row['sha256'][:16]}"
                )
            for file in (Path(folder) / TEMPORARY).iterdir():
                file.unlink()
            progress.add(1)
    return problems, len(chosen)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The manifest table of the shard set in `path`."""
    rows: list[dict[str, Any]] = pq.read_table(path / MANIFEST).to_pylist()
    return rows


def _verify_counts(rows: list[dict[str, Any]], counts: dict[str, Any]) -> list[str]:
    problems = []
    for key in ("records", "samples", "quarantined"):
        found = sum(row[key] for row in rows)
        if found != counts.get(key):
            problems.append(f"{MANIFEST}: {found} {key}, artifact.json says {counts.get(key)}")
    return problems


def verify_shard(row: dict[str, Any], tar: Iterator[bytes] | None, index: Callable[[], bytes | None]) -> list[str]:
    """Problems of one tar and its index; the first that is found decides, for what follows would only repeat it.

    `row` is that of the manifest table, `tar` the file in pieces, read once; `index()` gives the bytes of its index.
    None stands for a file that is not there.
    """
    name = row["path"]
    index_name = name.removesuffix(".tar") + ".index.parquet"
    if tar is None:
        return [f"{name}: missing"]
    file, inside, broken = _Forward(tar), [], ""
    try:
        inside = [(*member.partition(".")[::2], at, size) for member, at, size in members(cast(BinaryIO, file))]
    except ValueError as error:
        broken = str(error)
    file.drain()
    if (found := file.sha256.hexdigest()) != row["sha256"]:
        other = f", {file.at:,} bytes instead of {row['bytes']:,}" if file.at != row["bytes"] else ""
        return [f"{name}: sha256 {found[:16]} instead of {row['sha256'][:16]}{other}"]
    table = index()
    if table is None:
        return [f"{index_name}: missing"]
    if sha256_bytes(table) != row["index_sha256"]:
        return [f"{index_name}: other bytes than the manifest says"]
    if broken:
        return [f"{name}: {broken}"]
    try:
        listed = pq.read_table(io.BytesIO(table)).to_pydict()
    except pa.ArrowException as error:
        return [f"{index_name}: cannot be read ({error})"]
    if inside != list(zip(listed["key"], listed["ext"], listed["offset"], listed["size"], strict=True)):
        return [f"{index_name}: its offsets are not those of the tar"]
    samples = len({key for key, *_ in inside})
    return [] if samples == row["samples"] else [f"{name}: {samples} samples instead of {row['samples']}"]


def not_listed(names: Iterable[str], rows: list[dict[str, Any]]) -> list[str]:
    """A problem for every tar among `names` that is not in the manifest table."""
    listed = {row["path"] for row in rows}
    return [f"{name}: not in the manifest" for name in sorted(names) if name.endswith(".tar") and name not in listed]


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


class _Forward:
    """A stream of bytes as a file in which one can only go forward; what is passed over is hashed all the same."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.held, self.at = pieces, memoryview(b""), 0
        self.sha256 = hashlib.sha256()

    def read(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size and self._more():
            found += self._take(size - len(found))
        return bytes(found)

    def seek(self, to: int) -> int:
        while self.at < to and self._more():
            self._take(to - self.at)
        return self.at

    def drain(self) -> None:
        while self._more():
            self._take(len(self.held))

    def _more(self) -> bool:
        if not self.held:
            data = next(self.pieces, b"")
            self.sha256.update(data)
            self.held = memoryview(data)
        return bool(self.held)

    def _take(self, size: int) -> memoryview:
        taken, self.held = self.held[:size], self.held[size:]
        self.at += len(taken)
        return taken
