"""What may stand for a field in a question, and in a corpus."""

from __future__ import annotations

from typing import Any

import pytest

from mmlm.corpus.drafts import RefuseError, as_field, as_number
from mmlm.data.arrays import FARTHEST
from mmlm.data.collate import collate
from mmlm.errors import DataError
from mmlm.features.spec import FieldsSpec
from mmlm.publish.asked_fields import read_asked
from tests.small import SPEC as SMALL
from tests.small import sample

SPEC = FieldsSpec(numbers={"age": (50.0, 10.0)}, categories={"colour": ["blue", "red"]})


@pytest.mark.parametrize(
    ("said", "wanted"), [({"age": 7}, 7.0), ({"age": "7.5"}, 7.5), ({"age": None}, None), ('{"age": 1e30}', 1e30)]
)
def test_numbers_are_taken(said: Any, wanted: float | None) -> None:
    assert read_asked(said, SPEC) == {"age": wanted}


@pytest.mark.parametrize("said", [1e300, 10**400, "inf", "nan", "1e999", True, "old", [1]])
def test_what_is_no_number_for_a_model_is_refused(said: Any) -> None:
    with pytest.raises(DataError, match=r"the field age is .*wanted a number"):
        read_asked({"age": said}, SPEC)


@pytest.mark.parametrize("said", ["1e300", -1e31, str(10**400)])
def test_so_it_is_in_a_corpus(said: Any) -> None:
    for read in (as_number, as_field):
        if said == str(10**400) and read is as_field:
            assert read(said) is None  # infinite, as a field without a value
            continue
        with pytest.raises(RefuseError) as caught:
            read(said)
        assert caught.value.reason == "bad_value"


def test_the_farthest_number_is_one_for_the_model() -> None:
    spec = SMALL.model_copy(update={"fields": FieldsSpec(numbers={"age": (0.0, 1e-12)}, categories={})})
    one = sample(0, ("fields",))
    one.fields = {"age": 1e30}
    assert collate([one], spec).values_K.tolist() == [FARTHEST]
