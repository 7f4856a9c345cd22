"""The `fields` of a question: named numbers and categories, as a mapping or as JSON text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from mmlm.corpus.records import LARGEST
from mmlm.errors import DataError
from mmlm.features.spec import FieldsSpec


def read_asked(value: Any, spec: FieldsSpec | None) -> dict[str, float | str | None]:
    """name → number, category or None. Raises DataError with a sentence for the person who asked.

    Names that the model does not know are refused, since a misspelt one would silently count as missing; so is a value
    of the wrong type. A category that training never saw counts as missing, as it does in training.
    """
    if spec is None:
        raise DataError("this model takes no fields", cure="ask without fields")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError("the fields are not JSON", wanted='an object such as {"age": 50}') from None
    if not isinstance(value, Mapping):
        raise DataError(f"the fields are a {type(value).__name__}", wanted='an object such as {"age": 50}')
    if unknown := sorted(str(name) for name in value if name not in spec.names):
        known = ", ".join(spec.names[:20]) + (" …" if len(spec.names) > 20 else "")
        raise DataError(f"unknown field {', '.join(unknown[:5])}", wanted=f"fields among {known}")
    return {str(name): _checked(str(name), one, spec) for name, one in value.items()}


def _checked(name: str, value: Any, spec: FieldsSpec) -> float | str | None:
    if value is None or (isinstance(value, float) and value != value):
        return None
    if name in spec.numbers:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= LARGEST:
            raise DataError(
                f"the field {name} is {str(value)[:40]!r}", wanted=f"a number, of the size {LARGEST:g} at most"
            )
        return number
    if not isinstance(value, str):
        raise DataError(f"the field {name} is {value!r}", wanted="a text in quotes: it is a category")
    return value
