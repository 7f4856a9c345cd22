"""A story that takes seconds: 60 digits of the keypad corpus, and 12 steps of a tiny model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from mmlm import story as stories

SOURCE = {"kind": "keypad", "images": 60, "renderings": 1, "renderings_held_out": 1}
TRAIN: dict[str, Any] = {
    "steps": 12, "log_every": 2, "precision": "fp32", "model": {"width": 32, "layers": 1, "heads": 2}, "data": {"batch": 12},
    "validation": {"every": 6, "records": 8},
}  # fmt: skip


def story(folder: Path) -> Path:
    """Write it into `folder`, which it returns. Shards are made in one process."""
    shutil.copytree(stories.library() / "demo", folder)
    (folder / "distill.yaml").unlink()
    shard = yaml.safe_load((folder / "shard.yaml").read_text()) | {"ray_from": 10**9}
    for stage, settings in (("scan", {"sources": [SOURCE]}), ("shard", shard), ("train", TRAIN)):
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(settings))
    return folder
