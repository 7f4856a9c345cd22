"""The `records-*.parquet` of a manifest folder: are they all there, and can they be read?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmlm.errors import ArtifactError


def files_of(manifest: Path) -> list[Path]:
    """Those that are there, in order of the ids in them."""
    return sorted(manifest.glob("records-*.parquet"))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[pq.ParquetFile]:
    """The file, opened. Raises ArtifactError that names it when it, or a part that is read meanwhile, is broken."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk, not the file; Arrow's own have no number
            raise
        told = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{path} cannot be read ({told})", cure=_cure(path.parent)) from None


def require_whole(manifest: Path, kept: int | None) -> None:
    """Raise ArtifactError when the files do not hold the `kept` records that artifact.json counts (None: unknown).

    Only the ends of the files are read, where their numbers of rows stand.
    """
    files = files_of(manifest)
    for number, path in enumerate(files):
        wanted = manifest / f"records-{number:05d}.parquet"
        if path != wanted:
            raise _missing(wanted)
    rows = 0
    for path in files:
        with reading(path) as file:
            rows += file.metadata.num_rows
    if not files or (kept is not None and rows < kept):
        told = f"{rows:,} of {kept:,} records are in those before it" if kept is not None and files else ""
        raise _missing(manifest / f"records-{len(files):05d}.parquet", told)
    if kept is not None and rows != kept:
        raise ArtifactError(
            f"{files[0]} to {files[-1].name} hold {rows:,} records",
            wanted=f"{kept:,}, as artifact.json says",
            cure=_cure(manifest),
        )


def _missing(path: Path, told: str = "") -> ArtifactError:
    return ArtifactError(
        f"{path} is missing" + f" ({told})" * bool(told),
        wanted="all files of the manifest",
        cure=_cure(path.parent),
    )


def _cure(manifest: Path) -> str:
    return f"bring the file back, or remove {manifest} and scan again"
