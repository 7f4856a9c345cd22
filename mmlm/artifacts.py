"""Nouns at rest. A noun is a folder whose `artifact.json` is written last.

    work = artifacts.begin(out, "shards", recipe=1, config=config, parents={"manifest": manifest})
    if work.artifact: return work.artifact          # the same fingerprint is already there: untouched
    ...                                             # write below work.path; what a killed run left is still there
    return work.finish(counts={...}, digest_of=["manifest.parquet"])

Fingerprint = kind + recipe version + config (without how it runs, and without later fields that have their default) + digests
of the parents (+ `extra`, such as the listing of a scan's sources). Digest = what the content is; two runs that made the same
bytes have the same digest, so what depends on them is not made again.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from mmlm import __version__
from mmlm.config import Config, identity, leaves, resolved
from mmlm.errors import ArtifactError
from mmlm.storage import sha256_file, sha256_json, temporaries, write_json

FORMAT = 1
"""Version of the layout of `artifact.json`. A newer one is refused."""
NAME = "artifact.json"
WORK = ".work.json"
_WORDS = {"shards": "shard set", "model_version": "registered model"}


@dataclass(frozen=True)
class Artifact:
    """A finished noun. `parents` maps the name of each upstream noun to its digest; `counts` are the stage's figures."""

    path: Path
    kind: str
    fingerprint: str
    digest: str
    recipe: int
    config: dict[str, Any]
    parents: dict[str, str]
    counts: dict[str, Any]
    seconds: float
    format: int = FORMAT
    run_id: str | None = None
    code_version: str = __version__
    created: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


class ArtifactConflict(ArtifactError):
    """The folder holds a noun, or unfinished work, of another fingerprint. `mmlm run` sets it aside and goes on."""

    def __init__(self, path: Path, present: str, wanted: str, differs: str = "") -> None:
        self.path, self.present, self.wanted_fingerprint, self.differs = path, present, wanted, differs
        super().__init__(
            f"{path} holds {present[:12]}, made from another config or other inputs{differs and f' ({differs})'}",
            wanted=wanted[:12],
            cure="choose another --out, or set it aside: `mmlm run` does, and every verb with --replace",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (ArtifactConflict, (self.path, self.present, self.wanted_fingerprint, self.differs))


def read(path: Path | str, kind: str | None = None) -> Artifact:
    """The noun in folder `path`. Raises ArtifactError when it is not there, not finished, newer, or not a `kind`."""
    path = Path(path)
    try:
        data = json.loads((path / NAME).read_text(encoding="utf-8"))
        found = Artifact(**{**data, "path": path})
    except (FileNotFoundError, NotADirectoryError):
        state = "is not there" if not path.exists() else "is unfinished" if (path / WORK).exists() else f"has no {NAME}"
        raise ArtifactError(
            f"{path} {state}",
            wanted=f"the finished {_WORDS.get(kind or '', kind or 'noun')}",
            cure="run the stage that makes it, or check the path",
        ) from None
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path / NAME} cannot be read ({error})", cure="make the noun again") from None
    if found.format > FORMAT:
        raise ArtifactError(
            f"{path} has format {found.format}", wanted=f"at most {FORMAT}", cure="update mmlm: a newer one wrote it"
        )
    if kind and found.kind != kind:
        here, wanted = (f"a {_WORDS.get(each, each)}" for each in (found.kind, kind))
        raise ArtifactError(f"{path} holds {here}", wanted=wanted, cure="check the path")
    return found


