"""Units → Ray workers → results, in a bounded window. Ray's one home for tasks.

The same `UnitWriter` runs here and in the calling process; Ray only decides where. Results come back in the order in
which they are ready; the committer does not mind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmlm.errors import LaunchError, MmlmError
from mmlm.shards import reaper
from mmlm.shards.plan import Unit
from mmlm.shards.write import UnitWriter, Written

RETRIES = 3
"""How often a unit is given to another worker when its worker dies."""
KNOCK_SECONDS = 10.0
"""How long a cluster's address may take to answer."""
STORE_BYTES = 512 << 20
"""Shared memory for what goes to workers: rows of the manifest, with media only where a corpus has them inline."""
WINDOW_BYTES = STORE_BYTES // 2
"""Bytes of rows that wait or are worked on at a time; a unit that is larger goes alone."""


def write_on_ray(
    units: Iterable[Unit], writer: UnitWriter, workers: int, address: str | None = None
) -> Iterator[Written]:
    """Write `units` on `workers` Ray workers here, or on the cluster at `address`.

    At most 2 × workers units are on their way at a time, and at most WINDOW_BYTES of rows.

    Ray is shut down when the iteration ends, however it ends. Raises what the unit raised (an OSError, an MmlmError),
    or LaunchError when Ray cannot be reached or workers keep dying.
    """
    import ray

    with _session(workers, address):
        shared = ray.put(writer)
        write = ray.remote(num_cpus=1, max_retries=RETRIES)(_write_unit)
        waiting: dict[Any, int] = {}

        def next_result() -> Written:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            del waiting[ready[0]]
            return _result(ready[0])

        for unit in units:
            size = unit.table.nbytes
            while waiting and (len(waiting) >= 2 * workers or sum(waiting.values()) + size > WINDOW_BYTES):
                yield next_result()
            waiting[write.remote(shared, unit)] = size
        while waiting:
            yield next_result()


def _write_unit(writer: UnitWriter, unit: Unit) -> Written:
    return writer.write(unit)


def _result(reference: Any) -> Written:
    import ray

    try:
        written: Written = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MmlmError | OSError):
            raise cause from None
        raise
    except ray.exceptions.RayError as error:
        first = str(error).strip().split("\n", 1)[0]
        raise LaunchError(
            f"Ray gave up on a shard after {RETRIES + 1} tries ({type(error).__name__}: {first})",
            cure="often memory ran out: use fewer --workers or smaller shards, then run the same command again",
        ) from None
    return written


@contextlib.contextmanager
def _session(workers: int, address: str | None) -> Iterator[None]:
    """A Ray session: our own small one on this machine, or a place in the cluster at `address`."""
    import ray

    if ray.is_initialized():  # somebody else's session: used, not closed
        yield
        return
    with _nothing_left() if not address else contextlib.nullcontext() as folder:
        try:
            _start(workers, address, folder)
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _nothing_left() -> Iterator[Path]:
    """A folder for a session's files; it and every process of the session are gone afterwards, come what may."""
    # /tmp and not the user's TMPDIR: the paths of Ray's sockets may have 107 characters at most
    folder = Path(tempfile.mkdtemp(prefix="mmlm-ray-", dir="/tmp"))
    tag = uuid.uuid4().hex
    process = reaper.start(tag, folder)
    os.environ[reaper.TAG] = tag
    try:
        yield folder
    finally:
        os.environ.pop(reaper.TAG, None)
        reaper.finish(process)


def _knock(address: str) -> None:
    """Raise OSError when nothing listens at `host:port`; Ray itself would try for more than five minutes."""
    host, colon, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()


def _start(workers: int, address: str | None, folder: Path | None) -> None:
    import ray

    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    handler = signal.getsignal(signal.SIGTERM)  # Ray would put its own in place of the caller's
    try:
        if address:  # inside a Ray job, RAY_ADDRESS already names the job's own cluster
            _knock(address)
            inside = address == "auto" and "RAY_ADDRESS" in os.environ
            ray.init(address=None if inside else address, **common)
        else:  # "local": a stale note of another session's cluster would be followed otherwise
            ray.init(
                address="local", num_cpus=workers, include_dashboard=False, object_store_memory=STORE_BYTES,
                _temp_dir=str(folder), **common,
            )  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:
        first = str(error).strip().split("\n", 1)[0]
        if address:
            raise LaunchError(
                f"the Ray cluster at {address} cannot be reached ({first})",
                cure="check --address, or leave it out to work on this machine",
            ) from None
        raise LaunchError(
            f"Ray does not start on this machine ({first})", cure="`mmlm doctor` says what is missing"
        ) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
