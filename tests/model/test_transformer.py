"""The fused Transformer against itself computed another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mmlm.data.collate import IGNORE, collate, field_rows
from mmlm.data.modalities import keep_modalities
from mmlm.features.spec import EOS
from mmlm.model.config import ModelConfig
from mmlm.model.generation import generate
from mmlm.model.sampling import words_only
from mmlm.model.transformer import FusedTransformer, count_parameters
from mmlm.train.config import LossConfig
from mmlm.train.objectives import Answering, loss_of
from tests.small import SPEC, sample


def model(attention: str = "prefix", **changes: Any) -> FusedTransformer:
    torch.manual_seed(0)
    config = ModelConfig(**{"width": 32, "layers": 2, "heads": 4, "attention": attention, **changes})
    return FusedTransformer(config, SPEC, len(field_rows(SPEC))).eval()


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("changes", [{}, {"kv_heads": 4, "qk_norm": False}, {"kv_heads": 1}])
def test_generation_with_cache_equals_full_forward(attention: str, changes: dict[str, Any]):
    net = model(attention, **changes)
    samples = [sample(i, given) for i, given in enumerate([("image", "audio"), ("audio",), (), ("fields", "context")])]
    ids, score, label = generate(net, collate(samples, SPEC, pad_left=True, with_answer=False), limit=6)
    assert any(ids)
    for one, answer, total, logits in zip(samples, ids, score, label, strict=True):
        tokens = [*one.tokens[: one.answer_at + 1].tolist(), *answer, EOS]
        one.tokens = torch.tensor(tokens).numpy()
        out = net(collate([one], SPEC))
        log = words_only(out.answer_AV).log_softmax(-1)
        best = log.argmax(-1).tolist()
        assert best[: len(answer)] == answer
        count = min(len(answer) + 1, 6)
        assert log.max(-1).values[:count].sum().item() == pytest.approx(total.item(), abs=1e-4)
        assert torch.allclose(out.label_RC[0], logits, atol=1e-5)


def test_a_record_does_not_see_its_neighbours_in_the_batch():
    net = model()
    samples = [sample(i) for i in range(4)] + [sample(9, ("image",)), sample(10, ())]
    together = net(collate(samples, SPEC)).label_RC
    alone = torch.cat([net(collate([s], SPEC)).label_RC for s in samples])
    assert torch.allclose(together, alone, atol=1e-5)


def test_causal_model_does_not_see_the_future():
    net = model("causal")
    a, b = sample(1), sample(1)
    b.tokens = b.tokens.copy()
    b.tokens[-2] = (b.tokens[-2] - 9 + 1) % 50 + 9
    x, y = net.trunk(collate([a], SPEC)), net.trunk(collate([b], SPEC))
    assert torch.allclose(x[:-2], y[:-2], atol=1e-6)
    assert not torch.allclose(x[-2:], y[-2:], atol=1e-3)


def test_every_modality_reaches_the_class_head():
    net = model()
    full = sample(3)
    whole = net(collate([full], SPEC)).label_RC
    for name in full.modalities:
        without = net(collate([keep_modalities(full, set(full.modalities) - {name})], SPEC)).label_RC
        assert not torch.allclose(whole, without, atol=1e-4), name


def test_a_batch_without_a_modality_gives_that_modality_zero_gradients():
    net = model()
    out = net(collate([sample(i, ("image",)) for i in range(3)], SPEC))
    (out.answer_AV.square().sum() + out.label_RC.square().sum()).backward()
    assert net.audio is not None and net.image is not None
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name  # ZeRO needs a gradient of every parameter on every rank
    found = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert not found["audio.project.weight"].any() and found["image.project.weight"].any()  # type: ignore[union-attr]


def losses(net: FusedTransformer, **options: Any) -> list[torch.Tensor]:
    """The loss of some records, and its gradients."""
    net.zero_grad()
    net.train().set_up(**options)
    out = net(collate([sample(0), sample(1, ()), sample(2, ("audio",))], SPEC), z_loss=0.0)
    assert out.answer is not None
    loss = out.answer.sum + out.label_RC.square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_recomputing_blocks_changes_nothing(every: int, granularity: str):
    net = model(layers=3)
    for a, b in zip(losses(net), losses(net, recompute=every, granularity=granularity), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow  # 40 s of compilation
def test_a_compiled_model_computes_the_same():
    net = model()
    for a, b in zip(losses(net), losses(net, compiled=True), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_the_loss_is_that_of_the_logits():
    net = model()
    batch = collate([sample(0), sample(1, ()), sample(2, ("audio",))], SPEC)
    out, asked = net(batch), net(batch, z_loss=1e-3)
    targets = batch.target_BT[batch.target_BT != IGNORE]
    wanted = F.cross_entropy(out.answer_AV, targets, reduction="none")
    assert torch.allclose(asked.answer.each_A, wanted, atol=1e-6)
    z = out.answer_AV.logsumexp(-1).square().sum() * 1e-3
    assert asked.answer.sum.item() == pytest.approx((wanted.sum() + z).item(), rel=1e-6)
    assert torch.equal(out.label_RC, asked.label_RC)


@pytest.mark.parametrize("z", [0.0, 0.02])
def test_the_terms_of_the_loss_are_those_of_the_logits(z: float):
    net, objective = model(), Answering(LossConfig(answer=0.5, z=z), SPEC)
    batch = collate([sample(0), sample(1, ()), sample(2, ("audio",))], SPEC)
    made = []
    for terms in (objective(net, batch), objective.terms(net(batch), batch)):
        loss = loss_of(terms, objective.counts(batch))
        made.append((terms, loss, torch.autograd.grad(loss, list(net.parameters()))))
    (ours, loss, gradients), (plain, wanted, others) = made
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert {n: t.sum.item() for n, t in ours.items()} == pytest.approx({n: t.sum.item() for n, t in plain.items()})
    for a, b in zip(gradients, others, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_normalised_queries_and_keys_do_not_grow_with_the_weights():
    net = model()
    batch = collate([sample(0)], SPEC)
    before = net.trunk(batch)
    dict(net.named_parameters())["blocks.0.attention.qkv.weight"].data[: 32 + 16] *= 50  # queries and keys, not values
    assert torch.allclose(net.trunk(batch), before, atol=1e-4)


def test_parameter_count_is_what_the_sizes_say():
    config = ModelConfig(width=32, layers=2, heads=4)
    net = FusedTransformer(config, SPEC, len(field_rows(SPEC)))
    D, hidden, V, classes, rows = 32, config.feed_forward, 64, 3, len(field_rows(SPEC))
    assert SPEC.image is not None and SPEC.audio is not None
    block = 3 * D * D + 3 * D * hidden + 2 * D + 2 * config.head_width  # half of the keys and values
    audio_places = -(-SPEC.audio.max_frames // 4) + 1
    media = (64 + 1) * D + 4 * D + (32 + 1) * D + audio_places * D + 2 * rows * D
    assert count_parameters(net) == 2 * block + 2 * V * D + D + media + (D + 1) * classes


def test_targets_are_the_answer_and_nothing_else():
    one = sample(5)
    batch = collate([one, sample(6, ())], SPEC)
    wanted = one.tokens[one.answer_at + 1 :].tolist()
    assert [t for t in batch.target_BT[0].tolist() if t != IGNORE] == wanted
    assert batch.target_BT.flatten()[batch.answer_at_R[0]] == wanted[0]
