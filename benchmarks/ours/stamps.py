"""The models of `benchmarks.stamps`: trained in short pieces that go on, one a fold and one for retrieval."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.scan import scan
from mmlm.data.augment import augment
from mmlm.data.collate import collate
from mmlm.data.config import AugmentConfig
from mmlm.data.modalities import drop_modalities
from mmlm.data.reader import ShardReader
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec
from mmlm.model.config import ModelConfig
from mmlm.model.transformer import FusedTransformer
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard
from mmlm.train import weights
from mmlm.train.config import ContrastiveConfig, CosineConfig, LossConfig
from mmlm.train.objectives import Answering, loss_of
from mmlm.train.schedule import learning_rate

FOLDS, BATCH, SAVE_EVERY, RATE = 5, 48, 50, 2e-3
STORY = Path(__file__).parents[2] / "jobs" / "configs" / "stamps"
MODEL = ModelConfig(
    width=96, layers=2, heads=4, attention="prefix", dropout=0.1, embedding=64, image_stem="hog", image_places="grid"
)
AUGMENT = AugmentConfig(shift=4, flip=True, contrast=0.2, time_mask=0.2, mel_mask=8)


@dataclass(frozen=True)
class Recipe:
    loss: LossConfig
    dropout: float
    """Share of the records that lose a part of their modalities."""


FOLD = Recipe(LossConfig(answer=0.1), 0.6)
NAMES = Recipe(
    LossConfig(answer=0.1, label=0.3, contrastive=ContrastiveConfig(between=[("image", "context")], temperature=0.1)),
    0.0,
)
LANGUAGES = ("en", "fr", "es", "de", "ca", "ro", "ru", "bg", "ja", "zh_CN", "zh_TW")
RETRIEVAL = Recipe(LossConfig(answer=0.1, label=0.5, contrastive=ContrastiveConfig(temperature=0.1)), 0.0)


def make_shards(data: Path, out: Path) -> Artifact:
    """The story's features, of the question for the category only."""
    config = yaml.safe_load((STORY / "scan.yaml").read_text())
    config["sources"][0]["ask"] = [ask for ask in config["sources"][0]["ask"] if ask["task"] == "category"]
    manifest = scan(parse(ScanConfig, config, "stamps"), data=data, out=out / "manifest", tracker=None)
    sharding = {**yaml.safe_load((STORY / "shard.yaml").read_text()), "ray_from": 10**9}
    sharding["features"]["tokenizer"] = {"vocab_size": 1024}  # one language of captions
    return shard(
        parse(ShardConfig, sharding, "stamps"), manifest, data=data, out=out / "shards", workers=1, tracker=None
    )


def make_names(data: Path, out: Path) -> Artifact:
    """Pictures with a name beside them, once in each language."""
    config = yaml.safe_load((STORY / "scan.yaml").read_text())
    ask = {
        "task": "category",
        "each": "texts",
        "keep": list(LANGUAGES),
        "lang": "{key}",
        "context": "{value}",
        "label": "label",
    }
    config["sources"][0]["ask"] = [{**ask, "question": "Which category does this belong to?"}]
    manifest = scan(parse(ScanConfig, config, "names"), data=data, out=out / "names-manifest", tracker=None)
    sharding = {**yaml.safe_load((STORY / "shard.yaml").read_text()), "ray_from": 10**9}
    return shard(
        parse(ShardConfig, sharding, "names"), manifest, data=data, out=out / "names-shards", workers=1, tracker=None
    )


def read_all(shards: Artifact) -> list[Sample]:
    reader = ShardReader(shards.path, ("train", "val", "test"))
    return sorted((reader[i] for i in range(len(reader))), key=lambda s: s.id)


def fold_of(sample: Sample) -> int:
    """By a hash of the group: whole groups, about as many records in each."""
    return hashlib.sha256(sample.group.encode()).digest()[0] % FOLDS


def training_set(name: str, samples: list[Sample]) -> list[Sample]:
    if name in ("retrieval", "names"):
        return [s for s in samples if s.split != "test"]
    return [s for s in samples if fold_of(s) != int(name.removeprefix("fold-"))]


def build(spec: FeatureSpec, seed: int = 0) -> FusedTransformer:
    torch.manual_seed(seed)
    return weights.build(MODEL, spec)


def train(name: str, shards: Artifact, out: Path, steps: int, until: float) -> bool:
    """Go on with the model `name` until the clock says `until`. Returns whether it is done."""
    folder = out / name
    if (folder / weights.WEIGHTS).exists():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    reader = ShardReader(shards.path, ("train",))
    spec, chosen = reader.spec, training_set(name, read_all(shards))
    model = build(spec)
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    groups = [
        {"params": [p for p in model.parameters() if (id(p) in matrices) == decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, RATE, betas=(0.9, 0.95))
    saved, first = folder / "training.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    recipe = {"retrieval": RETRIEVAL, "names": NAMES}.get(name, FOLD)
    objective = Answering(recipe.loss, spec)
    model.train()
    for step in range(first, steps):
        if step % SAVE_EVERY == 0 and step > first:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, saved)
            if time.monotonic() > until:
                return False
        torch.manual_seed(step)
        batch = collate(_batch(chosen, step, recipe), spec)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, RATE, CosineConfig())
        optimizer.zero_grad()
        loss = loss_of(objective(model, batch), objective.counts(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % SAVE_EVERY == 0:
            print(f"{name}: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    weights.save_model(folder, model.state_dict(), MODEL, shards.path)
    saved.unlink(missing_ok=True)
    return time.monotonic() < until


def _batch(chosen: list[Sample], step: int, recipe: Recipe) -> list[Sample]:
    """Epoch after epoch in a new order, changed as in training."""
    epoch, at = divmod(step * BATCH, len(chosen))
    order = [
        *np.random.default_rng((epoch, 1)).permutation(len(chosen)),
        *np.random.default_rng((epoch + 1, 1)).permutation(len(chosen)),
    ]
    rows = []
    for place, i in enumerate(order[at : at + BATCH]):
        rng = np.random.default_rng((step, place))
        rows.append(augment(drop_modalities(chosen[i], recipe.dropout, rng), AUGMENT, rng))
    return rows
