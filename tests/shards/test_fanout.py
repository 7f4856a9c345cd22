"""What is on its way at a time is bounded by bytes and by number; and which units are called stragglers."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator

import pytest

from mmlm.shards.fanout import through_window
from mmlm.shards.shard import stragglers


class Work:
    """Items that are done in a random order, and the most that was ever on its way."""

    def __init__(self, sizes: list[int], seed: int) -> None:
        self.sizes, self.rng = sizes, random.Random(seed)
        self.taken, self.finished, self.under_way = 0, 0, set[int]()
        self.most, self.most_bytes = 0, 0

    def items(self) -> Iterator[tuple[int, int]]:
        for i, size in enumerate(self.sizes):
            self.taken += 1
            yield i, size

    def begin(self, item: int) -> int:
        self.under_way.add(item)
        self.most = max(self.most, len(self.under_way))
        held = sum(self.sizes[i] for i in self.under_way)
        if len(self.under_way) > 1:
            self.most_bytes = max(self.most_bytes, held)
        return item

    def next_of(self, waiting: Collection[int]) -> tuple[int, int]:
        assert set(waiting) == self.under_way
        assert self.taken <= len(self.under_way) + self.finished + 1  # one more is looked at, for its size
        item = self.rng.choice(sorted(waiting))
        self.under_way.discard(item)
        self.finished += 1
        return item, item


@pytest.mark.parametrize("seed", range(5))
def test_every_unit_once_and_never_more_bytes_on_the_way_than_allowed(seed: int) -> None:
    sizes = random.Random(seed).choices([0, 1, 10, 40, 99, 100, 250], k=200)
    work = Work(sizes, seed)
    results = list(through_window(work.items(), work.begin, work.next_of, 4, 100))
    assert sorted(results) == list(range(200))
    assert work.most_bytes <= 100 and work.most == 4


def test_a_unit_larger_than_the_window_goes_alone_and_holds_up_what_follows() -> None:
    work = Work([10, 500, 10, 10], 0)
    results = through_window(work.items(), work.begin, work.next_of, 8, 100)
    assert next(results) == 0  # the large one waits for the small one before it
    assert next(results) == 1 and work.taken == 3  # and alone in the window it lets nothing else in
    assert sorted(results) == [2, 3]


def row(name: str, seconds: float, records: int = 10, worker: str = "here/1") -> dict[str, object]:
    return {"name": name, "seconds": seconds, "records": records, "worker": worker, "bytes": 1000}


def test_stragglers_are_slow_by_the_record_and_worth_a_word() -> None:
    rows = [row(f"u{k}", 2.0) for k in range(5)]
    rows += [row("slow", 6.0), row("slower", 9.0, worker="here/2"), row("large", 20.0, records=100)]
    found = stragglers([*rows, {"name": "adopted", "seconds": None, "records": 5}])
    assert [(s["shard"], s["times_median"], s["worker"]) for s in found["slow"]] == [
        ("slower", 4.5, "here/2"), ("slow", 3.0, "here/1"),
    ]  # fmt: skip
    assert found["units"] == 8 and found["median_milliseconds_a_record"] == 200.0
    assert found["seconds_by_worker"] == {"here/1": 36.0, "here/2": 9.0}


def test_units_of_under_a_second_are_no_stragglers_and_nothing_written_gives_no_report() -> None:
    assert stragglers([row("a", 0.1), row("b", 0.1), row("c", 0.9)])["slow"] == []
    assert stragglers([{"name": "adopted", "seconds": None, "records": 5}]) == {}
