"""What a search tries: the settings of each trial, a pure function of its spaces, its seed and the trial's number."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from mmlm.config import Config, apply_override, identity, leaves, parse, read_yaml
from mmlm.corpus.config import ScanConfig
from mmlm.errors import ConfigError
from mmlm.shards.config import ShardConfig
from mmlm.storage import sha256_json
from mmlm.train.config import TrainConfig

SECTIONS: dict[str, type[Config]] = {"scan": ScanConfig, "shard": ShardConfig, "train": TrainConfig}
"""Stages that a trial goes through, in their order; the settings of the others change nothing that it measures."""
SPACES = "log(low,high), uniform(low,high), int(low,high) or [a, b, c]"
_RANGE = re.compile(r"(log|uniform|int)\(\s*([^,]+),\s*([^,)]+)\)")


class TuneConfig(Config):
    """`tune.yaml` of a story, or the flags of `mmlm tune`."""

    search: Annotated[dict[str, str | list[Any]], Field(min_length=1)]
    """key of train.yaml, shard.yaml or scan.yaml, such as `train.optimizer.lr` → `log(1e-4,1e-2)`, `uniform(0,0.5)`,
    `int(1,8)`, or a list of choices."""
    trials: int = Field(16, ge=1)
    """Settings that are tried."""
    seed: int = Field(0, ge=0)
    """Of the settings that are drawn."""
    metric: str | None = None
    """A column of metrics.jsonl; by default `val/loss` where the story validates while training, else `loss`."""
    mode: Literal["min", "max"] = "min"
    grace: float = Field(0.2, gt=0, le=1)
    """Share of the steps before which no trial is stopped."""
    reduction: int = Field(3, ge=2)
    """Of how many trials that reach a rung one goes on (ASHA; Li et al. 2020); rungs are this many times apart."""

    @field_validator("search", mode="before")
    @classmethod
    def _written(cls, search: Any) -> Any:
        for key, space in search.items() if isinstance(search, dict) else ():
            if not isinstance(space, str | list):
                raise ValueError(f"{key} = {space}: wanted {SPACES}")
        return search

    @field_validator("search")
    @classmethod
    def _spaces(cls, search: dict[str, str | list[Any]]) -> dict[str, str | list[Any]]:
        for key, space in search.items():
            section, dot, _ = key.partition(".")
            if not dot or section not in SECTIONS:
                raise ValueError(
                    f"{key}: a trial is a training and the shards it reads; wanted a key of train, shard or scan, such as "
                    f"train.optimizer.lr; change {section or 'others'} with --set, for all trials"
                )
            draw(space, random.Random(0), key)
        return search


def draw(space: str | list[Any], rng: random.Random, key: str = "") -> Any:
    """One value of a space. Raises ValueError when it is none."""
    if isinstance(space, list):
        if not space:
            raise ValueError(f"{key}: an empty list of choices")
        return rng.choice(space)
    found = _RANGE.fullmatch(space.strip())
    try:
        low, high = (float(found[2]), float(found[3])) if found else (1.0, 0.0)
    except ValueError:
        found = None
    if not found or not -math.inf < low < high < math.inf or (found[1] == "log" and low <= 0):
        raise ValueError(f"{key} = {space}: wanted {SPACES}")
    if found[1] == "int" and (first := math.ceil(low)) > (last := math.floor(high)):
        raise ValueError(f"{key} = {space}: no whole number lies there; wanted int(1,8), or uniform({low:g},{high:g})")
    if found[1] == "int":
        return rng.randint(first, last)
    if found[1] == "log":
        return float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}")
    return float(f"{rng.uniform(low, high):.4g}")


def settings_of(config: TuneConfig) -> list[dict[str, Any]]:
    """The settings of each trial, key → value; no two alike, so there are fewer where there are no more to choose."""
    drawn: list[dict[str, Any]] = []
    for number in range(config.trials):
        for attempt in range(100):
            settings = {
                key: draw(space, random.Random(f"{config.seed}/{number}/{attempt}/{key}"), key)
                for key, space in sorted(config.search.items())
            }
            if settings not in drawn:
                drawn.append(settings)
                break
    return drawn


def read(folder: Path, search: Sequence[str], **given: Any) -> TuneConfig:
    """The settings of `tune.yaml`, if there is one, with what the flags say over it."""
    path = folder / "tune.yaml"
    data: dict[str, Any] = (read_yaml(path) or {}) if path.is_file() else {}
    if search:
        data["search"] = {}
    for text in search:
        key, equals, space = text.partition("=")
        if not equals:
            raise ConfigError(f"--search {text}", wanted="KEY=SPACE, such as 'train.optimizer.lr=log(1e-4,1e-2)'")
        listed = space.strip().startswith("[")
        data["search"][key.strip()] = [_number(v) for v in yaml.safe_load(space)] if listed else space.strip()
    data |= {key: value for key, value in given.items() if value is not None}
    if not data.get("search"):
        raise ConfigError(
            "nothing to search", wanted="--search 'train.optimizer.lr=log(1e-4,1e-2)'", cure=f"or write {path}"
        )
    return parse(TuneConfig, data, "tune")


def _number(value: Any) -> Any:
    """YAML takes `3e-4` for a text, and only `3.0e-4` for a number."""
    with contextlib.suppress(TypeError, ValueError):
        return float(value) if isinstance(value, str) else value
    return value


@dataclass(frozen=True)
class TrialSettings:
    """What one trial is made of. `drawn`: the searched keys with their values."""

    drawn: dict[str, Any]
    scan: ScanConfig
    shard: ShardConfig
    train: TrainConfig

    @property
    def of_data(self) -> dict[str, Any]:
        """The drawn settings of its data."""
        return {key: value for key, value in self.drawn.items() if not key.startswith("train.")}

    @property
    def data_identity(self) -> str:
        """Trials with the same one read the same shard set."""
        return sha256_json({"scan": identity(self.scan), "shard": identity(self.shard)})


def searches_data(config: TuneConfig) -> bool:
    """Whether trials may read shard sets of their own."""
    return any(not key.startswith("train.") for key in config.search)


def trials_of(config: TuneConfig, written: Mapping[str, Any]) -> tuple[dict[int, TrialSettings], dict[int, str]]:
    """The settings of every trial, and why some of them are none.

    `written` is what the story's files and `--set` say of each stage, without the defaults: those of another `kind` are
    others. Raises ConfigError when none is any good.
    """
    every: dict[int, TrialSettings] = {}
    refused: dict[int, str] = {}
    for number, drawn in enumerate(settings_of(config)):
        data: dict[str, Any] = {section: copy.deepcopy(dict(written[section])) for section in SECTIONS}
        try:
            for key, value in leaves(nested(drawn)):  # as `--set @best.yaml` will
                apply_override(data, key, json.dumps(value), SECTIONS)
            parsed: dict[str, Any] = {s: parse(kind, data[s], f"trial {number}") for s, kind in SECTIONS.items()}
            every[number] = TrialSettings(drawn, **parsed)
        except ConfigError as error:
            refused[number] = error.found.removeprefix(f"trial {number}: ")
    if not every:
        raise ConfigError(refused[0])
    return every, refused


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as sections. Outer ones come first, and first of each its `kind` or `preset`, which decide what else
    there is."""
    data: dict[str, Any] = {}
    order = sorted(settings, key=lambda key: (key.count("."), key.rpartition(".")[2] not in ("kind", "preset"), key))
    for key in order:
        apply_override(data, key, json.dumps(settings[key]))
    return data
