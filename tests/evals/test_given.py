"""Every row has one name, and every name one row."""

from __future__ import annotations

from mmlm.evals.given import plan_passes, row_name


def named(present: dict[str, set[str]], wanted: list[list[str]] | None) -> list[tuple[str, str]]:
    passes = plan_passes({t: frozenset(m) for t, m in present.items()}, wanted)
    return [(task, name) for p in passes for task, name in p.names.items()]


def test_names_are_in_one_order() -> None:
    assert row_name(["audio", "image"]) == "text+image+audio"
    assert row_name([]) == "text"
    assert row_name(["video", "context", "fields"]) == "text+context+fields+video"


def test_two_modalities_make_three_rows() -> None:
    assert named({"digit": {"image", "audio"}}, None) == [
        ("digit", "text+image+audio"), ("digit", "text+image"), ("digit", "text+audio"),
    ]  # fmt: skip


def test_three_modalities_also_lose_one_each() -> None:
    rows = named({"t": {"image", "audio", "context"}}, None)
    assert len(rows) == 7
    assert len(set(rows)) == 7


def test_one_or_no_modality_makes_one_row() -> None:
    assert named({"a": {"image"}, "b": set()}, None) == [("a", "text+image"), ("b", "text")]


def test_wanted_sets_are_cut_to_what_is_there_and_never_doubled() -> None:
    wanted = [["image", "audio", "context"], ["image", "audio"], ["image"], ["audio"], ["fields"]]
    rows = named({"digit": {"image", "audio"}, "mood": set(), "name": {"image", "audio", "context"}}, wanted)
    assert len(rows) == len(set(rows))
    assert ("digit", "text+image+audio") in rows
    assert ("name", "text+context+image+audio") in rows
    assert ("name", "text+image+audio") in rows
    assert ("mood", "text") in rows


def test_a_record_needs_one_of_what_is_given() -> None:
    everything, image, audio = plan_passes({"digit": frozenset({"image", "audio"})}, None)
    assert everything.takes("digit", ())
    assert image.takes("digit", ("image",))
    assert not image.takes("digit", ("audio",))
    assert not audio.takes("other", ("audio",))
