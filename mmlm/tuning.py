"""`mmlm tune`: a search for better settings of a story's training and data, its trials side by side on Ray.

    mmlm tune STORY --search 'train.optimizer.lr=log(1e-4,1e-2)' --search 'train.model.width=[64,128]' --trials 8

Trial N is a pure function of the search and N. Each is a training in a folder of its own, and a child run of the search
in MLflow. A search that was stopped goes on from those folders; a trial that fails is reported and the others go on.
Where settings of `shard` or `scan` are searched, trials read shard sets of their own (`mmlm.search_data`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmlm import artifacts, search_data
from mmlm import story as stories
from mmlm import tracking_store as store
from mmlm.artifacts import Artifact, Work
from mmlm.config import identity, parse, resolved
from mmlm.data.files import address, folder_of
from mmlm.errors import Interrupted, LaunchError, MmlmError
from mmlm.search_space import SECTIONS, TrialSettings, TuneConfig, nested, searches_data, settings_of, trials_of
from mmlm.storage import sha256_json, write_bytes, write_json
from mmlm.story import Places, Story
from mmlm.tracking import Run, Tracker
from mmlm.train.config import TrainConfig
from mmlm.world import cores

RECIPE = 2
TRACKING = "MLFLOW_TRACKING_URI"
"""How a trial is told the tracking store, whose address may hold a password: never by a file."""
FOLDER = "search"
"""The noun's folder below `--out`."""


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


def tune(config: TuneConfig, story: Story, places: Places, where: Where) -> Artifact:
    """ShardSet → Search, or raw corpora → Search: `results.json`, and `best.yaml` with the settings of the best trial.

    Raises LaunchError when every trial failed, Interrupted when a time limit came first, ConfigError for a metric that
    training does not write or that says nothing between the trials.
    """
    from mmlm.train import metric_names

    out, tracker = where.out / FOLDER, places.tracker
    every, refused = trials_of(config, story.written)
    metric = config.metric or ("val/loss" if story.train.validation.every else "loss")
    sets, parents = None, dict[str, Artifact]()
    if searches_data(config):
        search_data.require_comparable(metric, every.values())
        sets = search_data.DataSets(story, places, out, lambda title, folder: _child(title, folder, places, out))
        made_of = _made_of_data(story, every, sets)
    else:
        parents = {"shards": stories.noun(places, "shard")}
        if config.metric:
            metric_names.require(config.metric, [trial.train for trial in every.values()], parents["shards"].path)
        tried = sha256_json({str(number): resolved(trial.train) for number, trial in every.items()})
        made_of = {"train": resolved(story.train), "tried": tried}
    work = artifacts.begin(out, "search", recipe=RECIPE, config=config, parents=parents, extra=made_of)
    if work.artifact:
        return work.artifact
    with tracker.run("tune", config, work):
        shards = _sets(config, metric, sets, every, refused) if sets else dict.fromkeys(every, parents["shards"])
        plans = [_plan(number, every[number], shards[number], where, tracker) for number in sorted(shards)]
        outcomes = _searched(plans, config, metric, story.train.steps, where) if plans else []
        rows = _rows(config, outcomes, refused)
        if sets:
            rows = [row | _read_by(row["trial"], shards, where) for row in rows]
        return _finish(work, config, metric, rows)


def _made_of_data(story: Story, every: Mapping[int, TrialSettings], sets: search_data.DataSets) -> dict[str, Any]:
    """What a search over settings of data is, beside its own settings: those of its trials, and the raw corpora."""
    tried = {
        str(number): {"train": resolved(t.train), "shard": identity(t.shard), "scan": identity(t.scan)}
        for number, t in every.items()
    }
    base = {section: resolved(getattr(story, section)) for section in SECTIONS}
    return {**base, "tried": sha256_json(tried), "corpora": sets.corpora(every.values())}


def _sets(
    config: TuneConfig,
    metric: str,
    sets: search_data.DataSets,
    every: Mapping[int, TrialSettings],
    refused: dict[int, str],
) -> dict[int, Artifact]:
    """number → the shard set of the trial. One that cannot be made puts its trials to those that are `refused`.

    Raises ConfigError at the first set where training on it will not write the metric.
    """
    from mmlm.train import metric_names

    shards: dict[int, Artifact] = {}
    for numbers, made in sets.make(every):
        if isinstance(made, str):
            refused |= dict.fromkeys(numbers, made)
            continue
        if config.metric and not shards:
            metric_names.require(config.metric, [trial.train for trial in every.values()], made.path)
        shards |= dict.fromkeys(numbers, made)
    search_data.tell_differences(shards.values(), metric, every.values())
    return shards


