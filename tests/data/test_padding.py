"""The padding of real corpora, packed: articles, dialogue and stamps, from the folder that MMLM_CORPORA names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.scan import scan
from mmlm.data.config import DataConfig
from mmlm.data.loader import Loader
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard
from mmlm.world import World

CORPORA = Path(os.environ.get("MMLM_CORPORA", "corpora-are-nowhere"))
GOAL = 0.02
STEPS = 1000
ROW = {"id": "id", "group": "group", "split": "split", "license": "license", "source": "dataset"}
SOURCES: dict[str, dict[str, Any]] = {
    "articles": {"map": ROW, "ask": [{"task": "field", "text": "texts.en", "label": "label"}]},
    "dialogue": {
        "map": ROW,
        "ask": [{"task": "topic", "each": "texts", "lang": "{key}", "text": "value", "label": "label"}],
    },
    "stamps": {
        "map": {**ROW, "image": "image", "audio": "audio[].path"},
        "ask": [{"task": "category", "question": "Which is this?", "context": "texts.en", "label": "label"}],
    },
}
FEATURES = {
    "max_len": 384, "on_long": "keep", "tokenizer": {"vocab_size": 4096},
    "image": {"size": 64, "patch": 16, "channels": 3, "resize": "pad"},
    "audio": {"sample_rate": 16000, "n_mels": 80, "max_seconds": 4.0, "frames_per_token": 16},
}  # fmt: skip
WEIGHTED = {"kind": "weighted", "by": "source", "weights": {"articles": 0.4, "dialogue": 0.4, "stamps": 0.2}}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    for name in SOURCES:
        if not (CORPORA / name / "manifest.jsonl").is_file():
            pytest.skip(f"{name} is not below MMLM_CORPORA")
    out = tmp_path_factory.mktemp("corpora")
    sources = [{"kind": "table", "files": f"{name}/manifest.jsonl", **told} for name, told in SOURCES.items()]
    manifest = scan(parse(ScanConfig, {"sources": sources}, "scan"), data=CORPORA, out=out / "manifest")
    # long texts of val and test are no sequence; those of train are split
    config = parse(ShardConfig, {"features": FEATURES, "shard_records": 2000, "error_budget": 0.05}, "shard")
    return shard(config, manifest, data=CORPORA, out=out / "shards", workers=1)


@pytest.mark.parametrize("mixture", [{"kind": "natural"}, WEIGHTED], ids=lambda m: m["kind"])
@pytest.mark.parametrize("length", [384, 1024, 2048])
def test_at_most_two_positions_of_a_hundred_hold_nothing(corpora: Artifact, length: int, mixture: dict[str, Any]):
    told = {
        "batch": 16, "pack": {"kind": "best_fit", "length": length}, "mixture": mixture, "modality_dropout": 0,
    }  # fmt: skip
    loader = Loader(corpora.path, parse(DataConfig, told, "test"), 0, World(), STEPS)
    assert loader.plan
    planned = loader.plan.padding(loader.maker.order.taken(STEPS).tolist())
    assert planned <= GOAL
    assert loader.plan.counts["refused"] == 0
    # what batches really hold is what was planned, up to the chance of which sequences they are
    batches = [loader.batch(step) for step in range(0, STEPS, 20)]
    assert {b.valid_BT.shape[1] for b in batches} <= {length}
    held = sum(int(b.valid_BT.sum()) for b in batches) / sum(b.valid_BT.numel() for b in batches)
    assert 1 - held == pytest.approx(planned, abs=0.005)


def test_what_modality_dropout_empties_is_told(corpora: Artifact):
    told = {"batch": 16, "pack": {"kind": "best_fit", "length": 1024}, "mixture": WEIGHTED, "modality_dropout": 0.25}
    loader = Loader(corpora.path, parse(DataConfig, told, "test"), 0, World(), STEPS)
    assert loader.plan
    taken = loader.maker.order.taken(STEPS).tolist()
    batches = [loader.batch(step).valid_BT for step in range(0, STEPS, 20)]
    held = sum(int(b.sum()) for b in batches) / sum(b.numel() for b in batches)
    emptied = loader.maker.emptied(taken)
    assert emptied is not None and 1 - held == pytest.approx(loader.plan.padding(taken) + emptied, abs=0.005)
