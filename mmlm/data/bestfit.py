"""Best-fit packing: records into sequences of one length, each where the least room is left."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


class BestFit:
    """Sequences of `length` positions being filled. Those that are not full stay open from one window to the next."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.full: list[list[int]] = []
        """Sequences that take no more, each the numbers that were put into it."""
        self._open: dict[int, list[list[int]]] = {}
        """Room that is left → the sequences that have it."""
        self._rooms: list[int] = []

    def add(self, numbers: np.ndarray, lengths: np.ndarray) -> None:
        """Put a window of records into sequences, the longest first; none is longer than a sequence."""
        order = np.argsort(-lengths, kind="stable")
        for number, need in zip(numbers[order].tolist(), lengths[order].tolist(), strict=True):
            at = bisect_left(self._rooms, need)
            if at == len(self._rooms):
                room, sequence = self.length, [number]
            else:
                room = self._rooms[at]
                some = self._open[room]
                sequence = some.pop()
                if not some:
                    del self._open[room], self._rooms[at]
                sequence.append(number)
            self._put_back(sequence, room - need)

    def _put_back(self, sequence: list[int], room: int) -> None:
        if not room:
            self.full.append(sequence)
            return
        if room not in self._open:
            self._open[room] = []
            insort(self._rooms, room)
        self._open[room].append(sequence)

    def take(self, least: int = 0) -> list[list[int]]:
        """Remove and return the sequences with less than `least` positions left; all of them by default."""
        done, self.full = self.full, []
        for room in [r for r in self._rooms if not least or r < least]:
            done += self._open.pop(room)
        self._rooms = sorted(self._open)
        return done
