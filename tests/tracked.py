"""A stage whose runs the tests of tracking follow."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pydantic

from mmlm import artifacts, tracking_store
from mmlm.config import Config
from mmlm.tracking import Tracker


class Settings(Config):
    """A stage's config."""

    steps: int = 3
    """Steps."""
    nested: dict[str, Any] = pydantic.Field({"zero": {"stage": 2}, "long": "x" * 900})
    """A section."""


def begin(folder: Path, kind: str = "shards", steps: int = 3) -> artifacts.Work:
    return artifacts.begin(folder, kind, recipe=1, config=Settings(steps=steps))


def finish(work: artifacts.Work) -> artifacts.Artifact:
    (work.path / "data").write_text("bytes")
    return work.finish(counts={"records": 7}, digest_of=["data"])


def let_senders_end(seconds: float = 60) -> None:
    """Wait until no thread sends a spool any more: while one does, which a busy machine can keep past the end of its
    stage, another tracker leaves that spool alone."""
    for thread in threading.enumerate():
        if isinstance(thread, tracking_store.Sender):
            thread.join(seconds)
            assert not thread.is_alive()


def client(store: str) -> Any:
    return tracking_store.open_client(store)


def elsewhere(store: str, out: Path, note: str) -> str:
    """A parent run that a process of another host made, with its note below `out`."""
    tracker = Tracker(store, "elsewhere", out)
    tags = {"mmlm.host": "another-host", "mmlm.pid": "1", "mmlm.pid_start": "1"}
    tracker.open()
    parent = str(tracker._client.create_run(tracker._experiment, tags=tags).info.run_id)
    row = {"uri": tracker._key, "parent": parent, "status": None, "time": 1}
    out.mkdir(parents=True, exist_ok=True)
    (out / note).write_text(json.dumps(row))
    return parent
