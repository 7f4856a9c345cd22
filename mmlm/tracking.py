"""MLflow, which remembers every run: one parent run per `mmlm run`, one nested run per stage.

    with Tracker.start(uri, story="demo", out=out) as tracker:
        with tracker.run("train", config, work) as run:
            run.metrics({"loss": 0.1}, step=7)

Tracking must start, but can never kill or slow the work: what a stage says goes to files (`mmlm.spool`), a thread
sends them, an outage is waited out, and what is left over is sent at the next start. MLflow is imported only when
the first stage begins.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from mmlm import __version__, spool
from mmlm import tracking_store as store
from mmlm.config import Config, blank_credentials, identity, resolved
from mmlm.errors import Interrupted, LaunchError, MmlmError

PARENT = "mlflow.parentRunId"
NOTES = ".tracking-parent*.json"
"""Below `out`: the parent runs that have not been ended."""
_log = logging.getLogger("mmlm.tracking")


class Workplace(Protocol):
    """What tracking needs of `artifacts.Work`."""

    path: Path
    fingerprint: str
    recipe: int
    config: dict[str, Any]
    parents: dict[str, str]
    run_id: str | None

    def track(self, run_id: str | None) -> None: ...


def _process() -> dict[str, str]:
    """Tags that say who makes a run; the reaper reads them, and MLflow's page shows the last two."""
    me = {"mmlm.host": socket.gethostname(), "mmlm.pid": str(os.getpid()), "mmlm.pid_start": _started(os.getpid())}
    with contextlib.suppress(Exception):  # no name for this user id, as in some containers
        me["mlflow.user"] = getpass.getuser()
    return {**me, "mlflow.source.name": "mmlm", "mlflow.source.type": "LOCAL"}


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot; "" when there is no such process (or no /proc)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


