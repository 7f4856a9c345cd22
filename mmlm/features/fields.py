"""Named numbers and categories: checked and carried as they are; batches standardise and number them."""

from __future__ import annotations

import math

from mmlm.corpus.records import LARGEST
from mmlm.features.spec import FieldsSpec

Value = float | str | None


def read_fields(values: dict[str, Value], spec: FieldsSpec) -> dict[str, Value]:
    """Every name of the spec → its number, its category, or None when it is missing; other names are left out.

    A value of the other type (a word where numbers stand) counts as missing, as it does in the manifest's figures.
    """
    return {
        **{name: _number(values.get(name)) for name in sorted(spec.numbers)},
        **{name: _category(values.get(name)) for name in sorted(spec.categories)},
    }


def _number(value: Value) -> float | None:
    try:
        number = float(value) if value is not None else math.nan
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None  # neither is infinity, nor what is not a number


def _category(value: Value) -> str | None:
    return value if isinstance(value, str) and value else None
