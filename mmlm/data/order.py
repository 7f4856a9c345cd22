"""Which sequences step N trains on: a pure function of (sizes of the streams, mixture, batch, seed, step).

Nothing of the size of an epoch is held, and step 1,000,000 costs what step 0 does: a place in an epoch is sent through
a keyed permutation (`shuffle`), and how much of each stream earlier batches took is counted in closed form (`Quotas`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mmlm.data.config import MixtureConfig, NaturalMixture, WeightedMixture
from mmlm.errors import ConfigError
from mmlm.storage import sha256_json

RECIPE = 2
"""Bumped when the same config and seed give another order."""
ROUNDS = 24
"""Of the Feistel network. A few are enough for many things (Luby & Rackoff 1988), but not for a handful: over 500,000
keys the permutations of seven were visibly not uniform with 16 rounds (chi-square 5.5 standard deviations off), and were
with 20 (0.2). A batch of 128 takes 0.5 ms."""
PERIOD = 1024
"""Batches after which quotas repeat; a weight is kept to 1 / (PERIOD x batch)."""

STAND_INS = 16
"""Damaged samples in a row, each standing in for the one before, after which the shards are given up."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """uint64 → uint64, each bit of the input changing half of the output: the finaliser of SplitMix64 (Steele, Lea &
    Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int | np.ndarray) -> np.ndarray:
    """One uint64 key out of whole numbers; where some are arrays, an array of keys."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = mix(key * np.uint64(3) + np.atleast_1d(np.asarray(part)).astype(np.uint64) + _GOLDEN)
    return key


def stand_ins(i: int, size: int) -> Iterator[int]:
    """Which of `size` samples are tried in the place of sample `i`, in their order; none where it is the only one."""
    for attempt in range(STAND_INS if size > 1 else 0):
        yield (i + 1 + int(key_of(4, i, attempt)[0] % np.uint64(size - 1))) % size


def shuffle(places: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of 0 … size-1 sends each of `places`. One key for all, or one each.

    A Feistel network over two digits of bases a and b, a·b just above `size`, whose rounds add modulo a and b by turns;
    what falls beyond `size` is sent through again until it does not (Black & Rogaway 2002, "Ciphers with arbitrary
    finite domains", methods 2 and 3). Less than one value in √size needs a second pass.
    """
    a = math.isqrt(max(size - 1, 0)) + 1
    a += a % 2  # an odd base only ever gives even permutations
    b = -(-size // a)
    x = np.asarray(places, np.int64).astype(np.uint64)
    keys = np.broadcast_to(key, x.shape)
    todo = np.arange(len(x))
    while len(todo):
        x[todo] = _rounds(x[todo], np.uint64(a), np.uint64(b), keys[todo])
        todo = todo[x[todo] >= np.uint64(size)]
    return x.astype(np.int64)


def _rounds(x: np.ndarray, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = x // b, x % b
    for n in range(ROUNDS):
        keys = keys + _GOLDEN
        if n % 2:
            np.remainder(right + mix(mix(keys) + left) % b, b, out=right)
        else:
            np.remainder(left + mix(mix(keys) + right) % a, a, out=left)
    return np.add(left * b, right, dtype=np.uint64)


class Quotas:
    """How many sequences of each batch come from each stream: whole numbers whose sum is the batch, in every batch
    within one of batch x weight, over PERIOD batches exactly PERIOD x batch x weight (rounded once)."""

    def __init__(self, weights: Sequence[float], batch: int) -> None:
        shares = np.array(weights, np.float64) / math.fsum(weights) * (PERIOD * batch)
        self.period = np.floor(shares).astype(np.int64)
        left_over = PERIOD * batch - int(self.period.sum())
        self.period[np.argsort(self.period - shares, kind="stable")[:left_over]] += 1
        edges = np.concatenate([[0], np.cumsum(self.period % PERIOD)])
        # systematic sampling: what is less than a whole sequence is laid end to end, and a comb with a tooth every
        # PERIOD picks; its offset takes each value once a period, spread by the golden ratio
        offsets = np.arange(PERIOD) * 633 % PERIOD
        teeth = -((offsets[:, None] - edges[None]) // PERIOD)
        self.table = self.period // PERIOD + np.diff(teeth, axis=1)
        self.sums = np.concatenate([np.zeros((1, len(shares)), np.int64), np.cumsum(self.table, axis=0)])

    def before(self, step: int) -> np.ndarray:
        """(streams,) sequences that the batches before `step` took of each."""
        periods, at = divmod(step, PERIOD)
        return periods * self.period + self.sums[at]

    def at(self, step: int) -> np.ndarray:
        """(streams,) sequences of batch `step`."""
        row: np.ndarray = self.table[step % PERIOD]
        return row


class Order:
    """Of each stream a new permutation every epoch; epochs follow each other without a gap.

    `sizes`: stream → how many sequences it has; a sequence's number counts through the streams in this order. `steps`
    is what the phases of a curriculum are shares of.
    """

    def __init__(
        self, sizes: Mapping[str, int], batch: int, seed: int, mixture: MixtureConfig | None = None, steps: int = 1
    ) -> None:
        self.names, self.sizes = tuple(sizes), np.array(list(sizes.values()), np.int64)
        self.batch, self.seed = batch, seed
        if not self.sizes.sum():
            raise ConfigError("an order of no sequences", wanted="at least one")
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        mixture = mixture or NaturalMixture()
        self.starts, phases = _phases(mixture, self.names, self.sizes, steps)
        self.quotas = [Quotas(weights, batch) for weights in phases]
        self.bases = [np.zeros(len(self.names), np.int64)]
        for quota, first, last in zip(self.quotas, self.starts, self.starts[1:], strict=False):
            self.bases.append(self.bases[-1] + quota.before(last - first))
        told = {"recipe": RECIPE, "seed": seed, "batch": batch, "sizes": dict(sizes), "starts": self.starts}
        self.digest = sha256_json({**told, "quotas": [q.period.tolist() for q in self.quotas]})
        """Hash of all that decides the order."""

    def taken(self, step: int) -> np.ndarray:
        """(streams,) sequences that the batches before `step` took of each."""
        phase = bisect_right(self.starts, step) - 1
        count: np.ndarray = self.bases[phase] + self.quotas[phase].before(step - self.starts[phase])
        return count

    def epochs(self, step: int) -> dict[str, float]:
        """stream → how often it was gone through before `step`."""
        return {name: int(t) / int(n) for name, t, n in zip(self.names, self.taken(step), self.sizes, strict=True) if n}

    def step(self, step: int) -> np.ndarray:
        """(batch,) numbers of the sequences of optimizer step `step`, counted from 0."""
        phase = bisect_right(self.starts, step) - 1
        counts = self.quotas[phase].at(step - self.starts[phase])
        firsts = self.taken(step)
        rows = []
        for stream in np.flatnonzero(counts):
            size = int(self.sizes[stream])
            at = firsts[stream] + np.arange(counts[stream])
            keys = key_of(self.seed, 1, int(stream), at // size)
            rows.append(self.offsets[stream] + shuffle(at % size, size, keys))
        found = np.concatenate(rows)
        if len(rows) > 1:  # no rank gets the first stream alone
            found = found[shuffle(np.arange(self.batch), self.batch, key_of(self.seed, 2, step))]
        return found


def _phases(
    mixture: MixtureConfig, names: Sequence[str], sizes: np.ndarray, steps: int
) -> tuple[list[int], list[list[float]]]:
    """The first step and the weights of each phase."""
    if isinstance(mixture, NaturalMixture):
        return [0], [[float(n) for n in sizes]]
    if isinstance(mixture, WeightedMixture):
        return [0], [_weights(mixture.weights, names, sizes)]
    total, share = sum(p.share for p in mixture.phases), 0.0
    starts: list[int] = []
    weights: list[list[float]] = []
    for phase in mixture.phases:
        first = round(steps * share / total)
        if starts and first == starts[-1]:  # too short for a step
            weights.pop(), starts.pop()
        starts.append(first)
        weights.append(_weights(phase.weights, names, sizes))
        share += phase.share
    return starts, weights


def _weights(given: Mapping[str, float], names: Sequence[str], sizes: np.ndarray) -> list[float]:
    """The weight of each stream. Raises ConfigError when one has none, or when a name is not there."""
    wanted = f"a weight for each of: {', '.join(names)}"
    for name in given:
        if name not in names:
            raise ConfigError(f"data.mixture names {name!r}, which the shards do not have", wanted=wanted)
    if missing := [name for name in names if name not in given]:
        raise ConfigError(f"data.mixture has no weight for {missing[0]!r}", wanted=wanted, cure="0 leaves it out")
    if empty := [name for name, n in zip(names, sizes, strict=True) if given[name] and not n]:
        raise ConfigError(f"{empty[0]!r} has a weight and no sequence", cure="give it 0, or look into the pack plan")
    if not sum(given.values()):
        raise ConfigError("all weights of data.mixture are 0", wanted=wanted)
    return [float(given[name]) for name in names]


def share(batch: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Part `part` of `parts` of a batch: contiguous, sizes differing by at most one."""
    return np.array_split(batch, parts)[part]
