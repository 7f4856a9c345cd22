"""Maker: the part of a step's batch that one rank works on, as arrays. The same in this process and in a worker."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmlm.data.arrays import Empty, assemble
from mmlm.data.augment import augment
from mmlm.data.config import BestFitPacking, DataConfig
from mmlm.data.modalities import drop_modalities, expected_loss, keep_modalities
from mmlm.data.order import STAND_INS, Order, key_of, share, stand_ins
from mmlm.data.plan import WHOLE, Plan
from mmlm.data.reader import ShardReader
from mmlm.errors import DataError, MmlmError
from mmlm.features.borders import with_borders
from mmlm.features.sample import Sample

AHEAD = 4
"""Batches whose shards are fetched together, where they lie elsewhere."""
NEAR = 32
"""Samples of about the wanted length among which a stand-in is chosen."""
LOOKED_AT = 64
"""Records of each stream by which it is told beforehand what modality dropout takes away."""


@dataclass(frozen=True)
class Share:
    """Which part of a step's batch: that of `rank` of `ranks`, and of it `piece` of `pieces`."""

    rank: int = 0
    ranks: int = 1
    piece: int = 0
    pieces: int = 1

    def of(self, batch: np.ndarray) -> np.ndarray:
        return share(share(batch, self.rank, self.ranks), self.piece, self.pieces)


