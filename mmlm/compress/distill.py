"""Verb distill: ShardSet + teacher → a smaller Checkpoint, by the same loop as train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.compress.config import DistillConfig, TeacherConfig
from mmlm.data.files import address, folder_of
from mmlm.errors import ConfigError
from mmlm.features import spec as feature_spec
from mmlm.train.train import Launch, finished, require, run_ranks, write_counts

if TYPE_CHECKING:
    import torch

    from mmlm.train.objectives import Objective
    from mmlm.world import World

RECIPE = 3


def distill(
    config: DistillConfig, shards: Artifact, teacher: Artifact | None, *, out: Path, launch: Launch, tracker: Any
) -> Artifact:
    """Train the student on `shards`, led by `teacher`; without one, the same steps from the data alone.

    Raises ArtifactError when the teacher was trained for other features than the shards hold.
    """
    if config.teacher and teacher:
        config, teacher = _led_by_folder(config), None
    elif config.teacher:
        config = config.model_copy(update={"teacher": None})  # the student that learns without one
    if teacher:
        feature_spec.require_same(feature_spec.load(teacher.path), feature_spec.load(shards.path))
    known = config
    if getattr(config.model, "brings_weights", False):
        from mmlm.train import pretrained

        config = pretrained.settled(config, shards.path)
        known = pretrained.nameless(config)
    if known.teacher:  # where it lies is no part of what it teaches
        known = known.model_copy(update={"teacher": known.teacher.model_copy(update={"folder": ""})})
    parents = {"shards": shards, "teacher": teacher} if teacher else {"shards": shards}
    work = artifacts.begin(out, "checkpoint", recipe=RECIPE, config=known, parents=parents)
    if work.artifact:
        return finished(work.artifact, config)
    require(work, config, config.model, shards)
    arguments = {
        "config": config.model_dump(mode="json"),
        "shards": address(shards.path),
        "digest": shards.digest,
        "teacher": str(teacher.path) if teacher else None,
        "out": str(out),
    }
    verb = "distill" if teacher or config.teacher else "distill-scratch"
    return run_ranks(work, config, "mmlm.compress.distill:on_rank", arguments, launch, tracker, verb)


def _led_by_folder(config: DistillConfig) -> DistillConfig:
    """With the digest of the teacher in its folder. Raises ConfigError when that is another one."""
    from mmlm.model.config import PretrainedConfig
    from mmlm.train import pretrained

    assert config.teacher is not None
    folder = pretrained.folder_of(PretrainedConfig(folder=config.teacher.folder))
    digest = pretrained.digest_of(folder)
    if config.teacher.digest not in ("", digest):
        raise ConfigError(
            f"the teacher in {folder} has the digest {digest[:12]}", wanted=config.teacher.digest[:12],
            cure="give the folder with that content, or leave distill.teacher.digest away",
        )  # fmt: skip
    return config.model_copy(update={"teacher": TeacherConfig(folder=str(folder), digest=digest)})


def on_rank(
    config: dict[str, Any],
    shards: str,
    teacher: str | None,
    out: str,
    where: dict[str, Any] | None = None,
    digest: str = "",
) -> None:
    """What each rank runs. `shards` is a folder that all ranks see, or the address of a published set, with its `digest`."""
    from mmlm import world as worlds
    from mmlm.config import parse
    from mmlm.train import engine
    from mmlm.train.control import Where
    from mmlm.train.loop import fit
    from mmlm.train.watchdog import Watchdog

    settings = parse(DistillConfig, config, "distill")
    world, there = worlds.from_environment(), Where(**(where or {}))
    name = "distill" if teacher or settings.teacher else "scratch"
    with Watchdog.of_start(there.hang_seconds, Path(out) / "logs", world, name):
        device = engine.start(world)
        folder = folder_of(shards, digest)
        student, objective = _ready(settings, folder, Path(teacher) if teacher else None, Path(out), world, device)
    counts = fit(student, objective, settings, folder, Path(out), name, there)
    write_counts(Path(out), counts, student)
    engine.stop()


def _ready(
    settings: DistillConfig, folder: Path, teacher: Path | None, out: Path, world: World, device: torch.device
) -> tuple[Any, Objective]:
    """The student, and what it learns: from a teacher of ours, of transformers, or from none."""
    import torch

    from mmlm.train import expected, pretrained, probe, weights
    from mmlm.train.objectives import Answering, Distilling

    torch.manual_seed(settings.seed)
    spec = feature_spec.load(folder)
    student = pretrained.build(settings.model, spec, folder)
    student.set_up(recompute=settings.recompute, granularity=settings.recompute_granularity, compiled=settings.compile)
    taught = probe.Teaching(weights.load_config(teacher), settings.temperature, settings.task) if teacher else None
    expected.write(settings, settings.model, spec, folder, out, world, taught)
    if settings.teacher:
        from mmlm.compress.classifier import Following, SequenceClassifier
        from mmlm.features.text import Tokenizer

        classifier = SequenceClassifier(Path(settings.teacher.folder), spec, Tokenizer.load(folder)).to(device)
        return student, Following(settings.loss, spec, classifier, settings.temperature, settings.task, settings.model)
    if not teacher:
        return student, Answering(settings.loss, spec, settings.model)
    leader = weights.load_model(teacher, spec).eval().requires_grad_(False).to(device)
    if settings.precision == "bf16":
        leader = leader.bfloat16()
    return student, Distilling(settings.loss, spec, leader, settings.temperature, settings.task, settings.model)
