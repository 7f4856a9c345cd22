"""`mmlm tune`: a search for better settings of a story's training, its trials side by side on Ray.

    mmlm tune STORY --search 'train.optimizer.lr=log(1e-4,1e-2)' --search 'train.model.width=[64,128]' --trials 8

Trial N is a pure function of the search and N. Each is a training in a folder of its own, and a child run of the search
in MLflow. A search that was stopped goes on from those folders; a trial that fails is reported and the others go on.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from mmlm import artifacts
from mmlm import tracking_store as store
from mmlm.artifacts import Artifact
from mmlm.config import Config, apply_override, leaves, parse, read_yaml, resolved
from mmlm.data.files import address, folder_of
from mmlm.errors import ConfigError, Interrupted, LaunchError, MmlmError
from mmlm.storage import sha256_json, write_bytes, write_json
from mmlm.tracking import Run, Tracker
from mmlm.train.config import TrainConfig
from mmlm.world import cores

RECIPE = 2
TRACKING = "MLFLOW_TRACKING_URI"
"""How a trial is told the tracking store, whose address may hold a password: never by a file."""
FOLDER = "search"
"""The noun's folder below `--out`."""
SPACES = "log(low,high), uniform(low,high), int(low,high) or [a, b, c]"
_RANGE = re.compile(r"(log|uniform|int)\(\s*([^,]+),\s*([^,)]+)\)")


class TuneConfig(Config):
    """`tune.yaml` of a story, or the flags of `mmlm tune`."""

    search: Annotated[dict[str, str | list[Any]], Field(min_length=1)]
    """key of train.yaml → `log(1e-4,1e-2)`, `uniform(0,0.5)`, `int(1,8)`, or a list of choices."""
    trials: int = Field(16, ge=1)
    """Settings that are tried."""
    seed: int = Field(0, ge=0)
    """Of the settings that are drawn."""
    metric: str | None = None
    """A column of metrics.jsonl; by default `val/loss` where the story validates while training, else `loss`."""
    mode: Literal["min", "max"] = "min"
    grace: float = Field(0.2, gt=0, le=1)
    """Share of the steps before which no trial is stopped."""
    reduction: int = Field(3, ge=2)
    """Of how many trials that reach a rung one goes on (ASHA; Li et al. 2020); rungs are this many times apart."""

    @field_validator("search", mode="before")
    @classmethod
    def _written(cls, search: Any) -> Any:
        for key, space in search.items() if isinstance(search, dict) else ():
            if not isinstance(space, str | list):
                raise ValueError(f"{key} = {space}: wanted {SPACES}")
        return search

    @field_validator("search")
    @classmethod
    def _spaces(cls, search: dict[str, str | list[Any]]) -> dict[str, str | list[Any]]:
        for key, space in search.items():
            if not key.startswith("train."):
                raise ValueError(f"{key}: settings of training are searched, such as train.optimizer.lr")
            draw(space, random.Random(0), key)
        return search


def draw(space: str | list[Any], rng: random.Random, key: str = "") -> Any:
    """One value of a space. Raises ValueError when it is none."""
    if isinstance(space, list):
        if not space:
            raise ValueError(f"{key}: an empty list of choices")
        return rng.choice(space)
    found = _RANGE.fullmatch(space.strip())
    try:
        low, high = (float(found[2]), float(found[3])) if found else (1.0, 0.0)
    except ValueError:
        found = None
    if not found or not -math.inf < low < high < math.inf or (found[1] == "log" and low <= 0):
        raise ValueError(f"{key} = {space}: wanted {SPACES}")
    if found[1] == "int" and (first := math.ceil(low)) > (last := math.floor(high)):
        raise ValueError(f"{key} = {space}: no whole number lies there; wanted int(1,8), or uniform({low:g},{high:g})")
    if found[1] == "int":
        return rng.randint(first, last)
    if found[1] == "log":
        return float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}")
    return float(f"{rng.uniform(low, high):.4g}")


def settings_of(config: TuneConfig) -> list[dict[str, Any]]:
    """The settings of each trial, key → value; no two alike, so there are fewer where there are no more to choose."""
    drawn: list[dict[str, Any]] = []
    for number in range(config.trials):
        for attempt in range(100):
            settings = {
                key: draw(space, random.Random(f"{config.seed}/{number}/{attempt}/{key}"), key)
                for key, space in sorted(config.search.items())
            }
            if settings not in drawn:
                drawn.append(settings)
                break
    return drawn


