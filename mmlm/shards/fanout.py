"""Units → Ray workers → results, in a bounded window. Ray's one home for tasks.

The same `UnitWriter` runs here and in the calling process; Ray only decides where. Results come back in the order in
which they are ready; the committer does not mind.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import random
import signal
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmlm.errors import LaunchError, MmlmError
from mmlm.shards import reaper
from mmlm.shards.encoders import Features, PretrainedEncoder
from mmlm.shards.plan import Unit
from mmlm.shards.write import UnitWriter, Written

Item = TypeVar("Item")
Ticket = TypeVar("Ticket")
Result = TypeVar("Result")

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
        writer = _with_actors(writer, workers)  # its handles keep the actors alive until the end
        shared = ray.put(writer)
        write = ray.remote(num_cpus=1, max_retries=RETRIES)(_write_unit)

        def next_of(waiting: Collection[Any]) -> tuple[Any, Written]:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            return ready[0], _result(ready[0])

        sized = ((unit, unit.table.nbytes) for unit in units)
        yield from through_window(sized, lambda unit: write.remote(shared, unit), next_of, 2 * workers, WINDOW_BYTES)


def through_window(
    items: Iterable[tuple[Item, int]],
    begin: Callable[[Item], Ticket],
    next_of: Callable[[Collection[Ticket]], tuple[Ticket, Result]],
    most: int,
    most_bytes: int,
) -> Iterator[Result]:
    """The results of `items`, (item, its bytes) each, in the order in which they are done: backpressure by bytes.

    An item is begun only when fewer than `most` are on their way and all together, with it, have at most `most_bytes`;
    one that is larger goes alone. Until then no further item is taken. `next_of` waits for one of the tickets that
    `begin` gave.
    """
    waiting: dict[Ticket, int] = {}

    def done() -> Result:
        ticket, result = next_of(waiting)
        del waiting[ticket]
        return result

    for item, size in items:
        while waiting and (len(waiting) >= most or sum(waiting.values()) + size > most_bytes):
            yield done()
        waiting[begin(item)] = size
    while waiting:
        yield done()


def _write_unit(writer: UnitWriter, unit: Unit) -> Written:
    return writer.write(unit)


class _Encoders:
    """What an actor holds: all pretrained encoders of a shard set, in one process, on one GPU where there is one."""

    def __init__(self, encoders: dict[str, PretrainedEncoder]) -> None:
        self.encoders = encoders

    def encode(self, kind: str, items: list[np.ndarray]) -> Features:
        return self.encoders[kind].encode(items)


class _OnActors:
    """One kind's encoder as a worker sees it: batches go round the actors, and come back when they are asked for."""

    def __init__(self, kind: str, batch: int, actors: list[Any]) -> None:
        self.kind, self.batch, self.actors = kind, batch, actors
        self.at = random.randrange(len(actors))  # units that begin together do not all ask the same one

    def __reduce__(self) -> tuple[Any, ...]:
        return _OnActors, (self.kind, self.batch, self.actors)

    def submit(self, items: list[np.ndarray]) -> Callable[[], Features]:
        self.at = (self.at + 1) % len(self.actors)
        reference = self.actors[self.at].encode.remote(self.kind, items)

        def wait() -> Features:
            found: Features = _get(reference, "an encoder", "use a smaller `batch`")
            return found

        return wait


def _with_actors(writer: UnitWriter, workers: int) -> UnitWriter:
    """The writer with its pretrained encoders in actors, one for each GPU, or for each worker where there is none."""
    import ray

    if not writer.encoders:
        return writer
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus:  # those that are free; where all are taken, one is waited for
        gpus = max(1, int(ray.available_resources().get("GPU", 0)))
    # an actor on a CPU takes none from Ray: while it works, the workers mostly wait for it
    actor = ray.remote(
        num_cpus=0, num_gpus=1 if gpus else 0, max_restarts=RETRIES, max_task_retries=RETRIES,
        scheduling_strategy="SPREAD",
    )(_Encoders)  # fmt: skip
    actors = [actor.remote(dict(writer.encoders)) for _ in range(gpus or workers)]
    other = copy.copy(writer)
    other.encoders = {kind: _OnActors(kind, one.batch, actors) for kind, one in writer.encoders.items()}
    return other


def _result(reference: Any) -> Written:
    written: Written = _get(reference, "a shard", "use fewer --workers or smaller shards")
    return written


def _get(reference: Any, what: str, less: str) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MmlmError | OSError):
            raise cause from None
        raise
    except ray.exceptions.RayError as error:
        first = str(error).strip().split("\n", 1)[0]
        raise LaunchError(
            f"Ray gave up on {what} after {RETRIES + 1} tries ({type(error).__name__}: {first})",
            cure=f"often memory ran out: {less}, then run the same command again",
        ) from None


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
    folder = Path(tempfile.mkdtemp(prefix=f"mmlm-ray-{os.getpid()}-", dir="/tmp"))
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
            # a node that freezes keeps its connections: Ray notices after 7 minutes, although the cluster has given it up
            os.environ.setdefault("RAY_grpc_client_keepalive_time_ms", "30000")
            os.environ.setdefault("RAY_grpc_client_keepalive_timeout_ms", "20000")
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
