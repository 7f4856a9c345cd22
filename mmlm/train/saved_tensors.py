"""The tensors of a checkpoint in their files, written whole or in the pieces that the ranks held, read as they are asked for.

| form | files | tensors in them |
|---|---|---|
| full | `<kind>.safetensors`, by rank 0 | whole, by parameter |
| sharded | `rank-00000.safetensors` and so on, one by each rank | one run of elements of each parameter, `<kind>:<parameter>` |

In a sharded file the header's metadata say under `runs` which elements of the flattened parameter these are, and its shape:
`{"blocks.0.attention.out.weight": [131072, [512, 512]]}`. Either form is read on any number of ranks and at any ZeRO stage;
a rank reads no more than what it will hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from mmlm.train.config import LoopConfig
from mmlm.train.weights import write_tensors

RANK = "rank-{:05d}.safetensors"
LARGE = 1 << 30
"""Bytes of a checkpoint beyond which gathering it on rank 0 is not worth its form: it takes two seconds of every save then
(docs/benchmarks.md, "Saving"), and below it whole tensors are easier to look at."""


class Piece(NamedTuple):
    """The elements of one parameter that a rank holds."""

    first: int
    """Which element of the flattened parameter is the first."""
    shape: torch.Size
    """Of the whole parameter."""
    elements: torch.Tensor
    """Flat, float32, on the host."""


Pieces = Mapping[str, Mapping[str, Piece]]
"""kind (weight, exp_avg, …) → parameter → piece."""


def is_sharded(config: LoopConfig, ranks: int, size: float) -> bool:
    """Whether the ranks write their own pieces of a checkpoint of `size` bytes."""
    cut = config.zero.stage > 0 and ranks > 1
    return cut and (size > LARGE if config.checkpoint_format == "auto" else config.checkpoint_format == "sharded")


def write_pieces(pieces: Pieces, path: Path) -> str:
    """The file of one rank; returns its sha256."""
    runs = {name: (piece.first, list(piece.shape)) for named in pieces.values() for name, piece in named.items()}
    tensors = {f"{kind}:{name}": piece.elements for kind, named in pieces.items() for name, piece in named.items()}
    return write_tensors(tensors, path, {"runs": json.dumps(runs, sort_keys=True)})


class Named(Mapping[str, torch.Tensor]):
    """The tensors of one kind by parameter, each read when it is asked for."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[Any, str, int]]] = {}
        """parameter → (open file, name in it, number of its first element) of each part."""
        self.shapes: dict[str, torch.Size] = {}

    def add(self, file: Any, key: str, name: str, first: int, shape: torch.Size) -> None:
        self.found.setdefault(name, []).append((file, key, first))
        self.shapes[name] = shape

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        return self.run(name, 0, shape.numel()).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def run(self, name: str, first: int, count: int) -> torch.Tensor:
        """(count,): elements of the flattened parameter from `first` on. Raises ValueError when some are in no file."""
        if not count:
            return torch.empty(0)
        made: torch.Tensor | None = None
        seen = 0
        for file, key, begin in self.found[name]:
            part = file.get_slice(key)
            rows = part.get_shape()
            size = torch.Size(rows).numel()
            low, high = max(first, begin) - begin, min(first + count, begin + size) - begin
            if low >= high:
                continue
            if not rows:  # a single number
                return torch.as_tensor(file.get_tensor(key)).view(1)
            across = size // rows[0]  # a whole tensor is read by rows: those that hold what is wanted
            top = low // across
            read = part[top : -(-high // across)].reshape(-1)[low - top * across : high - top * across]
            if high - low == count:
                return read
            made = read.new_empty(count) if made is None else made
            made[low + begin - first : high + begin - first] = read
            seen += high - low
        if made is None or seen != count:
            raise ValueError(f"{seen} of {count} elements of {name} are in its files")
        return made


def open_tensors(folder: Path, files: list[str]) -> dict[str, Named]:
    """kind → tensors, of those files of a checkpoint in either form. Raises ValueError where a file is none of safetensors."""
    kinds: dict[str, Named] = {}
    for file in sorted(files):
        try:
            opened = safe_open(folder / file, "pt")
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error})") from None
        runs = json.loads((opened.metadata() or {}).get("runs", "null"))
        for key in opened.keys():  # noqa: SIM118  (it is no mapping)
            if runs is None:
                kind, name, first = file.removesuffix(".safetensors"), key, 0
                shape = torch.Size(opened.get_slice(key).get_shape())
            else:
                kind, name = key.split(":", 1)
                first, shape = runs[name][0], torch.Size(runs[name][1])
            kinds.setdefault(kind, Named()).add(opened, key, name, first, shape)
    return kinds


def run_of(named: Mapping[str, torch.Tensor], name: str, first: int, count: int) -> torch.Tensor:
    """(count,): elements of a flattened parameter from `first` on; of a file no others are read."""
    if isinstance(named, Named):
        return named.run(name, first, count)
    return named[name].reshape(-1)[first : first + count]
