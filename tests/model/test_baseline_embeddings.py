"""The small models' embedding head: a vector for each record, alike for a picture and a sound of the same thing."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch

from mmlm.config import parse
from mmlm.data.collate import collate, pack
from mmlm.data.modalities import alone
from mmlm.errors import ConfigError
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, AUDIO, BOS, EOS, IMAGE, TaskSpec
from mmlm.model.baseline_config import CONFIGS, CnnConfig
from mmlm.model.flops import Shape, forward_flops
from mmlm.model.transformer import FusedTransformer
from mmlm.train import weights
from mmlm.train.config import ContrastiveConfig, LossConfig, TrainConfig
from mmlm.train.objectives import Answering, loss_of
from tests.small import SPEC, sample

CLASSES = SPEC.model_copy(update={"tasks": [TaskSpec(name="kind", labels=["a", "b", "c"])]})
Kind = Literal["lstm", "gru", "cnn"]
KINDS: list[Kind] = ["lstm", "gru", "cnn"]
CORNERS = [(0, 0), (0, 12), (12, 0), (12, 12)]


def model(kind: Kind) -> FusedTransformer:
    torch.manual_seed(0)
    config = (
        CnnConfig(channels=(8, 16), width=32, embedding=16) if kind == "cnn" else CONFIGS[kind](width=32, embedding=16)
    )
    return weights.build(config, CLASSES).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_have_length_one_and_are_those_of_records_alone(kind: Kind):
    net, samples = (
        model(kind),
        [sample(i) for i in range(3)] + [sample(10, ("image",)), sample(11, ("audio", "fields"))],
    )
    each = [net(collate([s], CLASSES)).embedding_RE for s in samples]
    together = net(pack([samples[:2], samples[2:]], CLASSES), z_loss=0.0).embedding_RE
    assert together is not None
    wanted = torch.cat([one for one in each if one is not None])
    torch.testing.assert_close(together, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(samples)), atol=1e-6, rtol=0)


def thing(seed: int) -> Sample:
    """A bright corner and a loud mel bin, which belong together; four such things, with noise of their own."""
    rng = np.random.default_rng(seed)
    which = seed % 4
    picture = rng.integers(0, 120, (16, 16, 1)).astype(np.uint8)
    y, x = CORNERS[which]
    picture[y : y + 4, x : x + 4] += 130
    sound = rng.uniform(-6, -4, (int(rng.integers(8, 40)), 8)).astype(np.float16)
    sound[:, 1 + 2 * which] = -1
    tokens = np.array([BOS, IMAGE, AUDIO, ANSWER, 20, EOS], np.int32)
    return Sample(f"t{seed}", "kind", tokens, 3, [picture], [sound], label="a", group=f"thing {which}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_finds_the_sound_of_the_same_thing(kind: Kind):
    net = model(kind).train()
    loss = LossConfig(label=0, answer=0, contrastive=ContrastiveConfig(between=[("image", "audio")], temperature=0.2))
    objective, optimizer = Answering(loss, CLASSES), torch.optim.AdamW(net.parameters(), 4e-3)
    for step in range(40):
        batch = collate([thing(100 * step + i) for i in range(16)], CLASSES)
        objective.prepare(net, [batch], torch.device("cpu"))
        loss_of(objective(net, batch), objective.counts(batch)).backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        optimizer.zero_grad()
    net.eval()
    held = [thing(10**6 + i) for i in range(48)]
    seen, heard = (net(collate([alone(s, {m}) for s in held], CLASSES)).embedding_RE for m in ("image", "audio"))
    assert seen is not None and heard is not None
    nearest = (seen @ heard.T).argmax(1)
    assert (nearest % 4 == torch.arange(48) % 4).float().mean() > 0.8  # by lot .25


def test_the_head_is_counted():
    batch = collate([sample(3, ("image",))] * 4, CLASSES)
    without, with_head = (
        forward_flops(CnnConfig(channels=(8, 16), width=32, embedding=size), CLASSES, Shape.of(batch))
        for size in (None, 16)
    )
    assert with_head - without == 4 * 2 * 32 * 16


def test_what_cannot_be_brought_together_is_refused():
    def config(model: dict[str, Any], between: list[list[str]]) -> TrainConfig:
        return parse(TrainConfig, {"model": model, "loss": {"contrastive": {"between": between}}}, "train")

    with pytest.raises(ConfigError, match="a cnn reads no text"):
        config({"kind": "cnn", "embedding": 16}, [["image", "context"]])
    assert config({"kind": "cnn", "embedding": 16}, [["image", "audio"]]).loss.contrastive
    assert config({"kind": "gru", "embedding": 16}, [["image", "context"]]).loss.contrastive
    with pytest.raises(ConfigError, match=r"needs model\.embedding"):
        config({"kind": "gru"}, [["image", "context"]])
