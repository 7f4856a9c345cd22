"""Which split a group falls into where the data do not say: a stable hash, with a fallback for small corpora."""

from __future__ import annotations

from mmlm.corpus.config import SplitConfig
from mmlm.corpus.records import SPLITS
from mmlm.storage import sha256_bytes


def position(group: str, salt: str) -> float:
    """A number in [0, 1) that depends on the group's name alone."""
    return int(sha256_bytes(f"{salt}\0{group}".encode())[:13], 16) / 16**13


class Splitter:
    """Sees every group once (`note`), then decides (`decide`); afterwards `split_of` answers for each record.

    Keeps one entry per group in memory, some 200 bytes each.
    """

    def __init__(self, config: SplitConfig) -> None:
        self.config = config
        self.given: dict[str, str] = {}
        self.torn: set[str] = set()
        self.named: set[str] = set()
        """Splits that the data give, be it only to some records of a torn group."""
        self.chosen: dict[str, str] = {}

    def note(self, group: str, split: str) -> None:
        """A record of `group` whose data give `split` ("" when they give none)."""
        before = self.given.get(group, "")
        if split:
            self.named.add(split)
        if split and before and split != before:
            self.torn.add(group)
            split = min(split, before, key=SPLITS.index)
        self.given[group] = split or before

    def decide(self) -> None:
        """Fix the split of every group. Each split gets a group where there are three or more to choose from."""
        config = self.config
        shares = {"val": config.val, "test": config.test}
        free = {g for g, s in self.given.items() if not s}
        if config.fill and "train" in self.named and not free:
            shares = {s: share for s, share in shares.items() if s not in self.named}
            # a torn group keeps what the data give, record by record
            free = {g for g, s in self.given.items() if s == "train" and g not in self.torn} if shares else set()
        ranked = sorted(free, key=lambda g: (position(g, config.salt), g))
        chosen = {g: self.by_hash(position(g, config.salt), shares) for g in ranked}
        taken = {*(s for g, s in self.given.items() if g not in free), *chosen.values()}
        wanted = [s for s in ("train", "test", "val") if s == "train" or shares.get(s, 0) > 0]
        for split in wanted:
            if split not in taken and len(chosen) >= (3 if split == "val" else 2):
                sizes = {s: sum(c == s for c in chosen.values()) for s in SPLITS}
                largest = max(SPLITS, key=lambda s: sizes[s])
                if sizes[largest] > 1:
                    chosen[next(g for g in ranked if chosen[g] == largest)] = split
                    taken.add(split)
        if "train" not in taken and chosen:  # one or two groups: training comes first
            chosen[next((g for g in ranked if chosen[g] == "val"), ranked[-1])] = "train"
        self.chosen = chosen

    @staticmethod
    def by_hash(at: float, shares: dict[str, float]) -> str:
        test, val = shares.get("test", 0.0), shares.get("val", 0.0)
        return "test" if at < test else "val" if at < test + val else "train"

    def split_of(self, group: str, given: str) -> str:
        """The split of a record: the group's; in a group that the data themselves tear apart, what they give."""
        return self.chosen.get(group) or (given if group in self.torn else "") or self.given[group]
