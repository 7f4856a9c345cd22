"""Any bytes at all may come from a corpus: readers and decoders answer with their own errors, and soon.

Here each target gets its seeds, what hypothesis makes of them, and every input that `python -m tests.fuzz.run` ever
found; the long search itself is that command.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmlm.corpus.select import find
from mmlm.features.sample import Sample
from mmlm.shards.codec import pack, unpack
from mmlm.shards.tar import TarWriter, members
from tests.fuzz.run import mutate
from tests.fuzz.targets import SECONDS, SLOWER, TARGETS, check, regressions

QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_what_becomes_of_them(name: str) -> None:
    source = random.Random(name)
    seeds = TARGETS[name].seeds()
    assert seeds
    for data in [*seeds, *(mutate(source.choice(seeds), seeds, source) for _ in range(40))]:
        began = time.process_time()
        check(name, data)
        assert time.process_time() - began < SLOWER.get(name, SECONDS), data[:80]


@pytest.mark.parametrize("name", TARGETS)
@QUICK
@given(data=st.binary(max_size=2048))
def test_any_bytes(name: str, data: bytes) -> None:
    check(name, data)


@pytest.mark.parametrize(("name", "path"), [pytest.param(n, p, id=f"{n}-{p.name}") for n, p in regressions()])
def test_what_was_found_once(name: str, path: Path) -> None:
    began = time.process_time()
    check(name, path.read_bytes())
    assert time.process_time() - began < SLOWER.get(name, SECONDS)


@QUICK
@given(st.dictionaries(st.from_regex(r"[a-z0-9]{1,20}\.[a-z]{1,5}", fullmatch=True), st.binary(max_size=2000)))
def test_what_the_tar_writer_writes_is_read_back(contents: dict[str, bytes]) -> None:
    import io

    held = io.BytesIO()
    tar = TarWriter(held)
    for name, content in contents.items():
        tar.add(name, content)
    tar.close()
    data = held.getvalue()
    assert {name: data[at : at + size] for name, at, size in members(held)} == contents


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@QUICK
@given(_JSON, st.text(alphabet="ab.[]*=,-01{} ", max_size=20))
def test_any_selector_in_any_row(row: object, selector: str) -> None:
    assert all(value is not None for value in find(row, selector))


@QUICK
@given(st.text(max_size=40), st.integers(1, 30), st.integers(1, 12), st.sampled_from([1, 3]), st.randoms())
def test_samples_come_back_as_they_were(
    text: str, frames: int, side: int, channels: int, source: random.Random
) -> None:
    import numpy as np

    rng = np.random.default_rng(source.randrange(1 << 30))
    text = text.encode("utf-8", "replace").decode()
    sample = Sample(
        text, "task", rng.integers(0, 99, frames).astype(np.int32), 0,
        [rng.integers(0, 256, (side, side, channels)).astype(np.uint8)],
        [rng.standard_normal((frames, 8)).astype(np.float16)], {text: None}, [(0, 1)], answer=text,
    )  # fmt: skip
    back = unpack(pack(sample))
    assert (back.id, back.fields, back.answer, back.context_spans) == (text, {text: None}, text, [(0, 1)])
    assert (back.tokens == sample.tokens).all()
    assert (back.images[0] == sample.images[0]).all() and (back.sounds[0] == sample.sounds[0]).all()
