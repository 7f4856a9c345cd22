"""The way to MLflow: tracking URIs, opening a store, and sending what waits in a spool."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mmlm import spool
from mmlm.config import blank_credentials
from mmlm.errors import LaunchError

SEND_EVERY = 2.0
"""Seconds between two batches to the tracking server."""
DRAIN_SECONDS = 10.0
"""How long the end of a stage waits for what is still to be sent."""
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Opens the experiment on MLflow's page as runs with curves, not as conversations."""
REJECTED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
"""MLflow's error codes for a call that no repetition will mend."""
UNCLEAR = "BAD_REQUEST"
"""That one of them which MLflow also gives for most errors of its database: one that is read-only now, or broken."""
ASKED = "mmlm.asked"
"""The tag by which the two are told apart; its value is a time, since a store need not write what it has already."""
_log = logging.getLogger("mmlm.tracking")


def default_uri() -> str:
    """MLFLOW_TRACKING_URI, or `runs/mlflow.db` in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'runs' / 'mlflow.db'}"


def absolute(uri: str) -> str:
    """A tracking URI that means the same in every folder."""
    prefix = "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(prefix + "/") and uri != "sqlite:///:memory:":
        return prefix + str(Path.cwd() / uri[len(prefix) :])
    return uri if "://" in uri or uri.startswith("databricks") else str(Path(uri).absolute())


def database(uri: str) -> Path | None:
    """The file of a SQLite tracking URI, else None."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def quiet_mlflow() -> None:
    """Settings without which MLflow talks on the terminal, phones home, or retries for minutes."""
    for key, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "ERROR", "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }.items():  # fmt: skip
        os.environ.setdefault(key, value)
    logging.getLogger("alembic").setLevel(logging.ERROR)


