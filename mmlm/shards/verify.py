"""verify: is a ShardSet what its manifest says, bit by bit? And do its records still give the same bytes?"""

from __future__ import annotations

import hashlib
import random
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmlm import artifacts
from mmlm.config import parse
from mmlm.errors import ArtifactError, ConfigError
from mmlm.features import spec as feature_spec
from mmlm.features.text import FILE as TOKENIZER
from mmlm.features.text import Tokenizer
from mmlm.progress import Progress
from mmlm.shards.commit import MANIFEST, QUARANTINE
from mmlm.shards.config import ShardConfig
from mmlm.shards.plan import borders, codec_versions, plan, read_units
from mmlm.shards.tar import members
from mmlm.shards.write import TEMPORARY, UnitWriter, absolute
from mmlm.storage import is_remote, sha256_file, sha256_json

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
            problems += _verify_shard(path, row)
    listed = {row["path"] for row in rows}
    problems += [f"{tar.name}: not in the manifest" for tar in sorted(path.rglob("*.tar")) if tar.name not in listed]
    return problems


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


def rebuild(path: Path | str, manifest: Path | str, data: Path | str, count: int, seed: int = 0) -> list[str]:
    """Make `count` shards of the set in `path` again, chosen at random, and compare their bytes; a line per problem.

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
        other = ", ".join(f"{k} {there.get(k)} → {v}" for k, v in here.items() if there.get(k) != v)
        raise ArtifactError(
            f"other libraries made {path} ({other})",
            wanted="the same versions",
            cure="install those versions to rebuild",
        )
    config = parse(ShardConfig, artifact.config, str(path / artifacts.NAME))
    rows = [row for row in pq.read_table(path / MANIFEST).to_pylist() if row["path"]]
    chosen = {row["unit_id"]: row for row in random.Random(seed).sample(rows, min(count, len(rows)))}
    spec, tokenizer = feature_spec.load(path), Tokenizer.load(path)
    slots = [s for s in plan(source.path, config, spec, borders(rows_of(path))) if s.unit_id in chosen]
    problems = [
        f"{chosen[u]['path']}: its records are not in the manifest"
        for u in chosen
        if u not in {s.unit_id for s in slots}
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
    return problems


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


def _verify_shard(path: Path, row: dict[str, Any]) -> list[str]:
    """Problems of one tar and its index; the first that is found decides, for what follows would only repeat it."""
    name = row["path"]
    tar, index = path / name, (path / name).with_suffix(".index.parquet")
    if not tar.is_file():
        return [f"{name}: missing"]
    with tar.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != row["sha256"]:
        size = tar.stat().st_size
        other = f", {size:,} bytes instead of {row['bytes']:,}" if size != row["bytes"] else ""
        return [f"{name}: sha256 {found[:16]} instead of {row['sha256'][:16]}{other}"]
    if not index.is_file():
        return [f"{index.name}: missing"]
    if sha256_file(index) != row["index_sha256"]:
        return [f"{index.name}: other bytes than the manifest says"]
    try:
        with tar.open("rb") as file:
            inside = list(members(file))
    except ValueError as error:
        return [f"{name}: {error}"]
    return verify_members(inside, pq.read_table(index), row)


def verify_members(inside: list[tuple[str, int, int]], index: pa.Table, row: dict[str, Any]) -> list[str]:
    """Problems of the members (name, offset, size) of a tar, beside its index and its row in the manifest table."""
    name, listed = row["path"], index.to_pydict()
    found = [(*member.partition(".")[::2], offset, size) for member, offset, size in inside]
    if found != list(zip(listed["key"], listed["ext"], listed["offset"], listed["size"], strict=True)):
        return [f"{Path(name).with_suffix('.index.parquet')}: its offsets are not those of the tar"]
    samples = len({key for key, *_ in found})
    return [] if samples == row["samples"] else [f"{name}: {samples} samples instead of {row['samples']}"]
