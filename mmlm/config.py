"""Frozen config models, YAML files and `key=value` overrides, with every problem listed at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import pydantic
import yaml

from mmlm.errors import ConfigError


class Config(pydantic.BaseModel):
    """Base of every config: immutable; unknown keys, infinities and NaN refused. A field's meaning stands in the string under
    it."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    how_it_runs: ClassVar[tuple[str, ...]] = ()
    """Fields that say how the work is done and what is kept on the way; what comes of it they change no more than another
    number of ranks does, so they are no part of what a noun is. Of this config's own fields only, each with all below it."""
    added: ClassVar[tuple[str, ...]] = ()
    """Fields that came later, and whose default is what was done before there was such a field, and stays so. With their default
    they are no part of what a noun is either: one that was made or begun before them is found again."""


C = TypeVar("C", bound=Config)


NAMED_IN = "`--help` and the comments in jobs/configs/ name every key"


def parse(kind: type[C], data: Any, where: str, cure: str = NAMED_IN) -> C:
    """`data` as a `kind`, or one ConfigError that lists every problem in it. `where` names the file or flag, `cure` what names
    the keys."""
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{where} holds {type(data).__name__}", wanted="a mapping of keys to values")
    try:
        return kind.model_validate(data)
    except pydantic.ValidationError as error:
        raise ConfigError(
            f"{where}: " + " · ".join(_problem(kind, e) for e in error.errors()),
            cure=cure,
        ) from None


def _problem(kind: type[Config], error: Any) -> str:
    location = list(error["loc"])
    key = ".".join(map(str, _walk(kind, location)[1]))
    if error["type"] == "extra_forbidden":
        parent, _ = _walk(kind, location[:-1])
        names = list(parent.model_fields) if parent else []
        close = difflib.get_close_matches(str(location[-1]), names, 1, 0.5)
        hint = f", did you mean `{close[0]}`?" if close else f" (known: {', '.join(names)})" if names else ""
        return f"unknown key `{key}`{hint}"
    if error["type"] == "missing":
        return f"`{key}` is missing"
    if error["type"] == "union_tag_invalid":
        wrong, names = str(error["ctx"]["tag"]), re.findall(r"'([^']+)'", error["ctx"]["expected_tags"])
        close = difflib.get_close_matches(wrong, names, 1, 0.5)
        hint = f", did you mean {close[0]!r}?" if close else ""
        return f"`{key}`: there is no {wrong!r}{hint} (known: {', '.join(names)})"
    told = str(error["msg"]).removeprefix("Value error, ")
    if not key:  # of several keys at the top, which it names itself
        return told
    value = repr(error.get("input"))
    return f"`{key}` = {value[:60]}: {told}"


def _walk(kind: type[Config], location: list[Any]) -> tuple[type[Config] | None, list[Any]]:
    """The config class at `location`, and the keys on the way as a person wrote them: pydantic puts the `kind` of a union's
    choice between them."""
    here: Any = kind
    written: list[Any] = []
    for step in location:
        options = [t for t in _types(here) if isinstance(t, type) and issubclass(t, Config)]
        tagged = [t for t in options if "kind" in t.model_fields and step in _literal(t)]
        if tagged:
            here = tagged[0]
            continue
        written.append(step)
        if not isinstance(step, int):
            owner = next((t for t in options if step in t.model_fields), None)
            here = owner.model_fields[step].annotation if owner else None
    options = [t for t in _types(here) if isinstance(t, type) and issubclass(t, Config)]
    return options[0] if options else None, written


def _types(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [t for arg in get_args(annotation) for t in _types(arg)]


def _literal(kind: type[Config]) -> tuple[Any, ...]:
    return get_args(kind.model_fields["kind"].annotation)


def read_yaml(path: Path, load: Callable[[str], Any] = yaml.safe_load) -> Any:
    """The content of a YAML file. Raises ConfigError with line and column when it is not YAML."""
    try:
        return load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}", cure="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{at} is not YAML: {getattr(error, 'problem', error)}") from None


DECIDED_BY_PRESET = frozenset(
    {"width", "layers", "encoder_layers", "heads", "kv_heads", "mlp_width", "qk_norm", "layout", "mlp", "norm",
     "norm_at", "positions"}
)  # fmt: skip
"""Keys of a model that a preset says something of."""


def _read(raw: str) -> Any:
    try:
        return yaml.safe_load(raw)
    except yaml.YAMLError:
        return raw