def _searched(plans: list[Any], config: TuneConfig, metric: str, steps: int, where: Where) -> list[Any]:
    """What came of the trials. `steps`: of the story's training."""
    from mmlm.launch import ray_tune

    objective = ray_tune.Objective(
        metric=metric, mode=config.mode, mean_of=1 if metric.startswith("val/") else 5, steps=steps,
        grace=max(1, int(steps * config.grace)), reduction=config.reduction,
    )  # fmt: skip
    storage = where.out / FOLDER / "ray"
    with _session(where):
        outcomes = ray_tune.search(
            plans, objective, parallel=where.parallel, ranks=where.ranks, gpu=where.gpu, storage=storage,
            secrets={TRACKING: where.tracking_uri},
        )  # fmt: skip
    shutil.rmtree(storage, ignore_errors=True)
    return outcomes


def _finish(work: Work, config: TuneConfig, metric: str, rows: list[dict[str, Any]]) -> Artifact:
    out, best = work.path, rows[0]
    if all(row["error"] for row in rows):
        raise LaunchError(f"all {len(rows)} trials failed; the first: {best['error']}", cure=f"see {out}/trials")
    if best["value"] is None:
        raise LaunchError(f"no trial had a {metric} that is a number", cure=f"see {out}/trials")
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


def _plan(number: int, trial: TrialSettings, shards: Artifact, where: Where, tracker: Tracker) -> Any:
    from mmlm.launch.ray_tune import TrialPlan

    folder = where.out / FOLDER / "trials" / f"{number:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "number": number, "config": trial.train.model_dump(mode="json"), "data": trial.of_data,
        "shards": address(shards.path), "digest": shards.digest, "out": str(folder),
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
        done=str(folder / "model" / artifacts.NAME), log=str(folder / "log.txt"), steps=trial.train.steps,
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


def _read_by(number: int, shards: Mapping[int, Artifact], where: Where) -> dict[str, str | None]:
    """The shard set of a trial, below the folder of the run."""
    return {"shards": str(shards[number].path.relative_to(where.out)) if number in shards else None}


def _override(best: dict[str, Any], metric: str) -> str:
    """The best settings as YAML that `--set @FILE` takes."""
    head = f"# trial {best['trial']} of `mmlm tune`: {metric} {best['value']:.6g} at step {best['step']}\n"
    return head + yaml.safe_dump(nested(best["settings"]), sort_keys=False, allow_unicode=True)


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
    return "\n".join([*lines, f"the best settings: {best}   ({_next(keys, best)})"])


def _next(keys: Sequence[str], best: Path) -> str:
    """The commands that take the best settings: of training alone, or of the data before."""
    first = min(list(SECTIONS).index(key.partition(".")[0]) for key in keys)
    if first == list(SECTIONS).index("train"):
        return f"mmlm train STORY --set @{best}"
    verbs = [f"mmlm {verb} STORY --set @{best} --replace" for verb in list(SECTIONS)[first:]]
    return f"{', then '.join(verbs)}; or all stages: mmlm run STORY --set @{best}"


class _Child(Tracker):
    """The tracking of a trial, or of the data of some: its run is a child of the search's, and named after it."""

    title = ""
    marks: Mapping[str, Any] = {}
    """Tags of the run."""
    told: Mapping[str, Any] = {}
    """Parameters that its own settings do not have."""

    def _begin(self) -> None:
        """A trial needs no store to start: what it says is sent when one answers, if need be when the search ends."""
        try:
            store.probe(self.uri, timeout=2.0, tries=1)
            self.open()
        except (MmlmError, OSError) as error:
            print(f"tracking waits: {error}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def run(self, name: str, config: Any, work: Any) -> Iterator[Run]:
        with super().run(self.title or name, config, work) as run:
            run.tags(self.marks)
            run.params(self.told)
            yield run


def _child(title: str, folder: Path, places: Places, search: Path) -> Tracker:
    """For the set of data in `folder`."""
    tracker = _Child(places.tracker.uri, places.tracker.story, folder)
    tracker.title, tracker.parent = title, _search_run(search) or places.tracker.parent
    return tracker


def _shards(told: dict[str, Any]) -> Artifact:
    """The set that the search was begun with. Raises ArtifactError when another one lies there now."""
    return artifacts.read(folder_of(told["shards"], told["digest"]), "shards")


def trial(told: dict[str, Any]) -> int:
    """One trial, in a process of its own."""
    from mmlm.launch import local
    from mmlm.train.train import train

    out = Path(told["out"])
    tracker = _Child(os.environ[TRACKING], told["story"], out)
    tracker.title, tracker.marks, tracker.told = f"trial-{told['number']:03d}", {"trial": told["number"]}, told["data"]
    tracker.parent = told["search_run"] or told["parent"]
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
