"""Which split a group falls into where the data do not say: a stable hash, with a fallback for small corpora.

Groups that share a picture, a sound or a video fall into one split too: such groups are one clump, which is placed by
the hash of its first name, as a group by itself is by the hash of its own.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from mmlm.corpus.config import SplitConfig
from mmlm.corpus.records import SPLITS
from mmlm.storage import sha256_bytes

LARGE = 0.2
"""A clump of more than this share of all groups is for training, whatever its hash says."""


def position(group: str, salt: str) -> float:
    """A number in [0, 1) that depends on the group's name alone."""
    return int(sha256_bytes(f"{salt}\0{group}".encode())[:13], 16) / 16**13


class Splitter:
    """Sees every record once (`note`), then decides (`decide`); afterwards `split_of` answers for each record.

    Keeps one entry per group in memory, some 200 bytes each, and 16 bytes for each use of a picture, sound or video.
    """

    def __init__(self, config: SplitConfig) -> None:
        self.config = config
        self.given: dict[str, str] = {}
        self.torn: set[str] = set()
        self.named: set[str] = set()
        """Splits that the data give, be it only to some records of a torn group."""
        self.chosen: dict[str, str] = {}
        self.joined = self.apart = self.across = 0
        """Groups that share media with others and share their split; those that do not, since nothing would be left to test
        on; and the pictures, sounds and videos that lie in two splits, which the data give or because of the former."""
        self.files, self.owners = array("Q"), array("Q")

    def note(self, group: str, split: str, media: Iterable[str] = ()) -> None:
        """A record of `group` whose data give `split` ("" when they give none); `media` are the hashes of its files."""
        before = self.given.get(group, "")
        if split:
            self.named.add(split)
        if split and before and split != before:
            self.torn.add(group)
            split = min(split, before, key=SPLITS.index)
        self.given[group] = split or before
        for digest in media if self.config.shared_media else ():
            self.files.append(int(digest[:16], 16))
            self.owners.append(_number(group))

    def decide(self) -> None:
        """Fix the split of every group. Each split gets a group where there are three or more to choose from."""
        config = self.config
        shares = {"val": config.val, "test": config.test}
        free = {g for g, s in self.given.items() if not s}
        shared = self._shared()
        clumps = self._clumps(shared)
        follow = self._following(clumps, free)
        if config.fill and "train" in self.named and not free - follow.keys():
            shares = {s: share for s, share in shares.items() if s not in self.named}
            # a torn group keeps what the data give, record by record
            given = {g: s for g, s in self.given.items() if g not in self.torn} | follow
            free = {g for g, s in given.items() if s == "train"} if shares else set()
        else:
            free -= follow.keys()
        units = _units(clumps, free)
        placed = {g for unit in units.values() for g in unit}
        taken = {s for g, s in (self.given | follow).items() if s and g not in placed}
        chosen = self._placed(units, shares, taken)
        self.chosen = follow | {g: split for unit, split in chosen.items() for g in units[unit]}
        self._count(shared, clumps)

    def _placed(self, units: dict[str, list[str]], shares: dict[str, float], taken: set[str]) -> dict[str, str]:
        """unit → split, where `taken` splits have something already."""
        at = {unit: position(unit, self.config.salt) for unit in units}
        ranked = sorted(units, key=lambda unit: (at[unit], unit))
        large = LARGE * max(2, len(self.given))
        chosen = {u: "train" if 1 < len(units[u]) > large else self.by_hash(at[u], shares) for u in ranked}
        taken |= {*chosen.values()}
        wanted = [s for s in ("train", "test", "val") if s == "train" or shares.get(s, 0) > 0]
        for split in wanted:
            if split not in taken and len(chosen) >= (3 if split == "val" else 2):
                sizes = {s: sum(c == s for c in chosen.values()) for s in SPLITS}
                largest = max(SPLITS, key=lambda s: sizes[s])
                if sizes[largest] > 1:
                    movable = [u for u in ranked if chosen[u] == largest]
                    chosen[min(movable, key=lambda u: len(units[u]) > large)] = split
                    taken.add(split)
        if "train" not in taken and chosen:  # one or two groups: training comes first
            chosen[next((u for u in ranked if chosen[u] == "val"), ranked[-1])] = "train"
        return chosen

    def _following(self, clumps: list[list[str]], free: set[str]) -> dict[str, str]:
        """Groups without a split that share media with groups that have one: they go where those are."""
        found: dict[str, str] = {}
        for clump in clumps:
            splits = {self.given[g] for g in clump if self.given[g]}
            if splits:
                found |= dict.fromkeys(free.intersection(clump), min(splits, key=SPLITS.index))
        return found

    def _count(self, shared: _Shared, clumps: list[list[str]]) -> None:
        """How far media that are shared lie in one split. Of a torn group its first split counts."""
        users = set(shared.groups.tolist())
        splits = {n: self.split_of(g, self.given[g]) for g in self.given if (n := _number(g)) in users} if users else {}
        self.across = sum(len({splits[n] for n in one}) > 1 for one in shared)
        alike = [clump for clump in clumps if len({self.split_of(g, self.given[g]) for g in clump}) == 1]
        self.joined = sum(map(len, alike))

    def _shared(self) -> _Shared:
        files, owners = np.array(self.files, np.uint64), np.array(self.owners, np.uint64)
        uses = np.unique(np.stack([files, owners], 1), axis=0) if len(files) else np.zeros((0, 2), np.uint64)
        begins = np.flatnonzero(np.append(True, uses[1:, 0] != uses[:-1, 0])) if len(uses) else np.zeros(0, int)
        sizes = np.diff(np.append(begins, len(uses)))
        joins = (sizes > 1) & (sizes <= (self.config.shared_media or 0))
        return _Shared(uses[np.repeat(joins, sizes), 1], sizes[joins])

    def _clumps(self, shared: _Shared) -> list[list[str]]:
        """The sets of groups that `shared` media join, each in order of name."""
        parent: dict[int, int] = {}

        def root(node: int) -> int:
            while parent.setdefault(node, node) != node:
                parent[node] = parent[parent[node]]
                node = parent[node]
            return node

        for first, *others in shared:
            for other in others:
                parent[root(other)] = root(first)
        clumps: dict[int, list[str]] = {}
        for group in self.given if parent else ():
            if (number := _number(group)) in parent:
                clumps.setdefault(root(number), []).append(group)
        found = [sorted(clump) for clump in clumps.values()]
        single = len(self.given) - sum(map(len, found))
        if len(found) + single < min(3, len(self.given)):
            self.apart = sum(map(len, found))
            return []
        return found

    @staticmethod
    def by_hash(at: float, shares: dict[str, float]) -> str:
        test, val = shares.get("test", 0.0), shares.get("val", 0.0)
        return "test" if at < test else "val" if at < test + val else "train"

    def split_of(self, group: str, given: str) -> str:
        """The split of a record: the group's; in a group that the data themselves tear apart, what they give."""
        return self.chosen.get(group) or (given if group in self.torn else "") or self.given[group]


class _Shared:
    """For each picture, sound and video that more than one group has: the numbers of these groups."""

    def __init__(self, groups: np.ndarray, sizes: np.ndarray) -> None:
        self.groups, self.sizes = groups, sizes

    def __iter__(self) -> Iterator[list[int]]:
        at = 0
        for size in self.sizes.tolist():
            yield self.groups[at : at + size].tolist()
            at += size


def _units(clumps: list[list[str]], free: set[str]) -> dict[str, list[str]]:
    """What is placed as a whole, by its first name: clumps all of whose groups are free, and groups by themselves."""
    whole = {clump[0]: clump for clump in clumps if free.issuperset(clump)}
    inside = {g for clump in clumps for g in clump}
    return {**{g: [g] for g in free - inside}, **whole}


def _number(group: str) -> int:
    return int.from_bytes(hashlib.blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
