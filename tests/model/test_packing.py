"""Packed sequences: the same numbers as each record alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mmlm.data.collate import IGNORE, Batch, collate, field_rows, pack
from mmlm.errors import DataError
from mmlm.features.sample import Sample
from mmlm.features.spec import IMAGE
from mmlm.model.config import ModelConfig
from mmlm.model.transformer import FusedTransformer
from mmlm.train.config import LossConfig
from mmlm.train.objectives import Answering
from tests.small import SPEC, sample

GIVEN: dict[str, list[tuple[str, ...]]] = {
    "everything": [("image", "audio", "fields", "context")] * 5,
    "no image": [("audio", "fields"), ("audio",), ("fields",), (), ("audio", "context")],
    "no audio": [("image", "fields"), ("image",), ("fields",), (), ("image", "context")],
    "text only": [(), ("context",), (), (), ("context",)],
    "mixed": [("image", "audio"), (), ("audio",), ("image",), ("fields", "context")],
}


def model(attention: str) -> FusedTransformer:
    torch.manual_seed(0)
    config = ModelConfig(width=32, layers=2, heads=4, attention=attention)  # type: ignore[arg-type]
    return FusedTransformer(config, SPEC, len(field_rows(SPEC)))


def piece(seed: int, length: int) -> Sample:
    """A piece of a long record: text without an `<answer>`."""
    tokens = np.random.default_rng(seed).integers(9, 64, length).astype(np.int32)
    return Sample(id=f"p{seed}", task="free", tokens=tokens, answer_at=-1)


def losses_and_gradients(net: FusedTransformer, batches: list[Batch]) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Sums over all batches."""
    net.zero_grad()
    sums: dict[str, float] = {}
    for batch in batches:
        for name, term in Answering(LossConfig(), SPEC)(net, batch).items():
            sums[name] = sums.get(name, 0.0) + term.sum.item()
            term.sum.backward(retain_graph=True)
    return sums, [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("given", GIVEN)
def test_packed_equals_each_record_alone(attention: str, given: str):
    net = model(attention)
    samples = [sample(i, g, task=("kind", "free")[i % 2]) for i, g in enumerate(GIVEN[given])]
    samples.insert(2, piece(7, 19))
    packed = pack([samples[:3], samples[3:5], samples[5:]], SPEC, 96)
    alone = [collate([s], SPEC) for s in samples]
    assert torch.allclose(net.trunk(packed), torch.cat([net.trunk(b) for b in alone]), atol=1e-5)
    one, other = losses_and_gradients(net, [packed]), losses_and_gradients(net, alone)
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert len(one[1]) == len(other[1]) == len(list(net.parameters()))
    for a, b in zip(one[1], other[1], strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_packed_batch_says_where_its_records_are():
    samples = [sample(0), piece(1, 9), sample(2, ()), sample(3, ("image",))]
    batch = pack([samples[:2], samples[2:]], SPEC, 80)
    assert batch.tokens_BT.shape == (2, 80)
    assert batch.ids == ("s0", "p1", "s2", "s3")
    assert batch.label_R.shape == batch.task_R.shape == batch.answer_at_R.shape == (3,)
    first = batch.segment_BT[0]
    assert [int((first == n).sum()) for n in (0, 1)] == [int(collate([s], SPEC).valid_BT.sum()) for s in samples[:2]]
    assert torch.equal(batch.valid_BT, batch.segment_BT >= 0)
    at = int((first == 1).nonzero()[0])
    assert batch.position_BT[0, at : at + 9].tolist() == list(range(9))
    assert batch.tokens_BT.flatten()[batch.answer_at_R].unique().tolist() == [3]


def test_every_next_token_of_a_piece_is_a_target_but_slots():
    text = piece(1, 9)
    batch = collate([text], SPEC)
    assert batch.target_BT[0].tolist() == [*text.tokens[1:].tolist(), IGNORE]
    assert not batch.prompt_BT.any() and len(batch.answer_at_R) == len(batch.label_R) == 0
    pictured = dataclasses.replace(text, images=sample(0).images, tokens=np.insert(text.tokens, 4, IMAGE))
    batch = collate([pictured], SPEC)
    assert int(batch.prompt_BT.sum()) == len(batch.patches_PD) == 4
    assert [t for t in batch.target_BT[0].tolist() if t != IGNORE] == text.tokens[1:].tolist()
    assert model("causal").trunk(batch).isfinite().all()


def test_a_sequence_that_is_too_long_is_refused():
    with pytest.raises(DataError, match="at most 30"):
        pack([[sample(0), sample(1)]], SPEC, 30)
