"""What a step of training works on, in numbers: the ground of its plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmlm.model.flops import Shape

AROUND = 64 << 10
"""Bytes that Linux maps with every page of a file that is read."""


@dataclass(frozen=True)
class Corpus:
    """The training split as a loader meets it."""

    samples: int
    a_step: float
    """Samples that a step takes, over all ranks."""
    decoded: float
    """Bytes of one sample in the loader's cache."""
    mapped: float
    """Bytes of the shards that lie on this machine; 0 of those that are fetched."""
    cache: float
    """Bytes that a rank may keep of decoded samples."""

    def seen(self, steps: int, ranks: int) -> float:
        """Share of the samples that a rank meets in so many steps: each of its steps takes some at random."""
        return 1 - math.exp(-steps * self.a_step / ranks / max(self.samples, 1))

    def touched(self, steps: int, ranks: int) -> float:
        """Bytes of mapped shards that a rank holds in the end: with a sample comes what lies around it."""
        size = self.mapped / max(self.samples, 1)
        return self.mapped * (1 - math.exp(-steps * self.a_step / ranks * (size + AROUND) / max(self.mapped, 1.0)))

    def cached(self, steps: int, ranks: int) -> float:
        """Bytes of decoded samples that a rank keeps in the end."""
        return min(self.cache, self.decoded * self.samples * self.seen(steps, ranks))

    def read_anew(self, steps: int, ranks: int) -> float:
        """Share of the samples of an average step that are not in the cache, and so are read and decoded."""
        first = self.seen(steps, ranks) * self.samples / max(steps * self.a_step / ranks, 1e-9)
        room = min(1.0, self.cache / max(self.decoded * self.samples, 1.0))
        return min(1.0, first + (1 - first) * (1 - room))


@dataclass(frozen=True)
class Workload:
    """One optimizer step over all ranks: its real positions, and those that tensors hold with their padding."""

    shape: Shape
    """Of all that the model is given, views of records included."""
    rows: int
    """Sequences."""
    length: int
    """Positions of a sequence with its padding, T."""
    source: str
    """Where these figures are from, for people."""
    corpus: Corpus | None = None
    """What the loader reads; none where there are no shards yet."""
    views: Shape | None = None
    """Of the views alone, by which a contrastive term compares records; none without one."""

    @property
    def tokens(self) -> int:
        """Real positions of the records themselves."""
        return self.shape.tokens - (self.views.tokens if self.views else 0)

    def share(self, parts: int) -> Workload:
        """The largest of `parts` equal parts: what one rank's micro-batch holds."""
        rows = math.ceil(self.rows / parts)
        f = rows / self.rows
        views = self.views and _part(self.views, f)
        return Workload(_part(self.shape, f), rows, self.length, self.source, self.corpus, views)


def _part(whole: Shape, f: float) -> Shape:
    """A share `f` of a shape: as many of its longest records, scaled to as many positions."""
    lengths = whole.lengths[: max(1, round(len(whole.lengths) * f))]
    scale = whole.tokens * f / max(sum(lengths), 1)
    prompts = whole.prompts and whole.prompts[: len(lengths)]
    return Shape(
        lengths=tuple(max(1, round(n * scale)) for n in lengths),
        prompts=prompts and tuple(round(n * min(scale, 1)) for n in prompts),
        targets=math.ceil(whole.targets * f),
        answers=math.ceil(whole.answers * f),
        patches=math.ceil(whole.patches * f),
        mels=math.ceil(whole.mels * f),
        read=None if whole.read is None else math.ceil(whole.read * f),
        media={name: each[: len(lengths)] for name, each in whole.media.items()},
        tags=whole.tags[: len(lengths)],
    )
