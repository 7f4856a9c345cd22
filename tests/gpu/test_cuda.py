"""What needs a CUDA device; skips itself where there is none. Run with `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.reader import ShardReader
from mmlm.evals.answer import Answerer
from mmlm.launch.local import ranks
from mmlm.model.packed import QUERIES, Flex, Grouped, Varlen, arrange, arrange_both_ways
from mmlm.tracking import NullTracker
from mmlm.train.config import TrainConfig
from mmlm.train.train import train
from tests.model.test_packed_attention import layout, textbook
from tests.train.test_parity import ALL_RULES, FP16, compare, zero

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(scope="module")
def trained(keypad_shards: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    config = parse(TrainConfig, {"steps": 20, "log_every": 1, "data": {"batch": 32}}, "test")
    out = tmp_path_factory.mktemp("gpu") / "model"
    return train(config, keypad_shards, out=out, launch=ranks(1), tracker=NullTracker())


def test_the_loss_falls_in_bf16_on_the_gpu(trained: Artifact):
    rows = [
        json.loads(line)["metrics"]["loss"] for line in (Path(trained.path) / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 20 and rows[-1] < 0.7 * rows[0]


def test_a_gpu_answers_like_the_cpu(trained: Artifact, keypad_shards: Artifact):
    samples = list(ShardReader(keypad_shards.path, ("test",)))
    here, there = Answerer(trained.path, "cpu").answer(samples), Answerer(trained.path, "cuda").answer(samples)
    for a, b in zip(here, there, strict=True):
        assert a.label_scores == pytest.approx(b.label_scores, abs=1e-3)


def test_every_stage_precision_and_rule_equals_plain_pytorch_on_the_cpu(tmp_path: Path):
    rules = [zero(s, 2, optimizer={"kind": k}, **ALL_RULES) for s, k in ((0, "muon"), (2, "lion"), (3, "muon"))]
    matrix = [zero(s, 2, precision=p) for s in (0, 1, 2, 3) for p in ("fp32", "bf16")] + [zero(2, 1, **FP16)]
    offloaded = {"zero": {"stage": 3, "offload_optimizer": True, "offload_parameters": True}, "precision": "bf16"}
    compare(1, tmp_path, [{"config": c} for c in [*matrix, *rules, offloaded]], steps=7)


@pytest.mark.parametrize(
    ("prefix", "dtype", "kind"),
    [(False, torch.bfloat16, Varlen), (True, torch.bfloat16, Flex), (True, torch.float32, Grouped)],
)
def test_attention_is_arranged_as_the_device_and_the_type_allow(prefix: bool, dtype: torch.dtype, kind: type):
    segment, prompt = layout([[50, 33, 60], [QUERIES + 60]])
    torch.manual_seed(0)
    q, k, v = torch.randn(3, int((segment >= 0).sum()), 4, 64).to(dtype)
    made = arrange(segment.cuda(), prompt.cuda(), prefix=prefix, dtype=dtype)
    assert isinstance(made, kind)
    found = made.attend(q.cuda(), k.cuda(), v.cuda()).cpu().double()
    assert (found - textbook(q.double(), k.double(), v.double(), segment, prompt, prefix)).abs().max() < 0.03
    both = arrange_both_ways(segment.cuda(), dtype=dtype)
    assert isinstance(both, Grouped if dtype == torch.float32 else Varlen)
    found = both.attend(q.cuda(), k.cuda(), v.cuda()).cpu().double()
    assert (found - textbook(q.double(), k.double(), v.double(), segment, segment >= 0, True)).abs().max() < 0.03
