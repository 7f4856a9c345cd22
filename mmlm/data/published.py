"""A ShardSet that was published elsewhere (s3://, gs://, https://), seen through a folder of this machine.

The folder, `<cache>/sets/<digest>`, holds the tables, and later the pack plans; it is read as any shard set is. Shards are
fetched when a sample of theirs is wanted, or a little earlier.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mmlm import artifacts, remote
from mmlm.data.files import ORIGIN, Opened, as_hash, as_name
from mmlm.data.objects import Objects, cache_folder, cache_limit
from mmlm.errors import ArtifactError, DataError
from mmlm.shards.verify import TABLES
from mmlm.storage import sha256_file, sha256_json
from mmlm.stores import blank

KEPT_OPEN = 1 / 4
"""Share of the cache that may be kept from being evicted: another training, or trials side by side, share it, too."""
DIGEST_OF = ("manifest.parquet", "feature_spec.json", "tokenizer.json")
"""Tables that the digest of a shard set covers."""


def view(uri: str) -> Path:
    """The folder that stands for the published set at `uri`, made now if it is not there.

    Raises ArtifactError when there is no finished set, or its tables are not those that it was finished with.
    """
    uri = uri.rstrip("/")
    try:
        artifact = json.loads(remote.read(f"{uri}/{artifacts.NAME}"))
        folder = cache_folder() / "sets" / as_hash(artifact["digest"])[:32]
        if (folder / ORIGIN).exists() and (folder / ORIGIN).read_text(encoding="utf-8") == uri:
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        try:
            for name in TABLES:
                (making / name).write_bytes(remote.read(f"{uri}/{name}"))
            found = sha256_json({name: sha256_file(making / name) for name in sorted(DIGEST_OF)})
            if found != artifact["digest"]:
                raise ArtifactError(
                    f"the tables of {blank(uri)} are not those that its {artifacts.NAME} was written for",
                    cure="run `mmlm verify` on it",
                )
            (making / artifacts.NAME).write_text(json.dumps(artifact), encoding="utf-8")
            (making / ORIGIN).write_text(uri, encoding="utf-8")
            _put(making, folder, uri)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    except (DataError, ValueError, KeyError, TypeError) as error:
        told = error.found if isinstance(error, DataError) else str(error)
        raise ArtifactError(
            f"there is no finished shard set at {blank(uri)} ({told})", cure="publish it, or check the address"
        ) from None
    return folder


def _put(making: Path, folder: Path, uri: str) -> None:
    """Give the folder its name; the same set may be there already, from the same place or from another."""
    try:
        os.rename(making, folder)
    except OSError:
        if not (folder / artifacts.NAME).exists():
            raise
        origin = folder / f"{ORIGIN}.{os.getpid()}"
        origin.write_text(uri, encoding="utf-8")
        origin.replace(folder / ORIGIN)


class PublishedFiles:
    """The shards behind a view. Raises ArtifactError when one is not there, or not what the manifest says."""

    remote = True
    room: int | None

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, (folder / ORIGIN).read_text(encoding="utf-8")
        self.objects = Objects(cache_folder(), cache_limit())
        self.room = int(self.objects.limit * KEPT_OPEN)

    def tar(self, row: dict[str, Any]) -> Opened:
        return self.objects.get(f"{self.uri}/{as_name(row['path'])}", row["sha256"])

    def index(self, row: dict[str, Any]) -> Opened:
        name = as_name(row["path"]).removesuffix(".tar") + ".index.parquet"
        return self.objects.get(f"{self.uri}/{name}", row["index_sha256"])