def _dead(tags: Mapping[str, str]) -> bool:
    """Whether the process that a run's tags name ran on this host and is gone."""
    if tags.get("mmlm.host") != socket.gethostname() or not tags.get("mmlm.pid", "").isdigit():
        return False
    if Path("/proc/self/stat").exists():
        return _started(int(tags["mmlm.pid"])) != tags.get("mmlm.pid_start")
    try:
        os.kill(int(tags["mmlm.pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _held(folder: Path) -> bool:
    """Whether a process, on whatever host, holds the lock of a noun's folder (`artifacts.hold`): it is being made."""
    try:
        with (folder / ".lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _left_alone(state: spool.State) -> bool:
    """Whether nobody writes to a spool or sends it any more."""
    other = state.tags.get("mmlm.pid") != str(os.getpid()) and state.tags.get("mmlm.host") == socket.gethostname()
    draining = (other and not _dead(state.tags)) or store.sending(state)
    return not draining and not _held(state.path.parent)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` → `{"a.b": "1"}`, values at most 500 characters long."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, name + ".")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            flat[store.metric_name(name)] = text if len(text) <= 500 else text[:499] + "…"
    return flat


def _status(error: BaseException | None) -> str:
    if error is None:
        return "FINISHED"
    stopped = isinstance(error, Interrupted) or not isinstance(error, Exception)  # Ctrl-C, exit, Dagster's end of a run
    return "KILLED" if stopped else "FAILED"


class Run:
    """The run of one stage. Every method only writes to the spool and never raises for what tracking lacks."""

    def __init__(self, folder: Path, state: spool.State) -> None:
        self.folder, self.state = folder, state
        self._noun = False
        self._named: set[str] = set()

    @property
    def run_id(self) -> str | None:
        """The MLflow run; None as long as an outage keeps it from being created."""
        return self.state.run_id

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        numbers = {}
        for key, value in values.items():
            with contextlib.suppress(TypeError, ValueError):
                numbers[store.metric_name(str(key))] = float(value)
        if numbers:
            self._named |= set(numbers)
            with contextlib.suppress(OSError):
                spool.append_metrics(self.folder, numbers, step)

    def params(self, values: Mapping[str, Any]) -> None:
        self._say({"params": flatten(values)})

    def tags(self, values: Mapping[str, Any]) -> None:
        self._say({"tags": {store.metric_name(str(k)): str(v)[:4900] for k, v in values.items()}})

    def text(self, name: str, content: str) -> None:
        """Keep `content` as the artifact `name`."""
        self._say({"text": [name, content]})

    def artifact(self, path: Path | str, folder: str = "") -> None:
        """Keep a file, or a folder with all in it, below `folder` of the run's artifacts."""
        self._say({"artifact": [str(Path(path).absolute()), folder]})

    def noun(self, artifact: Any) -> None:
        """What the stage made: digest and lineage as tags, counts as metrics, `artifact.json` itself.

        Called by itself at the end of a run whose work folder then holds a finished noun.
        """
        self._noun = True
        row = artifact if isinstance(artifact, Mapping) else vars(artifact)
        self.tags({"digest": row["digest"], "kind": row["kind"], "mmlm.code_version": row["code_version"]})
        counts = {k: v for k, v in row["counts"].items() if isinstance(v, (int, float)) and k not in self._named}
        # MLflow's page draws what stands before a slash as a section of its own, so that curves come first
        self.metrics({**{f"counts/{k}": v for k, v in counts.items()}, "counts/seconds": row["seconds"]})
        self.artifact(self.folder / "artifact.json")

    def end(self, error: BaseException | None) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if error is None and not self._noun and (self.folder / "artifact.json").exists():
                self.noun(json.loads((self.folder / "artifact.json").read_text(encoding="utf-8")))
        if error is not None:
            self.tags({"error": f"{type(error).__name__}: {error}"})
        self._say({"end": [_status(error), spool.now()]})

    def _say(self, row: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, TypeError, ValueError):
            spool.append(self.folder / spool.ROWS, row)


class NullRun:
    """A run that nobody remembers."""

    run_id: str | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None: ...
    def params(self, values: Mapping[str, Any]) -> None: ...
    def tags(self, values: Mapping[str, Any]) -> None: ...
    def text(self, name: str, content: str) -> None: ...
    def artifact(self, path: Path | str, folder: str = "") -> None: ...
    def noun(self, artifact: Any) -> None: ...


class NullTracker:
    """For tests and for verbs that run alone without tracking."""

    uri = ""

    @contextlib.contextmanager
    def run(self, name: str, config: Config | Mapping[str, Any], work: Workplace) -> Iterator[Run | NullRun]:
        yield NullRun(work.path)

    def close(self, error: BaseException | None = None) -> None: ...


class Tracker:
    """The tracking of one process: `run` for every stage, `close` at the end."""

    def __init__(self, uri: str, story: str, out: Path) -> None:
        self.uri, self.story, self.out = uri, story, Path(out).absolute()
        self.parent: str | None = None
        """The parent run's id, once the first stage has begun."""
        self._client: Any = None
        self._experiment = ""
        self._figures: dict[str, float] = {}
        """What the parent run shows: seconds of each stage, and the headline of the report."""
        self._key = hashlib.sha256(uri.encode()).hexdigest()[:16]
        self._note: TextIO | None = None
        """Says which parent run is ours; locked for as long as this process lives, so that others see when it is dead."""

    @classmethod
    def start(cls, uri: str | None, *, story: str, out: Path) -> Tracker:
        """Raises LaunchError, within 15 s, when the tracking server does not answer; unless a stage below `out` goes on that
        it knows already: then an outage is waited out, as any other."""
        tracker = cls(store.absolute(uri or store.default_uri()), story, out)
        try:
            store.probe(tracker.uri)
            if any(tracker.out.glob(NOTES)) or tracker._waiting():
                tracker.open()
        except LaunchError as error:
            if not tracker._goes_on(error):
                raise
        return tracker

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)

    def open(self) -> Any:
        """The MLflow client, with the story's experiment made, dead runs closed and leftovers sent."""
        if self._client is not None:
            return self._client
        client = store.open_client(self.uri)
        try:
            self._experiment = store.experiment(client, self.uri, self.story)
        except OSError:
            raise
        except Exception as error:
            raise LaunchError(
                f"the tracking store {blank_credentials(self.uri)} refuses: {str(error).splitlines()[0][:200]}",
                cure="check --tracking-uri and the rights of its user",
            ) from None
        self._client = client
        with contextlib.suppress(Exception):
            self.replay()
            self.reap()
        return client

    def _waiting(self) -> list[spool.State]:
        """Spools below `out`, those of a search's trials and data too, that nobody works on, with lines left or no end."""
        nouns = ("", "*/", ".aside/*/", "*/trials/*/model/", ".aside/*/trials/*/model/", "search/data/*/*/")
        places = [path for noun in nouns for path in self.out.glob(f"{noun}{spool.STATE}")]
        states = [s for p in places if (s := spool.State.load(p.parent)) is not None]
        open_ones = [s for s in states if s.uri == self._key and (s.waiting or (s.run_id and not s.ended))]
        return [s for s in open_ones if _left_alone(s)]

    def replay(self) -> None:
        """Send what an earlier process could not, and end the runs of processes that are gone. Raises on an outage."""
        for state in self._waiting():
            with self._unless_rejected(state):
                store.forward(self._client, self._experiment, state)
                if not state.ended:
                    done = (state.path.parent / "artifact.json").exists()
                    self._client.set_terminated(state.run_id, "FINISHED" if done else "KILLED")
            if not state.ended:
                state.ended = True
                state.save()
        for path in self.out.glob(NOTES):
            with contextlib.suppress(OSError, ValueError, KeyError), path.open("r+") as note:
                fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else its process lives, wherever that is
                left = json.load(note)
                if left["uri"] == self._key:
                    with self._unless_rejected(left["parent"]):
                        ended = left["time"] if left["status"] else spool.now()
                        self._client.set_terminated(left["parent"], left["status"] or "KILLED", ended)
                    path.unlink()

    @contextlib.contextmanager
    def _unless_rejected(self, run: spool.State | str) -> Iterator[None]:
        """Passes over what no repetition will mend, as a run that was deleted; an outage raises."""
        try:
            yield
        except Exception as error:
            if not store.is_final(self._client, run if isinstance(run, str) else run.run_id, error):
                raise

    def reap(self) -> int:
        """Set runs whose process died on this host to KILLED; returns how many."""
        found = self._client.search_runs([self._experiment], "attributes.status = 'RUNNING'", max_results=1000)
        dead = [r.info.run_id for r in found if _dead(r.data.tags)]
        for run_id in dead:
            self._client.set_terminated(run_id, "KILLED")
        return len(dead)

    def _connected(self) -> tuple[Any, str]:
        """The client and the experiment, for the thread that sends."""
        return self.open(), self._experiment

    def _begin(self) -> None:
        """The parent run, at the first stage."""
        if self.parent is not None:
            return
        try:
            client = self.open()
            tags = {"story": self.story, "out": str(self.out), "mmlm.code_version": __version__, **_process()}
            try:
                self.parent = client.create_run(self._experiment, tags=tags, run_name=self.story).info.run_id
            except Exception as error:
                raise LaunchError(
                    f"the tracking store {blank_credentials(self.uri)} takes no new run: {str(error)[:200]}",
                    cure="check --tracking-uri and the rights of its user",
                ) from None
        except LaunchError as error:
            if not self._goes_on(error):
                raise
        else:
            self._remember(None)

    def _goes_on(self, outage: LaunchError) -> bool:
        """Whether a stage below `out` was begun with this store and is not finished. Its parent run is ours then, and what
        is said is sent when the store answers: a job that is put back into the queue must not end of an outage."""
        states = [s for p in self.out.glob(f"*/{spool.STATE}") if (s := spool.State.load(p.parent)) is not None]
        begun = [s for s in states if s.uri == self._key and s.run_id and PARENT in s.tags]
        begun = [s for s in begun if not (s.path.parent / "artifact.json").exists() and not _held(s.path.parent)]
        if not begun:
            return False
        self.parent = max(begun, key=lambda s: s.started).tags[PARENT]
        self._remember(None)
        _log.warning("%s; what goes on here is kept and sent later", outage.found)
        return True

    def _remember(self, status: str | None) -> None:
        row = {"uri": self._key, "parent": self.parent, "status": status, "time": spool.now()}
        with contextlib.suppress(OSError):
            self.out.mkdir(parents=True, exist_ok=True)
            if self._note is None:
                self._note = (self.out / f".tracking-parent-{self.parent}.json").open("w", encoding="utf-8")
                fcntl.flock(self._note, fcntl.LOCK_EX)
            self._note.seek(0)
            self._note.write(json.dumps(row))
            self._note.truncate()
            self._note.flush()

    @contextlib.contextmanager
    def run(self, name: str, config: Config | Mapping[str, Any], work: Workplace) -> Iterator[Run]:
        """The nested run of stage `name`; a resumed stage goes on with its own. Errors pass through."""
        self._begin()
        tags = {PARENT: str(self.parent), "stage": name, "fingerprint": work.fingerprint, "recipe": str(work.recipe)}
        tags |= {f"parent.{k}": v for k, v in work.parents.items()}
        tags |= {"story": self.story, "out": str(work.path), "mmlm.code_version": __version__, **_process()}
        before = self._resume(work, tags)
        state = before or spool.State(self._key, name, tags, spool.now(), path=work.path / spool.STATE)
        if state.run_id is None:
            (work.path / spool.ROWS).unlink(missing_ok=True)  # of an attempt that this store does not know
            with contextlib.suppress(Exception):  # an outage: the sender creates it later
                created = self._client.create_run(self._experiment, state.started, tags, name)
                state.run_id = created.info.run_id
        state.save()
        work.track(state.run_id)
        run, sender = Run(work.path, state), store.Sender(self._connected, state)
        params = flatten(resolved(config) if isinstance(config, Config) else config)
        if before and isinstance(config, Config):
            # A parameter cannot be changed. How it runs, and where pretrained weights lie, which is no part of what the
            # noun is, may be another than when the run began.
            same = flatten(work.config)
            params = {key: value for key, value in flatten(identity(config)).items() if same.get(key) == value}
        run.params(params)
        sender.start()
        try:
            yield run
        except BaseException as error:
            run.end(error)
            raise
        else:
            run.end(None)
        finally:
            sender.finish()
            self._figures |= _figures(name, work.path / "artifact.json")
            if state.dropped:
                _log.warning("MLflow refused %d values of %s", state.dropped, name)

    def _resume(self, work: Workplace, tags: dict[str, str]) -> spool.State | None:
        """The spool of an earlier, killed attempt at the same work, its run set going again under this parent."""
        state = spool.State.load(work.path)
        if state is None or state.uri != self._key or state.run_id is None or state.run_id != work.run_id:
            return None
        try:
            self._client.update_run(state.run_id, status="RUNNING")
            for key, value in tags.items():
                self._client.set_tag(state.run_id, key, value)
        except Exception as error:
            if store.is_final(self._client, state.run_id, error):  # deleted in the meantime: a new one
                return None
            spool.append(work.path / spool.ROWS, {"tags": tags})
            spool.append(work.path / spool.ROWS, {"status": "RUNNING"})
        state.tags, state.ended = tags, False
        return state

    def close(self, error: BaseException | None = None) -> None:
        """End the parent run: FINISHED, FAILED with the error's text, or KILLED on an interrupt. Never raises."""
        if self.parent is None:
            return
        self._remember(_status(error))
        try:
            if self._client is None:
                store.probe(self.uri, timeout=2.0, tries=1)  # MLflow itself would ask a frozen server for a minute
            client = self.open()
            for name, value in self._figures.items():
                client.log_metric(self.parent, name, value)
            if error is not None:
                text = f"{type(error).__name__}: {error}" if not isinstance(error, MmlmError) else str(error)
                client.set_tag(self.parent, "error", text[:4900])
            client.set_terminated(self.parent, _status(error))
            if self._note is not None:
                Path(self._note.name).unlink(missing_ok=True)
            self.replay()  # what an outage in between has left
        except Exception as problem:
            _log.warning("the parent run stays open until the next start (%s)", str(problem).splitlines()[0][:160])
        if self._note is not None:
            self._note.close()
        self.parent = self._note = None


def _figures(stage: str, path: Path) -> dict[str, float]:
    """The few figures of a finished stage that stand for it in the parent run."""
    figures: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        row = json.loads(path.read_text(encoding="utf-8"))
        figures[f"seconds/{stage}"] = float(row["seconds"])
        for model, tasks in row["extra"].get("headline", {}).items():
            for task, score in tasks.items():
                figures[store.metric_name(f"{task} {score['metric']}/{model}")] = float(score["value"])
    return figures