def open_client(uri: str) -> Any:
    """An MlflowClient on `uri`, its database made when there is none. Raises LaunchError with what to do."""
    quiet_mlflow()
    file = database(uri)
    try:
        with contextlib.ExitStack() as stack:
            if file is not None and file.name != ":memory:":
                file.parent.mkdir(parents=True, exist_ok=True)
                # several processes that migrate one new SQLite file race and die
                lock = stack.enter_context(file.with_name(file.name + ".lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            import mlflow

            logging.getLogger("alembic").setLevel(logging.ERROR)
            client = mlflow.MlflowClient(uri, uri)
            client.search_experiments(max_results=1)
    except OSError:
        raise  # full disk, no rights: explained by errors.explain_os_error
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LaunchError(
            f"the tracking store {blank_credentials(uri)} cannot be opened ({first[:200]})",
            cure="check --tracking-uri or MLFLOW_TRACKING_URI; sqlite:///runs/mlflow.db needs no server",
        ) from None
    return client


def probe(uri: str, timeout: float = 5.0, tries: int = 2) -> None:
    """Raise LaunchError, within 15 s, when nobody answers behind a server's or database's URI."""
    from urllib.parse import urlsplit

    parts = urlsplit(uri)
    ports = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
    kind = parts.scheme.split("+")[0]
    if kind not in ports or not parts.hostname:
        return
    problem: object = ""
    for attempt in range(tries):
        try:
            address = (parts.hostname, parts.port or ports[kind])
            with socket.create_connection(address, timeout=timeout):
                pass
            if kind.startswith("http"):
                _health(uri, timeout)
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            problem = getattr(error, "reason", None) or error
            if attempt + 1 < tries:
                time.sleep(0.5)
    raise LaunchError(
        f"the tracking server {blank_credentials(uri)} does not answer ({problem})",
        cure="start it, check --tracking-uri or MLFLOW_TRACKING_URI, or use sqlite:///runs/mlflow.db",
    )


def _health(uri: str, timeout: float) -> None:
    import urllib.error
    import urllib.request
    from urllib.parse import urlsplit, urlunsplit

    parts = urlsplit(uri)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/") + "/health", query="")
    try:
        urllib.request.urlopen(urlunsplit(bare), timeout=timeout).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise OSError(f"HTTP {error.code}") from None
        # 401, 403, 404: somebody answers; what exactly is wrong the first real call will say


def experiment(client: Any, uri: str, story: str) -> str:
    """The id of the story's experiment; its artifacts lie beside a SQLite file, elsewhere where the server wants."""
    found = client.get_experiment_by_name(story)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    file = database(uri)
    place = (file.parent.absolute() / "mlartifacts" / story).as_uri() if file else None
    try:
        return str(client.create_experiment(story, artifact_location=place, tags=KIND))
    except Exception:  # another process was faster
        found = client.get_experiment_by_name(story)
        if found is None:
            raise
        return str(found.experiment_id)


def metric_name(name: str) -> str:
    """`name` with the characters that MLflow refuses replaced."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def _sent(client: Any, state: spool.State, call: Any, items: list[Any]) -> int:
    """Send a batch; halve it where the server rejects it, so that one bad value costs only itself. Returns the number
    of dropped items. An outage raises."""
    if not items:
        return 0
    try:
        call(items)
        return 0
    except Exception as error:
        if not is_final(client, state.run_id, error):
            raise
    if len(items) == 1:
        return 1
    middle = len(items) // 2
    return _sent(client, state, call, items[:middle]) + _sent(client, state, call, items[middle:])


def is_final(client: Any, run_id: str | None, error: Exception) -> bool:
    """Whether no repetition will mend what was wrong with a call for that run. An error that may be the whole store's is
    not final when the run takes no tag either, which there can be nothing wrong with."""
    code = getattr(error, "error_code", "")
    if code == UNCLEAR:
        try:
            client.set_tag(run_id, ASKED, str(spool.now()))
        except Exception:
            return False
    return code in REJECTED


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


def forward(client: Any, experiment: str, state: spool.State) -> None:
    """Send everything that waits in a spool, remembering after each batch how far it came. Raises on an outage."""
    if state.run_id is None:
        state.run_id = client.create_run(experiment, state.started, state.tags, state.name).info.run_id
        state.save()
    _forward_metrics(client, state)
    folder = state.path.parent
    rows = list(spool.rows_after(folder / spool.ROWS, state.rows))
    for i, (row, after) in enumerate(rows):
        if "end" not in row or i + 1 == len(rows):  # the end of an attempt that was continued is none
            _forward_row(client, state, row)
        state.rows = after
        state.save()


def _forward_metrics(client: Any, state: spool.State) -> None:
    try:
        curves = (state.path.parent / spool.METRICS).open("rb")
    except FileNotFoundError:
        return
    with curves:
        _forward_curves(client, state, curves)


def _forward_curves(client: Any, state: spool.State, curves: BinaryIO) -> None:
    """All from one open file: a training may put another into its place at any time."""
    again = 0
    if state.metrics and not spool.stands(curves, state.metrics, state.mark):
        # a resumed training wrote the file anew, without the rows of the steps that it does again: offsets mean
        # nothing any more, but rows that were sent are older than the last one that was
        state.metrics, state.mark, again = 0, "", state.latest
    batch: list[Any] = []
    after, latest, mark = state.metrics, state.latest, state.mark

    def flush() -> None:
        state.dropped += _sent(client, state, lambda some: client.log_batch(state.run_id, metrics=some), batch)
        state.metrics, state.latest, state.mark = after, latest, mark
        state.save()
        batch.clear()

    curves.seek(after)
    for line in spool.lines(curves):
        row = spool.row_of(line)
        stamp = int(row.get("time") or 0)
        if stamp >= again:
            points = _points(row, stamp)
            if batch and len(batch) + len(points) > 1000:
                flush()
            batch += points[:1000]
        after, latest, mark = after + len(line), max(latest, stamp), spool.mark_of(line)
    if after != state.metrics:
        flush()


def _points(row: dict[str, Any], stamp: int) -> list[Any]:
    from mlflow.entities import Metric

    values = row.get("metrics")
    return [
        Metric(metric_name(str(k)), float(v), stamp, int(row.get("step") or 0))
        for k, v in (values.items() if isinstance(values, dict) else ())
        if isinstance(v, (int, float))
    ]


def _forward_row(client: Any, state: spool.State, row: dict[str, Any]) -> None:
    from mlflow.entities import Param, RunTag

    if "params" in row:
        for some in _chunks([Param(k, v) for k, v in row["params"].items()], 100):
            state.dropped += _sent(client, state, lambda x: client.log_batch(state.run_id, params=x), some)
    elif "tags" in row:
        for some in _chunks([RunTag(k, v) for k, v in row["tags"].items()], 100):
            state.dropped += _sent(client, state, lambda x: client.log_batch(state.run_id, tags=x), some)
    elif "text" in row:
        name, content = row["text"]
        state.dropped += _sent(client, state, lambda _: client.log_text(state.run_id, content, name), [name])
    elif "artifact" in row:
        path, folder = row["artifact"]
        if Path(path).is_dir():
            state.dropped += _sent(
                client, state, lambda _: client.log_artifacts(state.run_id, path, folder or None), [path]
            )
        elif Path(path).exists():
            state.dropped += _sent(
                client, state, lambda _: client.log_artifact(state.run_id, path, folder or None), [path]
            )
        else:
            state.dropped += 1
    elif "status" in row:
        client.update_run(state.run_id, status=row["status"])
    elif "end" in row:
        client.set_terminated(state.run_id, *row["end"])
        state.ended = True


class Sender(threading.Thread):
    """Sends one stage's spool every SEND_EVERY seconds; waits an outage out."""

    def __init__(self, connect: Callable[[], tuple[Any, str]], state: spool.State) -> None:
        """`connect` gives the client and the experiment, and raises as long as it cannot."""
        super().__init__(name="mmlm-tracking", daemon=True)
        self.connect, self.state = connect, state
        self.stopping, self.deadline = threading.Event(), float("inf")

    def run(self) -> None:
        warned = False
        while True:
            last = self.stopping.wait(SEND_EVERY)
            try:
                forward(*self.connect(), self.state)
                if last:
                    return
            except Exception as error:
                if not warned:
                    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    _log.warning(
                        "the tracking server does not take the figures (%s); they are kept and sent later", first[:160]
                    )
                    warned = True
                if last and time.monotonic() > self.deadline:
                    return
                if last:
                    time.sleep(0.5)

    def finish(self, seconds: float = DRAIN_SECONDS) -> None:
        self.deadline = time.monotonic() + seconds
        self.stopping.set()
        self.join(seconds + 0.5)


def sending(state: spool.State) -> bool:
    """Whether a thread of this process still sends that spool: one that a slow server has kept over the end."""
    return any(isinstance(t, Sender) and t.state.path == state.path for t in threading.enumerate())