def begin(
    out: Path,
    kind: str,
    *,
    recipe: int,
    config: Config,
    parents: Mapping[str, Artifact] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Work:
    """Start, resume or find the noun `kind` in folder `out`. It may have been made, or begun, in another way
    (`Config.how_it_runs`).

    Raises ArtifactConflict when another one is there, ArtifactError when another process works on it.
    """
    lineage = {name: parent.digest for name, parent in (parents or {}).items()}
    plain = resolved(config)
    made_of = {"kind": kind, "recipe": recipe, "parents": lineage, "extra": extra or {}}
    wanted = sha256_json({**made_of, "config": identity(config)})
    work = Work(Path(out), kind, wanted, recipe, plain, lineage, dict(extra or {}))
    if (out / NAME).exists():
        found = read(out)
        if found.fingerprint != wanted or found.kind != kind:
            raise ArtifactConflict(out, found.fingerprint, wanted, _differs(asdict(found), work, config))
        _tidy_finished(out)
        work.artifact = found
        return work
    if (out / WORK).exists():
        try:
            started = json.loads((out / WORK).read_text(encoding="utf-8"))
        except ValueError:
            started = {"fingerprint": "unreadable"}
        if started.get("fingerprint") != wanted:
            raise ArtifactConflict(
                out, started.get("fingerprint", "unreadable"), wanted, _differs(started, work, config)
            )
        work.run_id = started.get("run_id")
    elif out.exists() and any(p.name != ".lock" and not p.name.endswith(".tmp") for p in out.iterdir()):
        raise ArtifactError(
            f"{out} is not empty and holds no {kind}", cure="choose another --out: nothing is overwritten"
        )
    out.mkdir(parents=True, exist_ok=True)
    work.lock()
    if (out / NAME).exists():  # another process finished it between our look and our lock
        work.release()
        return begin(out, kind, recipe=recipe, config=config, parents=parents, extra=extra)
    for path in temporaries(out):  # of a run that was killed while it wrote them; the lock keeps every other one away
        path.unlink(missing_ok=True)
    work.note()
    return work


def _differs(before: Mapping[str, Any], wanted: Work, config: Config) -> str:
    """In what a noun was made, or begun, of something else than `wanted`: settings, recipe, parents, the rest. "" where the
    note that was left does not say of what, as earlier versions noted the fingerprint only."""
    if "parents" not in before:
        return ""
    recipe, parents, extra = before["recipe"], before["parents"], before["extra"]
    told = _other_settings(before["config"], config)
    told += [f"recipe {recipe} → {wanted.recipe}"] if recipe != wanted.recipe else []
    told += [
        f"{name} {parents.get(name, 'none')[:12]} → {wanted.parents.get(name, 'none')[:12]}"
        for name in {**wanted.parents, **parents}
        if parents.get(name) != wanted.parents.get(name)
    ]
    for name, value in wanted.extra.items():  # beside it stands what came of the work
        there = extra.get(name)
        if isinstance(value, dict) and isinstance(there, dict):
            pairs = {key: (there.get(key, "none"), value.get(key, "none")) for key in sorted({*value, *there})}
            told += [f"{key} {str(a)[:40]} → {str(b)[:40]}" for key, (a, b) in pairs.items() if a != b]
        elif there != value:
            told.append(f"another {name}")
    return ", ".join([*told[:5], *(["…"] if told[5:] else [])])


def _other_settings(before: Mapping[str, Any], config: Config) -> list[str]:
    """`key before → now` of each setting that differs between the stored config `before` and `config`. One that was not there
    yet, and rests on its default now, does not differ; beside another `kind` the settings of the two are not told."""
    there, now, used = (dict(leaves(values)) for values in (before, resolved(config), identity(config)))
    keys = [key for key in {**now, **there} if key.split(".")[0] not in config.how_it_runs]
    pairs = {key: (there.get(key), now.get(key)) for key in keys if key in there or key in used}
    other = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    kinds = tuple(key.removesuffix("kind") for key in other if key.endswith(".kind"))
    told = [key for key in other if not key.startswith(kinds) or key.endswith(".kind")]
    return [f"{key} {_told(other[key][0])} → {_told(other[key][1])}" for key in told]


def _told(value: Any) -> str:
    return "none" if value is None else str(value)[:40]


def _tidy_finished(out: Path) -> None:
    """Remove what a run left that was killed after its last file, unless a process works there."""
    if not (out / WORK).exists():
        return
    try:
        lock = hold(out)
    except ArtifactError:
        return
    with lock:
        if (out / NAME).exists():  # nobody has reopened it since we looked
            (out / WORK).unlink(missing_ok=True)


def hold(folder: Path) -> TextIO:
    """Lock `folder` for this process until the file that is returned is closed, or the process ends in any way.

    Raises ArtifactError when another process holds it.
    """
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ArtifactError(
            f"another process is working on {folder}", cure="wait for it to end, or choose another --out"
        ) from None
    return lock


class Work:
    """A noun being made. `artifact` is set when there is nothing to do."""

    def __init__(
        self, path: Path, kind: str, fingerprint: str, recipe: int,
        config: dict[str, Any], parents: dict[str, str], extra: dict[str, Any],
    ) -> None:  # fmt: skip
        self.path, self.kind, self.fingerprint, self.recipe = path, kind, fingerprint, recipe
        self.config, self.parents, self.extra = config, parents, extra
        self.artifact: Artifact | None = None
        self.run_id: str | None = None
        self.started = time.time()
        self._lock: TextIO | None = None

    def lock(self) -> None:
        self._lock = hold(self.path)

    def reopen(self) -> None:
        """Make the finished noun that is here unfinished again; what its verb finds done stays done."""
        if self._lock is None:
            self.lock()
        self.run_id = self.artifact.run_id if self.artifact else None
        self.note()
        (self.path / NAME).unlink(missing_ok=True)
        self.artifact = None

    def note(self) -> None:
        """Record whose work this is, so that only the same config and inputs continue it."""
        made_of = {"recipe": self.recipe, "config": self.config, "parents": self.parents, "extra": self.extra}
        whose = {"fingerprint": self.fingerprint, "kind": self.kind, "run_id": self.run_id}
        write_json(self.path / WORK, {**whose, **made_of})

    def track(self, run_id: str | None) -> None:
        """Remember the MLflow run, so that a resumed stage continues the same one."""
        self.run_id = run_id
        self.note()

    def release(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    def finish(
        self, *, counts: Mapping[str, Any], digest_of: Iterable[str], extra: Mapping[str, Any] | None = None
    ) -> Artifact:
        """Write `artifact.json`, last. `digest_of` names the files (relative) whose bytes are the noun's content."""
        digest = sha256_json({name: sha256_file(self.path / name) for name in sorted(digest_of)})
        artifact = Artifact(
            path=self.path, kind=self.kind, fingerprint=self.fingerprint, digest=digest, recipe=self.recipe,
            config=self.config, parents=self.parents, counts=dict(counts), seconds=round(time.time() - self.started, 3),
            run_id=self.run_id, created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            extra={**self.extra, **(extra or {})},
        )  # fmt: skip
        row = asdict(artifact)
        del row["path"]
        write_json(self.path / NAME, row)
        (self.path / WORK).unlink(missing_ok=True)
        self.release()
        return artifact


def predecessor(path: Path) -> Artifact | None:
    """The finished noun that lay at `path` most recently and was set aside; None when there is none."""
    found = []
    for folder in (path.parent / ".aside").glob(f"{path.name}-*"):
        try:
            found.append(read(folder))
        except ArtifactError:  # set aside unfinished
            continue
    return max(found, key=lambda artifact: (artifact.created, artifact.fingerprint), default=None)


def set_aside(path: Path, wanted: str) -> Path:
    """Move what `path` holds to `.aside/<noun>-<fingerprint>`; take the noun or work of `wanted` back if it lies there.

    Returns where it is now.
    """
    hold(path).close()  # a folder that another process works on stays where it is
    shelf = path.parent / ".aside"
    present = "unknown"
    for name in (NAME, WORK):
        if (path / name).exists():
            try:
                present = json.loads((path / name).read_text(encoding="utf-8"))["fingerprint"]
            except (ValueError, KeyError):
                present = f"unreadable-{int(time.time())}"
            break
    shelf.mkdir(exist_ok=True)
    target = shelf / f"{path.name}-{present[:16]}"
    if target.exists():
        shutil.rmtree(target)
    os.rename(path, target)
    wanted_back = shelf / f"{path.name}-{wanted[:16]}"
    if wanted_back.exists():
        os.rename(wanted_back, path)
    return target