def apply_override(
    data: dict[str, Any], dotted: str, raw: str, kinds: Mapping[str, type[Config]] | None = None,
    read: Callable[[str], Any] = _read,
) -> None:  # fmt: skip
    """Set `a.b.c` in nested `data` to `raw`, by default read as YAML (so `3`, `true`, `[1, 2]` and `text` are what they look
    like).

    A `preset` replaces what was said before it of what it decides. With `kinds`, the config of each key of `data`, a
    `kind` takes away what was said before it that only other kinds have, and `fusion: concat` may be gone into as
    `fusion: {kind: concat}`.
    """
    *path, last = dotted.split(".")
    here = data
    for depth, step in enumerate(path):
        following = here.get(step)
        if isinstance(following, str) and any(following in _names(c) for c in _choices(kinds, path[: depth + 1])):
            following = here[step] = {"kind": following}
        if following is None:
            following = here[step] = {}
        if not isinstance(following, dict):
            raise ConfigError(f"--set {dotted}: `{step}` is a value, not a section")
        here = following
    value = read(raw)
    others = DECIDED_BY_PRESET if last == "preset" else frozenset[str]()
    if last == "kind":
        others = _only_of_others(_choices(kinds, path), value)
    for key in others & here.keys():
        del here[key]
    here[last] = value


def _choices(kinds: Mapping[str, type[Config]] | None, path: list[str]) -> list[type[Config]]:
    """The configs that may stand at `path`, of which a union has several."""
    found = [kinds[path[0]]] if kinds and path and path[0] in kinds else []
    for step in path[1:]:
        inner = [t for c in found if step in c.model_fields for t in _types(c.model_fields[step].annotation)]
        found = [t for t in inner if issubclass(t, Config)]
    return found


def _names(choice: type[Config]) -> tuple[Any, ...]:
    return _literal(choice) if "kind" in choice.model_fields else ()


def _only_of_others(choices: list[type[Config]], kind: Any) -> frozenset[str]:
    """Keys that no choice named `kind` has, and another one has; none where nothing is named so, which `parse` tells."""
    chosen = [c for c in choices if kind in _names(c)]
    keys = {key for c in choices for key in c.model_fields} if chosen else set()
    return frozenset(keys.difference(*(c.model_fields for c in chosen)))


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` → ("a.b", 1): what a file of settings changes, key by key in its order.

    A mapping with keys that no setting is named by, such as the pattern `blocks.*`, is a value.
    """
    for key, value in values.items():
        if isinstance(value, dict) and value and all(re.fullmatch(r"[A-Za-z_]\w*", str(k)) for k in value):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def split_override(text: str, flag: str = "--set", like: str = "train.seed=1") -> tuple[str, str]:
    """`train.seed=1` → ("train.seed", "1"). Raises ConfigError, which names `flag` and an example, where there is no such key."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", key.strip()):
        raise ConfigError(f"{flag} {text!r}", wanted=f"key=value, such as {like}")
    return key.strip(), value.strip()


# From the beginning of a word only, since the text may be a media cell of megabytes: each letter of it could begin a scheme.
_CREDENTIALS = re.compile(r"(?<![\w+.-])(?=[\w+.-]*?[a-zA-Z])(?P<scheme>[\w+.-]*+://)[^/@\s]++@")


_SIGNATURE = re.compile(
    r"(?i)(x-(amz|goog|oss|cos)-|awsaccesskeyid|googleaccessid|(access_?)?(token|key)=|api_?key|signature|sig=|s[eprtv]{1,2}=|"
    r"expires|policy|key-pair-id)"
)
"""What signs an address: Amazon, Google, Azure, CloudFront and others."""


def blank_credentials(text: str) -> str:
    """`s3://key:secret@bucket/x` → `s3://***@bucket/x`; stored and logged configs never carry secrets."""
    return _CREDENTIALS.sub(r"\g<scheme>***@", text)


def unsigned(uri: str) -> str:
    """A web address without the signature in its query: a name that stays the same, and that can be shown."""
    place, mark, query = uri.partition("?")
    if not mark or not place.lower().startswith(("http://", "https://")):
        return uri
    left = [pair for pair in query.split("&") if not _SIGNATURE.match(pair)]
    return place + "?" + "&".join(left) if left else place


def resolved(config: Config) -> dict[str, Any]:
    """The config as plain JSON values, credentials blanked and signatures left out: what is stored and logged."""

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return blank_credentials(unsigned(value))
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, list):
            return [clean(v) for v in value]
        return value

    return clean(config.model_dump(mode="json"))


def identity(config: Config) -> dict[str, Any]:
    """`resolved(config)` without how it runs, and without what came later and is not made use of: what a noun's fingerprint is
    made of."""
    return {key: value for key, value in _used(config, resolved(config)).items() if key not in config.how_it_runs}


def _used(value: Any, plain: Any) -> Any:
    """`plain`, which is `value` in JSON values, without fields of `added` that have their default, at any depth."""
    if isinstance(value, Config):
        fields = type(value).model_fields
        return {
            key: _used(getattr(value, key), inner)
            for key, inner in plain.items()
            if key not in value.added or getattr(value, key) != fields[key].get_default(call_default_factory=True)
        }
    if isinstance(value, list | tuple):
        return [_used(one, inner) for one, inner in zip(value, plain, strict=True)]
    if isinstance(value, dict):
        return {key: _used(one, inner) for (key, inner), one in zip(plain.items(), value.values(), strict=True)}
    return plain
