"""Ray Data 2.60.0: `read_binary_files` → `map` (Pillow) → `write_webdataset`, on a local session of one CPU.

The session is started before the clock is.
"""

# mypy: disable-error-code="import-not-found,import-untyped,attr-defined"

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from clock import Watch, contest, files
from pillow_shardwriter import shrink


def one(row: dict[str, Any], size: int, quality: int) -> dict[str, Any]:
    path = Path(row["path"])
    label = path.parent.name
    about = json.dumps({"label": label, "url": str(path)}).encode()
    return {"__key__": path.stem, "jpg": shrink(row["bytes"], size, quality), "json": about}


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import ray

    if not ray.is_initialized():
        here = str(Path(__file__).parent)
        ray.init(
            address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 30,
            runtime_env={"env_vars": {"PYTHONPATH": here}},
        )  # fmt: skip
        ray.data.DataContext.get_current().enable_progress_bars = False
    found = [str(path) for path in files(source, ".jpg")]
    with watch.lap("work"):
        rows = ray.data.read_binary_files(found, include_paths=True)
        made = rows.map(functools.partial(one, size=options["size"], quality=options["quality"]))
        made.write_webdataset(str(out / "shards"), encoder=None)  # its encoder knows one quality
    return {"items": len(found)}


if __name__ == "__main__":
    contest(work)
