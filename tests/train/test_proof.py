"""What proves a resumed model: the parts of the probe batch whose records are the same."""

from __future__ import annotations

import json
import math

import pytest

from mmlm.train.proof import Part, Proof, parts_of, row

SAVED = [Part(1.0, ("a", "b")), Part(2.0, ("c", "d")), Part(3.0, ("e",))]


def test_what_a_checkpoint_tells_is_read_again_and_of_earlier_versions_too():
    told = json.loads(json.dumps(row(SAVED)))
    assert told["probe"] == 2.0 and parts_of(told) == SAVED
    assert parts_of({"probe": 2.5}) == [Part(2.5)]
    found = Proof(parts_of({"probe": 2.5}), [Part(2.5, ("a", "b"))])
    assert found.holds("fp32") and not found.named and not found.why()
    assert str(found) == "proved on the probe batch (loss 2.5000)"
    assert not Proof([Part(2.5)], [Part(2.6, ("a", "b"))]).holds("bf16")


def test_a_record_that_is_another_leaves_the_proof_to_the_other_parts():
    found = [Part(9.0, ("a", "z")), Part(2.0, ("c", "d")), Part(3.0, ("e",))]
    proof = Proof(SAVED, found)
    assert proof.holds("fp32") and proof.others == [(2, "b", "z")]
    assert str(proof) == "proved on 3 of 5 records of the probe batch (loss 2.5000)"
    assert proof.why()[0].startswith("record 2 of the probe batch was b when this was saved and is z now")
    assert not Proof(SAVED, [*found[:2], Part(3.1, ("e",))]).holds("fp32")


def test_without_a_part_that_is_the_same_nothing_is_proved_and_it_says_so():
    proof = Proof(SAVED, [Part(9.0, ("v", "w")), Part(9.0, ("x", "y")), Part(9.0, ("z",))])
    assert proof.holds("fp32") and str(proof).startswith("not proved")
    assert len(proof.why()) == 4 and proof.why()[3].startswith("2 more records")


@pytest.mark.parametrize(
    ("then", "now", "same"), [(math.nan, math.nan, True), (math.nan, 1.0, False), (1.0, math.nan, False)]
)
def test_a_loss_that_is_no_number_must_stay_none(then: float, now: float, same: bool):
    """A record may itself be poisoned; the other parts are held against each other all the same."""
    saved = [Part(then, ("a",)), SAVED[1]]
    assert Proof(saved, [Part(now, ("a",)), SAVED[1]]).holds("fp32") is same
    assert not Proof(saved, [Part(now, ("a",)), Part(2.5, ("c", "d"))]).holds("fp32")
