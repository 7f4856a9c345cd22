"""How weights are drawn, and what of it goes with the width: one choice, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from mmlm.config import Config


class DepthConfig(Config):
    """What writes into the residual stream starts smaller by the root of twice the number of blocks (Radford et al. 2019)."""

    kind: Literal["depth"] = "depth"


class MupConfig(Config):
    """Maximal update parametrisation (Yang et al. 2022, table 3) on top of `depth`: the best learning rate of a narrow model
    is that of a wide one. At `base_width` it is what `depth` is. Rates of hidden matrices and heads fall with the width, the
    heads start smaller, and scores of attention are divided by the head width instead of its root."""

    kind: Literal["mup"] = "mup"
    base_width: int = Field(128, ge=8)
    """The width at which the learning rate was found."""
    base_head_width: int = Field(32, ge=1)
    """The width of its heads."""


def _spelled_out(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _kind(value: Any) -> Any:
    return value.get("kind", "depth") if isinstance(value, dict) else getattr(value, "kind", None)


InitialisationConfig = Annotated[
    Annotated[DepthConfig, Tag("depth")] | Annotated[MupConfig, Tag("mup")],
    Discriminator(_kind),
    BeforeValidator(_spelled_out),
]
