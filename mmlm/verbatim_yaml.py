"""YAML whose texts stay as they were written. YAML 1.1 takes `12:00:00` for 43200 (base 60), `yes` for a truth and `2.60` for
2.6; where a config wants a text, that is what was written, and where it wants a list of texts, a list of one."""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import yaml

from mmlm.config import Config


@dataclass(frozen=True)
class _Scalar:
    value: Any
    """As YAML reads it."""
    text: str


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        try:
            value = super().construct_object(node, deep)
        except ValueError:  # such as 2026-13-45, which has the form of a date
            value = node.value
        return value if isinstance(value, _Scalar) else _Scalar(value, node.value)


def load(kind: type[Config], text: str) -> Any:
    """YAML as data for `kind`. Raises yaml.YAMLError."""
    return _settled(yaml.load(text, _Loader), [kind])


def read_value(kind: type[Config], dotted: str, raw: str) -> Any:
    """What `a.b=raw` sets in a `kind`. A text without quotes is all of `raw`, whatever YAML would make of it."""
    kinds: list[Any] = [kind]
    for step in dotted.split("."):
        kinds = _below(kinds, step)
    try:
        node, found = yaml.compose(raw, _Loader), yaml.load(raw, _Loader)
    except yaml.YAMLError:
        node, found = None, raw
    lists, texts = _lists_of_texts(kinds), str in kinds
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    listed = lists and isinstance(node, yaml.SequenceNode)
    nothing = isinstance(found, _Scalar) and found.value is None and (NoneType in kinds or lists)
    if (texts or lists) and not (quoted or listed or nothing):
        return raw if texts else [raw]
    return _settled(found, kinds)


def _settled(value: Any, kinds: list[Any]) -> Any:
    """`value`, for which each of `kinds` will do, without _Scalar."""
    if isinstance(value, dict):
        keys = {k: k.text if isinstance(k, _Scalar) else k for k in value}
        return {keys[k]: _settled(inner, _below(kinds, keys[k])) for k, inner in value.items()}
    if isinstance(value, list):
        inner = [t for one in kinds if get_origin(one) is list for t in _kinds(get_args(one)[0])]
        return [_settled(one, inner) for one in value]
    if not isinstance(value, _Scalar):
        return value
    if value.value is None and (NoneType in kinds or str not in kinds):
        return None
    if str in kinds:
        return value.text
    return [value.text] if _lists_of_texts(kinds) else value.value


def _kinds(annotation: Any) -> list[Any]:
    """`Annotated[str, …] | None` → [str, NoneType]."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if isinstance(annotation, type) or get_origin(annotation) in (list, dict):
        return [annotation]
    return [t for one in get_args(annotation) for t in _kinds(one)]


def _below(kinds: list[Any], key: str) -> list[Any]:
    """What may stand below `key` of a config or a mapping; nothing for a key that there is not, which `parse` tells."""
    found: list[Any] = []
    for one in kinds:
        if get_origin(one) is dict:
            found += _kinds(get_args(one)[1])
        elif isinstance(one, type) and issubclass(one, Config) and key in one.model_fields:
            found += _kinds(one.model_fields[key].annotation)
    return found


def _lists_of_texts(kinds: list[Any]) -> bool:
    return any(get_origin(one) is list and str in _kinds(get_args(one)[0]) for one in kinds)
