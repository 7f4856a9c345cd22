"""A story: the configs of all stages, where they lie, and how they run one after the other.

A story is a folder with `story.yaml` and one YAML per verb. Built-in ones travel in the package; `mmlm new` writes
others. What a run is stands in those files; where it runs (`Places`) is an argument and never part of its identity.
"""

from __future__ import annotations

import difflib
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from mmlm import artifacts
from mmlm.artifacts import Artifact, ArtifactConflict
from mmlm.compress.config import DistillConfig
from mmlm.config import Config, apply_override, leaves, parse, read_yaml, resolved, split_override
from mmlm.corpus.config import ScanConfig
from mmlm.errors import ConfigError
from mmlm.evals.config import EvaluateConfig
from mmlm.progress import tell
from mmlm.publish.config import RegisterConfig
from mmlm.shards.config import ShardConfig
from mmlm.storage import is_remote
from mmlm.train.config import TrainConfig


class AboutConfig(Config):
    """`story.yaml`."""

    name: str = Field(pattern=r"^[^/:@?#%\\\s]+$")
    """Names the registered model: `mmlm-<name>`."""
    about: str = ""
    """One sentence for people."""
    data: str | None = None
    """Where the raw corpora lie unless `--data` says otherwise; relative to this file's folder. Not part of identity."""


VERBS: dict[str, type[Config]] = {
    "scan": ScanConfig,
    "shard": ShardConfig,
    "train": TrainConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "register": RegisterConfig,
}
NOUNS = {
    "scan": "manifest",
    "shard": "shards",
    "train": "model",
    "distill": "student",
    "evaluate": "report",
    "register": "registered",
}
"""verb → the folder of its noun below `--out`."""
KINDS = {
    "scan": "manifest",
    "shard": "shards",
    "train": "checkpoint",
    "distill": "checkpoint",
    "evaluate": "report",
    "register": "model_version",
}


@dataclass(frozen=True)
class Story:
    name: str
    folder: Path
    about: AboutConfig
    scan: ScanConfig
    shard: ShardConfig
    train: TrainConfig
    distill: DistillConfig | None
    evaluate: EvaluateConfig
    register: RegisterConfig
    written: dict[str, Any]
    """verb → what the files and overrides say, without defaults; changed again, those are of the `kind` then."""

    @property
    def verbs(self) -> list[str]:
        return [verb for verb in VERBS if getattr(self, verb) is not None]


@dataclass(frozen=True)
class Places:
    """Where a run happens. None of it changes what comes out."""

    out: Path
    data: Path | str
    launch: Callable[..., None]
    tracker: Any
    tracking_uri: str | None = None
    workers: int | None = None
    ray_address: str | None = None
    shards: str | None = None
    """A shard set, published or in a folder, to read instead of the one below `out`."""
    manifest: Path | None = None
    """A manifest to read instead of the one below `out`."""
    retry: str | None = None
    """Reason for which samples were lost that `shard` tries again."""


@dataclass
class Stage:
    """One verb of a finished run."""

    name: str
    artifact: Artifact
    skipped: bool
    seconds: float
    extra: dict[str, Artifact] = field(default_factory=dict)


def library() -> Path:
    """The folder of the built-in stories: in a wheel inside the package, in a checkout a link to `jobs/configs`."""
    return (Path(__file__).parent / "stories").resolve()


def built_in() -> list[str]:
    return sorted(p.parent.name for p in library().glob("*/story.yaml"))


def find(name: str) -> Path:
    """The folder of a story given by name or path. Raises ConfigError with a did-you-mean."""
    for folder in (Path(name), library() / name):
        if (folder / "story.yaml").is_file():
            return folder
    if Path(name).is_dir():
        raise ConfigError(
            f"{name} has no story.yaml", wanted="a story's folder", cure="`mmlm new DIR --data YOURS` writes one"
        )
    close = difflib.get_close_matches(name, built_in(), 1, 0.5)
    hint = f"did you mean `{close[0]}`?" if close else "`mmlm new DIR --data YOURS` writes one"
    raise ConfigError(f"there is no story {name!r}", wanted=f"a folder, or one of {', '.join(built_in())}", cure=hint)