@dataclasses.dataclass(frozen=True)
class Where:
    """Where a search runs. None of it changes its trials."""

    out: Path
    tracking_uri: str
    parallel: int
    ranks: int = 1
    gpu: bool = False
    inside_ray: bool = False
    """Whether trials go to the cluster that this process is a job of; else to a small one of our own."""

    @classmethod
    def choose(
        cls, out: Path, tracking_uri: str, parallel: int | None, ranks: int | None, *, inside_ray: bool = False
    ) -> Where:
        """Trials side by side: as many as asked for, or as the GPUs or cores suffice for with `ranks` each.

        Raises LaunchError for none, and for more ranks than there are GPUs: Ray would wait for them for ever.
        """
        from mmlm.launch.local import gpus

        here, each = gpus(), max(1, ranks or 1)
        if here and each > here and not inside_ray:
            raise LaunchError(f"{each} ranks", wanted=f"at most {here}, one per GPU", cure="give a smaller --ranks")
        parallel = parallel if parallel is not None else max(1, (here or cores()) // each)
        if parallel < 1:
            raise LaunchError(f"{parallel} trials at a time", wanted="at least 1")
        return cls(out, tracking_uri, parallel, each, here > 0, inside_ray)


def read(folder: Path, search: Sequence[str], **given: Any) -> TuneConfig:
    """The settings of `tune.yaml`, if there is one, with what the flags say over it."""
    path = folder / "tune.yaml"
    data: dict[str, Any] = (read_yaml(path) or {}) if path.is_file() else {}
    if search:
        data["search"] = {}
    for text in search:
        key, equals, space = text.partition("=")
        if not equals:
            raise ConfigError(f"--search {text}", wanted="KEY=SPACE, such as 'train.optimizer.lr=log(1e-4,1e-2)'")
        listed = space.strip().startswith("[")
        data["search"][key.strip()] = [_number(v) for v in yaml.safe_load(space)] if listed else space.strip()
    data |= {key: value for key, value in given.items() if value is not None}
    if not data.get("search"):
        raise ConfigError(
            "nothing to search", wanted="--search 'train.optimizer.lr=log(1e-4,1e-2)'", cure=f"or write {path}"
        )
    return parse(TuneConfig, data, "tune")


def _number(value: Any) -> Any:
    """YAML takes `3e-4` for a text, and only `3.0e-4` for a number."""
    with contextlib.suppress(TypeError, ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def tune(config: TuneConfig, written: Mapping[str, Any], shards: Artifact, where: Where, tracker: Tracker) -> Artifact:
    """ShardSet → Search: `results.json`, and `best.yaml` with the settings of the best trial.

    `written` is what `train.yaml` and `--set` say, without the defaults: those of another `kind` are others.

    Raises LaunchError when every trial failed, Interrupted when a time limit came first, ConfigError for a metric that
    training does not write.
    """
    from mmlm.launch import ray_tune
    from mmlm.train import metric_names

    out, base = where.out / FOLDER, parse(TrainConfig, copy.deepcopy(dict(written)), "train.yaml")
    every, refused = _trials(config, written)
    if config.metric:
        metric_names.require(config.metric, every.values(), shards.path)
    tried = sha256_json({str(number): resolved(trial) for number, trial in every.items()})
    work = artifacts.begin(
        out, "search", recipe=RECIPE, config=config, parents={"shards": shards},
        extra={"train": resolved(base), "tried": tried},
    )  # fmt: skip
    if work.artifact:
        return work.artifact
    metric = config.metric or ("val/loss" if base.validation.every else "loss")
    objective = ray_tune.Objective(
        metric=metric, mode=config.mode, mean_of=1 if metric.startswith("val/") else 5, steps=base.steps,
        grace=max(1, int(base.steps * config.grace)), reduction=config.reduction,
    )  # fmt: skip
    with tracker.run("tune", config, work):
        plans = [_plan(number, every[number], shards, where, tracker) for number in sorted(every)]
        with _session(where):
            outcomes = ray_tune.search(
                plans,
                objective,
                parallel=where.parallel,
                ranks=where.ranks,
                gpu=where.gpu,
                storage=out / "ray",
                secrets={TRACKING: where.tracking_uri},
            )
        shutil.rmtree(out / "ray", ignore_errors=True)
        rows = _rows(config, outcomes, refused)
        if all(row["error"] for row in rows):
            raise LaunchError(f"all {len(rows)} trials failed; the first: {rows[0]['error']}", cure=f"see {out}/trials")
        if rows[0]["value"] is None:
            raise LaunchError(f"no trial had a {metric} that is a number", cure=f"see {out}/trials")
        best = rows[0]
        write_json(out / "results.json", {"metric": metric, "mode": config.mode, "trials": rows, "best": best["trial"]})
        write_bytes(out / "best.yaml", _override(best, metric).encode())
        counts = {
            "trials": len(rows), "finished": sum(r["state"] == "finished" for r in rows),
            "stopped": sum(r["state"] == "stopped" for r in rows), "failed": sum(r["state"] == "failed" for r in rows),
            "best_trial": best["trial"], "best": best["value"],
        }  # fmt: skip
        return work.finish(counts=counts, digest_of=("results.json", "best.yaml"))


def _sign(config: TuneConfig) -> int:
    return 1 if config.mode == "min" else -1


def _trials(config: TuneConfig, written: Mapping[str, Any]) -> tuple[dict[int, TrainConfig], dict[int, str]]:
    """The settings of every trial, and why some of them are none. Raises ConfigError when none is any good."""
    every: dict[int, TrainConfig] = {}
    refused: dict[int, str] = {}
    for number, settings in enumerate(settings_of(config)):
        data: dict[str, Any] = {"train": copy.deepcopy(dict(written))}
        try:
            for key, value in leaves(_nested(settings)):  # as `--set @best.yaml` will
                apply_override(data, key, json.dumps(value), {"train": TrainConfig})
            every[number] = parse(TrainConfig, data["train"], f"trial {number}")
        except ConfigError as error:
            refused[number] = error.found.removeprefix(f"trial {number}: ")
    if not every:
        raise ConfigError(refused[0])
    return every, refused


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as sections. Outer ones come first, and first of each its `kind` or `preset`, which decide what else
    there is."""
    data: dict[str, Any] = {}
    order = sorted(settings, key=lambda key: (key.count("."), key.rpartition(".")[2] not in ("kind", "preset"), key))
    for key in order:
        apply_override(data, key, json.dumps(settings[key]))
    return data


def _plan(number: int, config: TrainConfig, shards: Artifact, where: Where, tracker: Tracker) -> Any:
    from mmlm.launch.ray_tune import TrialPlan

    folder = where.out / FOLDER / "trials" / f"{number:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "number": number, "config": config.model_dump(mode="json"), "shards": address(shards.path), "digest": shards.digest,
        "out": str(folder),
        "ranks": where.ranks, "story": tracker.story, "parent": tracker.parent,
        "search_run": _search_run(where.out / FOLDER),
    }  # fmt: skip
    write_json(folder / "trial.json", told)
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    return TrialPlan(
        number=number, command=[sys.executable, "-m", "mmlm.tuning", str(folder / "trial.json")],
        environment={"PYTHONPATH": path, "OMP_NUM_THREADS": str(max(1, cores() // (where.parallel * where.ranks)))},
        rows=str(folder / "model" / "metrics.jsonl"),
        done=str(folder / "model" / artifacts.NAME), log=str(folder / "log.txt"), steps=config.steps,
    )  # fmt: skip


def _search_run(folder: Path) -> str | None:
    """The MLflow run of the search itself, whose children the trials are."""
    with contextlib.suppress(OSError, ValueError):
        run_id: str | None = json.loads((folder / artifacts.WORK).read_text(encoding="utf-8")).get("run_id")
        return run_id
    return None


def _rows(config: TuneConfig, outcomes: Sequence[Any], refused: dict[int, str]) -> list[dict[str, Any]]:
    """One row a trial, the best first, failures last."""
    settings = settings_of(config)
    rows = [
        {
            "trial": o.number, "settings": settings[o.number], "value": None if o.error else o.value,
            "step": o.step, "state": "failed" if o.error else "finished" if o.finished else "stopped",
            "seconds": round(o.seconds, 1), "error": o.error,
        }
        for o in outcomes
    ]  # fmt: skip
    for number, error in refused.items():
        rows.append({
            "trial": number, "settings": settings[number], "value": None, "step": 0, "state": "failed",
            "seconds": 0.0, "error": error,
        })  # fmt: skip
    return sorted(rows, key=lambda r: (r["value"] is None, (r["value"] or 0.0) * _sign(config), r["trial"]))


def _override(best: dict[str, Any], metric: str) -> str:
    """The best settings as YAML that `--set @FILE` takes."""
    head = f"# trial {best['trial']} of `mmlm tune`: {metric} {best['value']:.6g} at step {best['step']}\n"
    return head + yaml.safe_dump(_nested(best["settings"]), sort_keys=False, allow_unicode=True)


@contextlib.contextmanager
def _session(where: Where) -> Iterator[None]:
    """A Ray of this machine that leaves no process behind, or the cluster that this process belongs to."""
    from mmlm.launch import ray_tune
    from mmlm.shards import reaper

    if where.inside_ray:
        with ray_tune.connected():
            yield
        return
    folder, tag = Path(tempfile.mkdtemp(prefix=f"mmlm-ray-{os.getpid()}-", dir="/tmp")), uuid.uuid4().hex
    process = reaper.start(tag, folder)
    os.environ[reaper.TAG] = tag
    try:
        with ray_tune.connected(folder, where.parallel * where.ranks):
            yield
    finally:
        os.environ.pop(reaper.TAG, None)
        reaper.finish(process)


def words(found: dict[str, Any], out: Path) -> str:
    """The table of trials, for a terminal."""
    keys = list(found["trials"][0]["settings"])
    head = ["trial", *(key.removeprefix("train.") for key in keys), found["metric"], "steps", "seconds", "state"]
    body = [
        [str(r["trial"]), *(str(r["settings"][k]) for k in keys), "-" if r["value"] is None else f"{r['value']:.5g}",
         str(r["step"]), f"{r['seconds']:.0f}", r["state"] + (f": {r['error']}" if r["error"] else "")]
        for r in found["trials"]
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head) - 1)]
    lines = [
        "  " + "  ".join([*(c.rjust(w) for c, w in zip(row[:-1], widths, strict=True)), row[-1]])
        for row in [head, *body]
    ]
    best = out / FOLDER / "best.yaml"
    return "\n".join([*lines, f"the best settings: {best}   (mmlm train STORY --set @{best})"])


class _Child(Tracker):
    """The tracking of a trial: its run is a child of the search's, and named after the trial."""

    number = 0

    def _begin(self) -> None:
        """A trial needs no store to start: what it says is sent when one answers, if need be when the search ends."""
        try:
            store.probe(self.uri, timeout=2.0, tries=1)
            self.open()
        except (MmlmError, OSError) as error:
            print(f"tracking waits: {error}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def run(self, name: str, config: Any, work: Any) -> Iterator[Run]:
        with super().run(f"trial-{self.number:03d}", config, work) as run:
            run.tags({"trial": self.number})
            yield run


def _shards(told: dict[str, Any]) -> Artifact:
    """The set that the search was begun with. Raises ArtifactError when another one lies there now."""
    return artifacts.read(folder_of(told["shards"], told["digest"]), "shards")


def trial(told: dict[str, Any]) -> int:
    """One trial, in a process of its own."""
    from mmlm.launch import local
    from mmlm.train.train import train

    out = Path(told["out"])
    tracker = _Child(os.environ[TRACKING], told["story"], out)
    tracker.number, tracker.parent = told["number"], told["search_run"] or told["parent"]
    config = parse(TrainConfig, told["config"], "trial")
    try:
        train(
            config, _shards(told), out=out / "model", launch=local.ranks(told["ranks"]),
            tracker=tracker,
        )  # fmt: skip
    except MmlmError as error:
        print(f"mmlm: {error}", file=sys.stderr, flush=True)
        return Interrupted.exit_code if isinstance(error, Interrupted) else 2  # a lost trial failed, the others go on
    return 0


if __name__ == "__main__":
    from mmlm.launch.rank import die_with_parent
    from mmlm.world import apply_quiet_environment

    die_with_parent()
    apply_quiet_environment()
    sys.exit(trial(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
