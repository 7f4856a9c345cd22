"""Sizes by name, from one that two cores train in minutes to seven billion parameters, and two forms of the literature.

Parameters and FLOPs are of a model of text alone with a vocabulary of 32,768 and one task of two classes; FLOPs are those of
training on one token of records of 2,048 positions that are all predicted (of `vaswani` the latter half, of `bert` none:
one class for each record). tests/model/test_presets.py counts both again.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Preset(NamedTuple):
    fields: dict[str, Any]
    """Of ModelConfig."""
    parameters: int
    flops: int


def _sizes(width: int, layers: int, heads: int, kv_heads: int, mlp_width: int | None) -> dict[str, Any]:
    return {"width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads, "mlp_width": mlp_width}


_OF_2017 = {"norm": "layer", "norm_at": "after", "qk_norm": False}

PRESETS = {
    "tiny": Preset(_sizes(128, 2, 4, 2, None), 8_758_274, 33_669_120),
    "mini": Preset(_sizes(256, 4, 4, 2, 704), 19_729_666, 93_192_192),
    "small": Preset(_sizes(512, 8, 8, 4, 1376), 56_764_930, 340_525_056),
    "base": Preset(_sizes(768, 12, 12, 6, 2048), 128_210_690, 844_627_968),
    "350m": Preset(_sizes(1024, 24, 16, 8, 2752), 345_561_090, 2_475_687_936),
    "760m": Preset(_sizes(1536, 26, 12, 4, 4096), 755_065_858, 5_209_325_568),
    "1b": Preset(_sizes(2048, 20, 16, 4, 5632), 1_036_086_274, 6_819_938_304),
    "3b": Preset(_sizes(3072, 28, 24, 8, 8192), 3_020_087_298, 19_629_342_720),
    "7b": Preset(_sizes(4096, 32, 32, 8, 14336), 7_248_039_938, 45_902_462_976),
    "vaswani": Preset(
        _sizes(512, 6, 8, 8, 2048) | _OF_2017 | {"layout": "encoder_decoder", "mlp": "relu", "positions": "sinusoidal"},
        77_657_090, 239_075_328,
    ),
    "bert": Preset(
        _sizes(768, 12, 12, 12, 3072) | _OF_2017 | {"layout": "encoder", "mlp": "gelu", "positions": "learned"},
        111_757_826, 707_802_628,
    ),
}  # fmt: skip
"""Last stand the shapes of the base models of Vaswani et al. 2017 and Devlin et al. 2019, whose blocks they have; embeddings
are not scaled by √D, and there are no segments."""


def sizes(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a preset that go with those given: a width of its own has a feed-forward of its own."""
    made = dict(PRESETS[name].fields)
    for key, follows in (("width", "mlp_width"), ("heads", "kv_heads")):
        if key in given:
            del made[follows]
    return {**made, **given}