def load(name: str, overrides: list[str] | None = None) -> Story:
    """The story `name` (built-in, or a folder), with `verb.key=value` overrides. All problems of a file at once.

    An override `@FILE` stands for all that a YAML file of the form `verb: {key: value}` says.
    """
    folder = find(name)
    raw: dict[str, Any] = {}
    for part in ("story", *VERBS):
        if (folder / f"{part}.yaml").is_file():
            raw[part] = read_yaml(folder / f"{part}.yaml") or {}
        elif part != "distill":
            raise ConfigError(
                f"{folder} has no {part}.yaml", cure=f"copy one from a built-in story: {library() / 'demo'}"
            )
    for override in _spelled_out(overrides or []):
        key, value = split_override(override)
        verb = key.split(".")[0]
        if verb in VERBS and "." not in key:
            raise ConfigError(
                f"--set {override}: `{verb}` is a stage, not a setting", wanted="STAGE.key=value, such as train.seed=1"
            )
        if verb not in VERBS:
            close = difflib.get_close_matches(verb, VERBS, 1, 0.5)
            hint = f", did you mean `{close[0]}`?" if close else ""
            raise ConfigError(
                f"--set {override}: no stage `{verb}`{hint}", wanted="STAGE.key=value, such as train.seed=1"
            )
        if verb not in raw:
            raise ConfigError(f"--set {override}: this story has no {verb}.yaml")
        apply_override(raw, key, value, VERBS)
    about = parse(AboutConfig, raw["story"], str(folder / "story.yaml"))
    configs: dict[str, Any] = {}
    problems = []
    for verb, kind in VERBS.items():
        try:
            configs[verb] = parse(kind, raw[verb], f"{verb}.yaml") if verb in raw else None
        except ConfigError as error:
            problems.append(error.found)
    if problems:
        raise ConfigError(f"{folder.name}: " + " · ".join(problems), cure=f"the comments in {library()} name every key")
    return Story(about.name, folder, about, **configs, written=raw)


def _spelled_out(overrides: list[str]) -> Iterator[str]:
    for override in overrides:
        if not override.startswith("@"):
            yield override
            continue
        found = read_yaml(Path(override[1:]))
        if not isinstance(found, dict):
            raise ConfigError(f"--set {override} holds {type(found).__name__}", wanted="stages with their keys")
        yield from (f"{key}={json.dumps(value)}" for key, value in leaves(found))


def data_folder(story: Story, given: Path | str | None, out: Path) -> Path | str:
    """Where the raw corpora lie: `--data`, else what the story remembers, else `<out>/raw` (built-in corpora are made
    there). A folder, or an address as text."""
    for folder, where in ((Path(), given), (story.folder, story.about.data)):
        if where:
            return str(where) if is_remote(str(where)) else (folder / where).resolve()
    return (out / "raw").resolve()


def noun(places: Places, verb: str) -> Artifact:
    """The finished noun that `verb` made below `--out`. Raises ArtifactError naming the stage to run first."""
    if verb == "shard" and places.shards:
        from mmlm.data.files import open_files

        return artifacts.read(open_files(places.shards).folder, KINDS[verb])
    if verb == "scan" and places.manifest:
        return artifacts.read(places.manifest, KINDS[verb])
    return artifacts.read(places.out / NOUNS[verb], KINDS[verb])


