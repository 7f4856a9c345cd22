"""Every form of the model against its formula in float64, and against the modules of torch.nn with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from mmlm.data.collate import Batch, pack
from mmlm.model.across import cross
from mmlm.model.attention import Attention
from mmlm.model.classic import SinusoidalPositions, norm_of
from mmlm.model.config import ModelConfig
from mmlm.model.packed import Arrangement, arrange
from mmlm.model.transformer import FusedTransformer
from mmlm.train import weights
from tests.model import formulas
from tests.small import SPEC, sample

CLASSIC = {"norm": "layer", "mlp": "relu", "kv_heads": 4, "qk_norm": False}
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "one key-value head": {"kv_heads": 1},
    "as many key-value heads": {"kv_heads": 4, "qk_norm": False},
    "LayerNorm": {"norm": "layer"},
    "norm after": {"norm_at": "after"},
    "ReLU": {"mlp": "relu"},
    "GELU": {"mlp": "gelu"},
    "learned positions": {"positions": "learned"},
    "sinusoidal positions": {"positions": "sinusoidal"},
    "biases of attention": {"attention_bias": "all"},
    "wide heads": {"head_size": 12},
    "Vaswani's decoder": {**CLASSIC, "norm_at": "after", "positions": "sinusoidal"},
    "GPT-2's": {**CLASSIC, "mlp": "gelu", "positions": "learned"},
}
"""Changes of the default form by name."""


def build(changes: dict[str, Any], **more: Any) -> FusedTransformer:
    """In float64, with no weight left at a value that hides it, such as a bias of 0 or a gain of 1."""
    torch.manual_seed(0)
    spec = SPEC.model_copy(update={"tasks": SPEC.tasks[:1]}) if more.get("layout") == "encoder" else SPEC
    net = weights.build(ModelConfig(**{"width": 32, "layers": 2, "heads": 4, **changes, **more}), spec).double().eval()
    for name, parameter in net.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return net


def some(n: int = 5) -> list[Any]:
    given = [("image", "audio"), ("audio",), (), ("fields", "context"), ("image",)]
    return [sample(i, given[i % 5]) for i in range(n)]


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_its_formula(form: str, attention: str):
    """Two sequences of several records, against each record alone."""
    net = build(FORMS[form], attention=attention)
    for x, at, prompt, made, _ in records_of(net, pack([some()[:3], some()[3:]], SPEC)):
        sees = at[:, None] >= at[None]
        if attention == "prefix":
            sees = sees | (prompt[:, None] & prompt[None])
        x = stack(net, net.blocks, formulas.place(net, x, at), at, sees)
        assert torch.allclose(formulas.norm(net.norm, x), made, atol=2e-6)


@pytest.mark.parametrize("form", ["default", "LayerNorm", "biases of attention", "Vaswani's decoder", "GPT-2's"])
@pytest.mark.parametrize("layout", ["encoder", "encoder_decoder"])
def test_a_layout_is_its_formula(layout: str, form: str):
    """Everything up to `<answer>` sees everything; or everything before it, and the rest asks that and what is behind."""
    net = build(FORMS[form], layout=layout)
    read, written = (net.blocks, None) if layout == "encoder" else (net.encoder, net.blocks)
    for x, at, _, made, answer in records_of(net, pack([some()[:3], some()[3:]], SPEC)):
        n = answer + (layout == "encoder")  # positions that the encoder reads
        x = formulas.place(net, x, at)
        source = stack(net, read, x[:n], at[:n], torch.ones(n, n, dtype=torch.bool))
        source = formulas.norm(net.norm if written is None else net.encoder_norm, source)  # type: ignore[arg-type]
        assert torch.allclose(source, made[:n], atol=2e-6)
        if written is None:
            assert not made[n:].any()
        else:
            sees = at[n:, None] >= at[None, n:]
            rest = formulas.norm(net.norm, stack(net, written, x[n:], at[n:], sees, source))
            assert torch.allclose(rest, made[n:], atol=2e-6)


def records_of(net: Any, batch: Batch) -> Iterator[Any]:
    """Of each record: embeddings without positions, positions, which are the prompt's, hidden states, where it answers."""
    made, x_XD = net.trunk(batch), net.embed(batch, batch.valid_BT)
    position_X, prompt_X = batch.position_BT[batch.valid_BT], batch.prompt_BT[batch.valid_BT]
    if net.positions is not None:  # the literal one adds them itself
        x_XD = x_XD - net.positions(position_X)
    number_X = (batch.segment_BT + 10 * torch.arange(len(batch.segment_BT))[:, None])[batch.valid_BT]
    for number in number_X.unique():
        here = number_X == number
        yield x_XD[here], position_X[here], prompt_X[here], made[here], int(prompt_X[here].sum()) - 1