class Maker:
    """Makes batches: a pure function of the step, of the share, and of what it is made with."""

    def __init__(self, reader: ShardReader, plan: Plan | None, config: DataConfig, seed: int, steps: int) -> None:
        self.reader, self.plan, self.config, self.seed = reader, plan, config, seed
        sizes = plan.sizes if plan else {"all": len(reader)}
        self.order = Order(sizes, config.batch, seed, config.mixture, steps)
        self.damaged: dict[int, str] = {}
        """Samples that could not be read → where they are stored, and why not."""
        self._noted: set[int] = set()
        self.notes: list[str] = []
        """What is to be logged of them, each once; whoever does so empties it."""
        self._by_length: dict[int, tuple[int, np.ndarray]] = {}

    def make(self, step: int, part: Share, empty: Empty = np.empty) -> tuple[dict[str, np.ndarray], list[str]]:
        """(arrays, ids of all records and pieces) of that part of step `step`'s batch; `empty` as of `assemble`."""
        places = np.arange(step * self.config.batch, (step + 1) * self.config.batch)
        rows = zip(part.of(self.order.step(step)).tolist(), part.of(places).tolist(), strict=True)
        self._fetch_ahead(step, part)
        sequences = [self._sequence(number, place) for number, place in rows]
        ids = [s.id for samples in sequences for s in samples]
        length = self.plan.length if self.plan and isinstance(self.config.pack, BestFitPacking) else None
        return assemble(sequences, self.reader.spec, length, empty=empty), ids

    def _fetch_ahead(self, step: int, part: Share) -> None:
        """Let the shards of this batch and of some after it be fetched side by side, where they lie elsewhere."""
        if self.reader.files.remote:
            numbers = np.concatenate([part.of(self.order.step(later)) for later in range(step, step + AHEAD)])
            if self.plan:
                rows = [self.plan.rows(n) for n in numbers]
                numbers = np.concatenate([self.plan.sample[r.start : r.stop] for r in rows])
            self.reader.ahead(numbers)

    def _sequence(self, number: int, place: int) -> list[Sample]:
        """The samples of sequence `number`, changed as training wants it; `place` is its place in the whole training."""
        samples = self._packed(number) if self.plan else [self.record(number)]
        changed = []
        for n, sample in enumerate(samples):
            rng = np.random.default_rng((self.seed, 2, place, n) if n else (self.seed, 2, place))
            kept = sample if sample.answer_at < 0 else drop_modalities(sample, self.config.modality_dropout, rng)
            # what of a picture is left out is found before it is changed, as an evaluation finds it
            changed.append(augment(with_borders(kept, self.reader.spec), self.config.augment, rng))
        return changed

    def _read(self, i: int) -> Sample | None:
        """Sample `i`, or None when it is damaged."""
        if i in self.damaged:
            return None
        try:
            return self.reader[i]
        except DataError as error:
            self.damaged[i] = f"{self.reader.place(i)} is damaged ({error.found})"
            return None

    def record(self, i: int) -> Sample:
        """Sample `i`; for a damaged one another, the same wherever and whenever it is met."""
        found = self._read(i)
        for other in stand_ins(i, len(self.reader)):
            if found is not None:
                break
            found = self._read(other)
        if i in self.damaged:
            self._note(i, found)
        return found or self._give_up(i)

    def cut(self, sample: Sample) -> Sample:
        """`sample`, or where shards keep what is longer than a sequence, as many of its words as one holds."""
        from mmlm.features.encode import opened_length  # here, since it brings the decoders of all media

        length = (self.plan.length if self.plan else None) or self.reader.spec.max_len
        if not self.plan or opened_length(sample, self.reader.spec) <= length:
            return sample
        return _part(keep_modalities(sample, {"context"}), 0, length)

    def _note(self, i: int, stand_in: Sample | None) -> None:
        if i not in self._noted:
            self._noted.add(i)
            self.notes.append(f"{self.damaged[i]}; {stand_in.id if stand_in else 'nothing'} stands in for it")

    def _packed(self, number: int) -> list[Sample]:
        plan = self.plan
        assert plan
        rows = plan.rows(number)
        free = (plan.length or self.reader.spec.max_len) - int(plan.opened[rows.start : rows.stop].sum())
        samples: list[Sample] = []
        for row in rows:
            found, used = self._piece(row), int(plan.opened[row])
            if found is None:
                found, used = self._stand_in(number, row, free + used)
                self._note(int(plan.sample[row]), found)
            if found is not None:
                samples.append(found)
            free += int(plan.opened[row]) - used
        return samples or [self._give_up(int(plan.sample[rows.start]))]

    def _piece(self, row: int) -> Sample | None:
        """What a row of the plan stands for: a record, or a piece of one."""
        assert self.plan
        sample, first, last = (
            self._read(int(self.plan.sample[row])),
            int(self.plan.first[row]),
            int(self.plan.last[row]),
        )
        if sample is None or last == WHOLE:
            return sample
        return _part(sample, first, last)

    def _stand_in(self, number: int, bad: int, room: int) -> tuple[Sample | None, int]:
        """A sample of the same stream in the place of row `bad`, about as long as there is room, and its length.

        (None, 0) when there is none that fits: the sequence then goes without.
        """
        assert self.plan
        base, order = self._lengths_of_stream(number)
        lengths = self.plan.opened[base + order]
        fit = int(np.searchsorted(lengths, room, "right"))
        for attempt in range(STAND_INS if fit else 0):
            back = int(key_of(4, bad, attempt)[0] % np.uint64(min(fit, NEAR)))
            row = base + int(order[fit - 1 - back])
            found = self._piece(row)
            if found is not None:
                return found, int(self.plan.opened[row])
        return None, 0

    def _lengths_of_stream(self, number: int) -> tuple[int, np.ndarray]:
        """The first row of the stream that sequence `number` belongs to, and its rows from the shortest to the longest."""
        assert self.plan
        stream = int(np.searchsorted(self.order.offsets, number, "right")) - 1
        if stream not in self._by_length:
            first = int(self.order.offsets[stream])
            start, stop = self.plan.starts[first], self.plan.starts[first + int(self.order.sizes[stream])]
            self._by_length[stream] = (int(start), np.argsort(self.plan.opened[start:stop], kind="stable"))
        return self._by_length[stream]

    def emptied(self, taken: Sequence[int]) -> float | None:
        """About which share of the positions modality dropout empties after they were planned, when each stream gives
        `taken` sequences; None where that cannot be told without fetching shards, or sequences have no length.
        """
        plan, rate = self.plan, self.config.modality_dropout
        if not plan or not plan.length or self.reader.files.remote:
            return None
        lost = 0.0
        with contextlib.suppress(MmlmError):  # a shard that cannot be read is told of when a batch wants it
            for first, size, count in zip(self.order.offsets, self.order.sizes, taken, strict=True):
                start, stop = int(plan.starts[first]), int(plan.starts[first + size])
                looked = np.unique(np.linspace(start, stop - 1, LOOKED_AT).astype(int)).tolist() if count else []
                found = [s for s in map(self._piece, looked) if s is not None]
                each = [expected_loss(s, rate, self.reader.spec) for s in found if s.answer_at >= 0]
                lost += sum(each) / max(len(found), 1) * (stop - start) / max(int(size), 1) * count
            return lost / max(sum(taken) * plan.length, 1)
        return None

    def _give_up(self, i: int) -> Sample:
        raise DataError(
            f"{self.damaged[i]}, and so is what would stand in for it", cure="run `mmlm verify` on the shard set"
        )


def _part(sample: Sample, first: int, last: int) -> Sample:
    """Some tokens of a text, each of which is learnt from."""
    return dataclasses.replace(
        sample, id=f"{sample.id}#{first}-{last}", tokens=sample.tokens[first:last], answer_at=-1, context_spans=[],
        label=None, labels=None, number=None, answer=None,
    )  # fmt: skip
