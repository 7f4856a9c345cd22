"""Shares: which elements of which parameters a rank keeps in a flat tensor, and whole parameters made of all ranks' shares.

ZeRO 1 and 2 lay the parameters of a group end to end and cut the whole into equal parts; ZeRO 3 cuts every parameter by
itself and lays a rank's pieces end to end. Either way a rank holds at most one run of each parameter, so one class
serves both, and the optimizer states that lie in the same order as well. At stage 0 every rank holds everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

AT_ONCE = 1 << 25
"""Elements that are gathered in one go (128 MiB in float32)."""


class Run(NamedTuple):
    """The elements of one parameter that a rank holds."""

    name: str
    shape: torch.Size
    here: int
    """Its first element in the share."""
    there: int
    """The same in the parameter."""
    elements: int
    """How many; 0 when other ranks have it all."""


@dataclass(eq=False)
class Share:
    """The float32 tensor that this rank's optimizer works on, and what lies in it."""

    tensor: torch.Tensor
    group: dict[str, Any]
    """The optimizer's parameter group."""
    runs: list[Run]
    """One per parameter of the group."""
    spread: bool
    """Whether the other ranks hold the rest."""

    def wholes(self, flat: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(number, whole tensor) of each parameter, from `flat`, which lies like the share. All ranks go along.

        Where a rank has nothing it adds zeros, so the sum over ranks is exact.
        """
        for numbers in self._batches():
            sizes = [self.runs[i].shape.numel() for i in numbers]
            buffer = torch.zeros(sum(sizes), dtype=flat.dtype, device=flat.device)
            for i, whole in zip(numbers, buffer.split(sizes), strict=True):
                run = self.runs[i]
                whole[run.there : run.there + run.elements] = self.run_of(flat, i)
            if self.spread:
                _sum(buffer)
            for i, whole in zip(numbers, buffer.split(sizes), strict=True):
                yield i, whole.view(self.runs[i].shape)

    def put(self, flat: torch.Tensor, number: int, whole: torch.Tensor) -> None:
        """Write this rank's run of a `whole` parameter into `flat`."""
        run = self.runs[number]
        self.run_of(flat, number).copy_(whole.reshape(-1)[run.there : run.there + run.elements])

    def run_of(self, flat: torch.Tensor, number: int) -> torch.Tensor:
        """(elements,): this rank's run of a parameter in `flat`, which lies like the share."""
        run = self.runs[number]
        return flat.view(-1)[run.here : run.here + run.elements]

    def holds(self, number: int) -> bool:
        """Whether any of the parameter is in this rank's share."""
        return self.runs[number].elements > 0

    def _batches(self) -> Iterator[list[int]]:
        batch: list[int] = []
        elements = 0
        for i, run in enumerate(self.runs):
            if batch and elements + run.shape.numel() > AT_ONCE:
                yield batch
                batch, elements = [], 0
            batch.append(i)
            elements += run.shape.numel()
        yield batch


def _sum(buffer: torch.Tensor) -> None:
    """All-reduce, on the device that the process group can use (offloaded states lie on the host)."""
    if dist.get_backend() == "nccl" and buffer.device.type == "cpu":
        moved = buffer.cuda()
        dist.all_reduce(moved)
        buffer.copy_(moved)
    else:
        dist.all_reduce(buffer)


def cut_end_to_end(shapes: list[tuple[str, torch.Size]], offsets: list[int], first: int, size: int) -> list[Run]:
    """Runs in elements [first, first + size) of parameters that lie at `offsets` of one long tensor."""
    runs = []
    for (name, shape), offset in zip(shapes, offsets, strict=True):
        begin, end = max(offset, first), min(offset + shape.numel(), first + size)
        count = max(0, end - begin)
        runs.append(Run(name, shape, begin - first if count else 0, begin - offset if count else 0, count))
    return runs


def cut_each(shapes: list[tuple[str, torch.Size]], pieces: list[int], rank: int) -> list[Run]:
    """Runs of `rank` when each parameter is cut into pieces of its own size, padded at the end."""
    runs, here = [], 0
    for (name, shape), piece in zip(shapes, pieces, strict=True):
        there = min(rank * piece, shape.numel())
        runs.append(Run(name, shape, here, there, min(piece, shape.numel() - there)))
        here += piece
    return runs