def stack(net: Any, blocks: Any, x: torch.Tensor, at: torch.Tensor, *rest: Any) -> torch.Tensor:
    for block in blocks:
        sees, *source = rest
        x = formulas.block(block, net.config, x, sees, at if net.positions is None else None, *source)
    return x


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("mlp", ["relu", "gelu"])
def test_a_classic_block_is_the_encoder_layer_of_torch(mlp: str, after: bool):
    config = ModelConfig(width=32, heads=4, norm_at="after" if after else "before", **{**CLASSIC, "mlp": mlp})  # type: ignore[arg-type]
    ours = build({}, **config.model_dump()).blocks[0]
    theirs = nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0.0, activation=mlp, layer_norm_eps=1e-6, batch_first=True, norm_first=not after,
        dtype=torch.float64,
    )  # fmt: skip
    take(theirs, ours)
    x_BTD = torch.randn(3, 7, 32, dtype=torch.float64)
    for prefix in (False, True):
        mask = None if prefix else nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
        wanted = theirs(x_BTD, src_mask=mask)
        seen = all_seen(3, 7, prefix)
        assert torch.allclose(ours(x_BTD.flatten(0, 1), None, seen).view(3, 7, 32), wanted, atol=1e-12)


@pytest.mark.parametrize("after", [False, True])
def test_a_classic_decoder_block_is_the_decoder_layer_of_torch(after: bool):
    changes = {**CLASSIC, "norm_at": "after" if after else "before", "layout": "encoder_decoder"}
    ours = build(changes).blocks[0]
    theirs = nn.TransformerDecoderLayer(
        32, 4, 128, dropout=0.0, layer_norm_eps=1e-6, batch_first=True, norm_first=not after, dtype=torch.float64
    )
    take(theirs, ours)
    y_BTD, source_BSD = torch.randn(3, 7, 32, dtype=torch.float64), torch.randn(3, 5, 32, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    wanted = theirs(y_BTD, source_BSD, tgt_mask=mask)
    crossing = cross(torch.full((3,), 7), torch.full((3,), 5), torch.float64)
    made = ours(y_BTD.flatten(0, 1), None, all_seen(3, 7, False), None, source_BSD.flatten(0, 1), crossing)
    assert torch.allclose(made.view(3, 7, 32), wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the library's kernel, and plain products
def test_attention_across_is_that_of_each_record_alone(dtype: torch.dtype):
    asking, asked = torch.tensor([3, 1, 0, 4, 2, 5]), torch.tensor([4, 0, 3, 40, 4, 38])
    q, k, v = (torch.randn(int(n.sum()), h, 8, dtype=dtype) for n, h in ((asking, 4), (asked, 2), (asked, 2)))
    made = cross(asking, asked, dtype).attend(q, k, v)
    wanted = torch.zeros_like(q)
    for r in range(6):
        a, b = (slice(int(n[:r].sum()), int(n[: r + 1].sum())) for n in (asking, asked))
        for head in range(4 if asked[r] else 0):
            sees = torch.ones(int(asking[r]), int(asked[r]), dtype=torch.bool)
            wanted[a, head] = formulas.scaled_dot_product(q[a, head], k[b, head // 2], v[b, head // 2], sees)
    assert torch.allclose(made, wanted, atol=1e-5 if dtype == torch.float32 else 1e-12)


def all_seen(B: int, T: int, prefix: bool) -> Arrangement:
    shape = torch.zeros(B, T, dtype=torch.long)
    return arrange(shape, shape == 0, prefix=prefix, dtype=torch.float64)


def take(theirs: Any, ours: Any) -> None:
    """The weights of a layer of torch.nn from a block of ours; its biases of attention, of which we have none, are 0."""
    attentions = [("self_attn", "attention"), *([("multihead_attn", "across")] if hasattr(ours, "across") else [])]
    norms = ["attention_norm", *(["across_norm"] if hasattr(ours, "across") else []), "feed_forward_norm"]
    with torch.no_grad():
        for their_name, our_name in attentions:
            their, our = getattr(theirs, their_name), getattr(ours, our_name)
            whole = our.qkv.weight if hasattr(our, "qkv") else torch.cat([our.query.weight, our.key_value.weight])
            their.in_proj_weight.copy_(whole)
            their.out_proj.weight.copy_(our.out.weight)
            their.in_proj_bias.zero_(), their.out_proj.bias.zero_()
        for n, name in enumerate(norms, 1):
            getattr(theirs, f"norm{n}").load_state_dict(getattr(ours, name).state_dict())
        theirs.linear1.load_state_dict(ours.feed_forward.up.state_dict())
        theirs.linear2.load_state_dict(ours.feed_forward.out.state_dict())


def test_attention_without_positions_is_that_of_torch():
    config = ModelConfig(width=32, heads=4, **CLASSIC)  # type: ignore[arg-type]
    torch.manual_seed(0)
    ours = Attention(config).double()
    theirs = nn.MultiheadAttention(32, 4, bias=False, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "out_proj.weight": ours.out.weight})
    x_BTD = torch.randn(3, 7, 32, dtype=torch.float64)
    seen = all_seen(3, 7, True)
    wanted, _ = theirs(x_BTD, x_BTD, x_BTD, need_weights=False)
    assert torch.allclose(ours(x_BTD.flatten(0, 1), None, seen).view(3, 7, 32), wanted, atol=1e-12)


@pytest.mark.parametrize("form", ["default", "LayerNorm", "ReLU", "biases of attention"])
def test_a_gated_layer_is_its_formula(form: str):
    """Three records side by side; the second has nothing to ask."""
    net = build(FORMS[form], fusion="cross_attention")
    layer, config, asking, asked = net.fusion.layers[0], net.config, [3, 2, 4], [5, 0, 2]  # type: ignore[union-attr, index]
    x_YD, memory_MD = (torch.randn(sum(count), config.width, dtype=torch.float64) for count in (asking, asked))
    made = layer(x_YD, memory_MD, cross(torch.tensor(asking), torch.tensor(asked), torch.float64))  # type: ignore[operator]
    parts = zip(x_YD.split(asking), memory_MD.split(asked), strict=True)
    wanted = torch.cat([formulas.gated(layer, config, x, memory) for x, memory in parts])
    assert torch.allclose(made, wanted, atol=1e-10)


def test_norms_are_those_of_torch():
    x = torch.randn(9, 32, dtype=torch.float64)
    for kind, theirs in (("layer", nn.LayerNorm(32, 1e-6)), ("rms", nn.RMSNorm(32, 1e-6))):
        ours = norm_of(ModelConfig(width=32, norm=kind)).double()  # type: ignore[arg-type]
        nn.init.normal_(ours.weight)  # type: ignore[arg-type]
        theirs.double().load_state_dict(ours.state_dict())
        assert torch.allclose(ours(x), theirs(x), atol=1e-12)


def test_sinusoids_are_the_formula_at_any_position():
    made = SinusoidalPositions(32)(torch.tensor([0, 1, 50, 5000]))
    wanted = torch.stack([formulas.sinusoid(t, 32) for t in (0, 1, 50, 5000)])
    assert torch.allclose(made.double(), wanted, atol=5e-4) and torch.allclose(made[:3].double(), wanted[:3], atol=1e-5)
