"""Every form of the model against its formula in float64, and against the modules of torch.nn with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmlm.data.collate import pack
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
    "Vaswani's decoder": {**CLASSIC, "norm_at": "after", "positions": "sinusoidal"},
    "GPT-2's": {**CLASSIC, "mlp": "gelu", "positions": "learned"},
}
"""Changes of the default form by name."""


def build(changes: dict[str, Any], **more: Any) -> FusedTransformer:
    """In float64, with no weight left at a value that hides it, such as a bias of 0 or a gain of 1."""
    torch.manual_seed(0)
    net = weights.build(ModelConfig(**{"width": 32, "layers": 2, "heads": 4, **changes, **more}), SPEC).double().eval()
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
    batch = pack([some()[:3], some()[3:]], SPEC)
    made = net.trunk(batch)
    x_XD = net.embed(batch, batch.valid_BT)
    if net.positions is not None:  # put back where the literal one adds them
        x_XD = x_XD - net.positions(batch.position_BT[batch.valid_BT])
    number_X = (batch.segment_BT + 10 * torch.arange(2)[:, None])[batch.valid_BT]
    position_X, prompt_X = batch.position_BT[batch.valid_BT], batch.prompt_BT[batch.valid_BT]
    for record in number_X.unique():
        here = number_X == record
        at, prompt = position_X[here], prompt_X[here]
        sees = at[:, None] >= at[None]
        if attention == "prefix":
            sees = sees | (prompt[:, None] & prompt[None])
        x = formulas.place(net, x_XD[here], at)
        for block in net.blocks:
            x = formulas.block(block, net.config, x, sees, at if net.positions is None else None)
        assert torch.allclose(formulas.norm(net.norm, x), made[here], atol=2e-6)


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