def perform(story: Story, verb: str, places: Places) -> tuple[Artifact, dict[str, Artifact]]:
    """Run one verb on the nouns that lie below `places.out`. The second value holds side results (student-scratch)."""
    out = places.out / NOUNS[verb]
    extra: dict[str, Artifact] = {}
    if verb == "scan":
        from mmlm.corpus.scan import scan

        earlier = artifacts.predecessor(out)
        made = scan(
            story.scan, data=places.data, out=out, tracker=places.tracker,
            earlier=earlier if earlier and earlier.config == resolved(story.scan) else None,
        )  # fmt: skip
    elif verb == "shard":
        from mmlm.shards.shard import shard

        made = shard(
            story.shard, noun(places, "scan"), data=places.data, out=out, workers=places.workers, tracker=places.tracker,
            ray_address=places.ray_address, earlier=artifacts.predecessor(out), retry=places.retry,
        )  # fmt: skip
    elif verb == "train":
        from mmlm.train.train import train

        made = train(story.train, noun(places, "shard"), out=out, launch=places.launch, tracker=places.tracker)
    elif verb == "distill":
        made, extra = _distill(story, places, out)
    elif verb == "evaluate":
        from mmlm.evals.evaluate import evaluate

        made = evaluate(
            story.evaluate, noun(places, "shard"), dict(checkpoints(story, places)), out=out, tracker=places.tracker,
            story=story.name,
        )  # fmt: skip
    else:
        made = _register(story, places, out)
    return made, extra


def _distill(story: Story, places: Places, out: Path) -> tuple[Artifact, dict[str, Artifact]]:
    from mmlm.compress.distill import distill

    if story.distill is None:
        raise ConfigError(f"the story {story.name} has no distill.yaml", cure="add one, or skip this stage")
    shards, settings = noun(places, "shard"), {"launch": places.launch, "tracker": places.tracker}
    made = distill(story.distill, shards, noun(places, "train"), out=out, **settings)
    extra = {}
    if story.distill.scratch:
        # same config, no teacher: settled here because it is a second noun of the same verb
        extra["student-scratch"] = settle(
            lambda: distill(story.distill, shards, None, out=places.out / "student-scratch", **settings)  # type: ignore[arg-type]
        )
    return made, extra


def _register(story: Story, places: Places, out: Path) -> Artifact:
    from mmlm.publish.register import register, still_registered

    if (out / artifacts.NAME).exists() and not still_registered(artifacts.read(out), places.tracking_uri):
        artifacts.set_aside(out, "")  # registered elsewhere; this registry has not seen it
    which = "distill" if story.register.model == "student" and story.distill else "train"
    return register(
        story.register, story=story.name, checkpoint=noun(places, which), report=noun(places, "evaluate"),
        shards=noun(places, "shard"), manifest=noun(places, "scan"), data=places.data, out=out, tracker=places.tracker,
        tracking_uri=places.tracking_uri,
    )  # fmt: skip


def checkpoints(story: Story, places: Places) -> Iterator[tuple[str, Artifact]]:
    """The models of a run by the names that score rows use."""
    yield "teacher", noun(places, "train")
    if story.distill:
        yield "student", noun(places, "distill")
        if story.distill.scratch:
            yield "student-scratch", artifacts.read(places.out / "student-scratch", "checkpoint")


def settle(make: Callable[[], Any]) -> Any:
    """Call a verb; when another noun is in its place, say so, set that aside (or take the wanted one back) and call again."""
    try:
        return make()
    except ArtifactConflict as conflict:
        aside = artifacts.set_aside(conflict.path, conflict.wanted_fingerprint)
        why = conflict.differs or "another config or other inputs"
        back = "; what was made so before is back" if conflict.path.exists() else ""
        tell(f"{conflict.path.name}: {why}; what was there is kept as {aside.parent.name}/{aside.name}{back}")
        return make()


def run(story: Story, places: Places, say: Callable[[str], None]) -> list[Stage]:
    """All stages of a story in order; what is already there is left untouched."""
    stages = []
    for verb in story.verbs:
        started = time.time()
        path = places.out / NOUNS[verb] / artifacts.NAME
        say(f"{verb} …")
        artifact, extra = settle(functools.partial(perform, story, verb, places))
        skipped = path.stat().st_mtime < started
        stages.append(Stage(verb, artifact, skipped, 0.0 if skipped else time.time() - started, extra))
        say(f"{verb}: {'already there' if skipped else f'{stages[-1].seconds:.1f} s'}  {describe(artifact.counts)}")
    return stages


def describe(counts: dict[str, Any]) -> str:
    """The figures of a stage on one line."""
    return ", ".join(
        f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in counts.items() if isinstance(v, int | str)
    )
