"""Verb train: ShardSet → Checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmlm import artifacts
from mmlm.artifacts import Artifact, Work
from mmlm.config import resolved
from mmlm.data.files import address, folder_of
from mmlm.errors import ArtifactError, ConfigError
from mmlm.features import spec as feature_spec
from mmlm.model.baseline_config import AnyModelConfig
from mmlm.progress import tell
from mmlm.train import expected
from mmlm.train.config import LoopConfig, TrainConfig
from mmlm.train.control import Where

RECIPE = 3
"""Bumped when the same config and shards would give another model."""

Launch = Callable[..., None]
"""launch("package.module:function", arguments, log=folder): runs the function on every rank and waits."""


def train(config: TrainConfig, shards: Artifact, *, out: Path, launch: Launch, tracker: Any) -> Artifact:
    """Train the fused Transformer on the train split of `shards` into the folder `out`.

    Raises Interrupted when a signal stopped it (saved, run it again), LaunchError when a rank died.
    """
    known = config
    if getattr(config.model, "brings_weights", False):
        from mmlm.train import pretrained  # with torch, which this process needs for nothing else

        config = pretrained.settled(config, shards.path)
        known = pretrained.nameless(config)
    work = artifacts.begin(out, "checkpoint", recipe=RECIPE, config=known, parents={"shards": shards})
    if work.artifact:
        return finished(work.artifact, config)
    require(work, config, config.model, shards)
    arguments = {"config": config.model_dump(mode="json"), "shards": address(shards.path), "out": str(out)}
    arguments["digest"] = shards.digest
    return run_ranks(work, config, "mmlm.train.train:on_rank", arguments, launch, tracker, "train")


def require(work: Work, config: LoopConfig, model: AnyModelConfig, shards: Artifact) -> None:
    """Raise ConfigError, with `work` given back, when the shards, where they lie here, are not for such a model or such data.
    Shared by train and distill."""
    if not (shards.path / feature_spec.FILE).is_file():
        return
    from mmlm.data import augment
    from mmlm.train import weights

    spec = feature_spec.load(shards.path)
    try:
        weights.check(model, spec)
        augment.refuse(config.data.augment, spec)
    except ConfigError:
        work.release()
        raise


def finished(found: Artifact, config: LoopConfig) -> Artifact:
    """`found`, which is what `config` wants. Who changed how it runs, and sees nothing run, is told why. Shared by train and
    distill."""
    wanted = resolved(config)
    others = [name for name in config.how_it_runs if found.config.get(name, wanted[name]) != wanted[name]]
    if others:
        tell(f"{found.path} is finished, with other {', '.join(others)}: that is how it ran, so it is not made again")
    return found


def run_ranks(
    work: artifacts.Work,
    config: LoopConfig,
    target: str,
    arguments: dict[str, Any],
    launch: Launch,
    tracker: Any,
    verb: str,
) -> Artifact:
    """Run a training function on all ranks under one tracked run, and finish the noun. Shared by train and distill.

    How long and how watched it runs is read here, from the environment (`control.Where`), and told to every rank.
    """
    check_metrics_room(work.path)
    where = Where.from_environment().plain()
    if verb == "distill-scratch":  # begins after the student that `mmlm distill --resume` means
        where["resume"] = False
    arguments = {**arguments, "where": where}
    try:
        with tracker.run(verb, config, work) as run:
            launch(target, arguments, log=work.path / "logs")
            counts = json.loads((work.path / "counts.json").read_text(encoding="utf-8"))
            counts |= expected.compared(work.path, counts["parameters"])
            artifact = work.finish(counts=counts, digest_of=files_of(work.path))
            run.metrics({"parameters": counts["parameters"], "seconds": artifact.seconds})
            for what in ("predicted", "measured"):
                run.metrics({f"plan/{what}_{name}": value for name, value in counts.get(what, {}).items()})
            run.noun(artifact)
    finally:  # else a failed attempt keeps its lock for as long as someone holds the error
        work.release()
    return artifact


def files_of(folder: Path) -> list[str]:
    """The files that make up a model, its adapters included."""
    adapters = sorted(str(path.relative_to(folder)) for path in folder.glob("adapters/*/*"))
    return ["model.safetensors", "config.json", feature_spec.FILE, "tokenizer.json", *adapters]


def check_metrics_room(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise ArtifactError(f"cannot write to {folder}", cure="choose another --out or change its rights")


def on_rank(
    config: dict[str, Any], shards: str, out: str, where: dict[str, Any] | None = None, digest: str = ""
) -> None:
    """What each rank runs. `shards` is a folder that all ranks see, or the address of a published set, with its `digest`."""
    import torch

    from mmlm import world as worlds
    from mmlm.config import parse
    from mmlm.train import adapted, engine
    from mmlm.train.loop import fit
    from mmlm.train.objectives import Answering
    from mmlm.train.watchdog import Watchdog

    settings = parse(TrainConfig, config, "train")
    world, there = worlds.from_environment(), Where(**(where or {}))
    with Watchdog.of_start(there.hang_seconds, Path(out) / "logs", world, "train"):
        engine.start(world)
        folder = folder_of(shards, digest)
        spec = feature_spec.load(folder)
        expected.write(settings, settings.model, spec, folder, Path(out), world)
        torch.manual_seed(settings.seed)
        model = adapted.build(settings, spec, folder)
        model.set_up(
            recompute=settings.recompute, granularity=settings.recompute_granularity, compiled=settings.compile
        )
    objective = Answering(settings.loss, spec, settings.model)
    counts = fit(model, objective, settings, folder, Path(out), "train", there)
    write_counts(Path(out), counts, model)
    engine.stop()


def write_counts(out: Path, counts: dict[str, float], model: Any) -> None:
    """The stage's figures, from rank 0, for the process that started the ranks."""
    from mmlm import world as worlds
    from mmlm.storage import write_json

    if worlds.from_environment().is_main:
        # under ZeRO-3 a parameter's own shape is empty here; DeepSpeed keeps the whole one in ds_shape
        sizes = [getattr(p, "ds_numel", None) or p.numel() for p in model.parameters()]
        write_json(out / "counts.json", {**counts, "parameters": int(sum(sizes))})
