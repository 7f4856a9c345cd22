"""Which pictures are nearly the same: a perceptual hash chooses and decides, coarse colours confirm.

The hash is that of Zauner ("Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2.1):
the discrete cosine transform of the grey picture at 32 × 32, its 8 × 8 lowest frequencies, a bit for each that lies
above their median. The constant one says only how bright the picture is, its bit is 0. Coefficients that are as good
as zero say nothing either; a picture where hardly any is left (blank, a plain gradient) has no hash, since all such
pictures would look alike.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmlm.corpus.curation.columns import AHEAD_BYTES, GrowingArray, in_order
from mmlm.corpus.curation.config import NearImagesConfig

MAX_PIXELS = 64_000_000
"""Larger pictures are not decoded here; they have no hash and are judged by the later stages."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SIDE = 32
CELLS = 8
LEAST = 2.0
"""Size of a coefficient (grey levels times 32) below which it is noise of compression or rounding."""
TELLING = 12
"""So many of the 63 coefficients must be larger than LEAST."""
BATCH = 64

BATCH_BYTES = 2 << 20
"""Bytes of files from which on a batch is full."""

T = TypeVar("T")
U = TypeVar("U")
Look = tuple[int, np.ndarray]
"""A perceptual hash and (192,) uint8: red, green and blue of 8 × 8 cells."""
Place = tuple[int, int, int]
"""Of a picture: number of its record, number of that record's pictures, place among them."""
Picture = tuple[Place, bytes | Look | None]
"""A picture's file, or what was seen of it already; None where it cannot be read."""


def look(data: bytes) -> Look | None:
    """The hash and the cells of a picture; None when it is broken, too large, of another format, or blank."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                return None
            if picture.format == "JPEG":  # decodes at an eighth, a quarter or half size where that is large enough
                picture.draft("RGB", (4 * SIDE, 4 * SIDE))
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            small = _on_white(picture).resize((SIDE, SIDE), Image.Resampling.BOX)
    except MemoryError:
        raise
    except Exception:  # decoders meet hostile bytes in more ways than they name; the next stages tell people why
        return None
    pixels = np.asarray(small, dtype=np.float64)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    hashed = perceptual_hash(grey)
    if hashed is None:
        return None
    step = SIDE // CELLS
    cells = pixels.reshape(CELLS, step, CELLS, step, 3).mean(axis=(1, 3))
    return hashed, np.rint(cells).astype(np.uint8).reshape(-1)


def _on_white(picture: Any) -> Any:
    """Palette, alpha and 16 bit as plain RGB; transparent pixels on white."""
    from PIL import Image

    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, "white")
        paper.alpha_composite(rgba)
        picture = paper
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def perceptual_hash(grey: np.ndarray) -> int | None:
    """64 bits of a (32, 32) float picture of levels 0 to 255, or None when there is too little in it."""
    basis = _cosines()
    low = np.round(basis @ grey @ basis.T, 3).reshape(-1)
    low[0] = 0.0
    if (np.abs(low) >= LEAST).sum() < TELLING:
        return None
    bits = low > np.median(low[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@cache
def _cosines() -> np.ndarray:
    """(8, 32): the first rows of the orthonormal DCT-II."""
    k, x = np.arange(CELLS)[:, None], np.arange(SIDE)[None, :]
    basis = np.cos(np.pi * k * (2 * x + 1) / (2 * SIDE)) * np.sqrt(2 / SIDE)
    basis[0] /= np.sqrt(2)
    return basis


class PictureIndex:
    """Hashes (8 bytes) and cells (192 bytes, on disk) of pictures.

    `whole`: a thing is a record, alike when it has as many pictures and each is like its counterpart; otherwise a
    thing is a picture. A record with a picture that has no hash is left out as a whole; its other pictures are not.
    """

    def __init__(
        self, config: NearImagesConfig, row: np.ndarray, size: np.ndarray, place: np.ndarray, hashes: np.ndarray,
        cells: np.ndarray, whole: bool,
    ) -> None:  # fmt: skip
        self.config, self.size, self.place, self.hashes, self.cells = config, size, place, hashes, cells
        self.whole, self.all_rows = whole, row
        self.thing = _complete(row, size, place) if whole else np.arange(len(row))
        self.row = row[self.thing]

    @classmethod
    def build(
        cls, pictures: Iterator[Picture], config: NearImagesConfig, folder: Path, workers: int = 1
    ) -> PictureIndex:
        """Of the pictures of records in order; some dozens of megabytes of their files are in memory at a time."""
        row = GrowingArray(folder / "row", np.int64)
        size = GrowingArray(folder / "size", np.int64)
        place = GrowingArray(folder / "place", np.int64)
        hashes = GrowingArray(folder / "hash", np.uint64)
        cells = GrowingArray(folder / "cells", np.uint8, 3 * CELLS * CELLS)
        for batch in in_order(_look_at_all, _batches(pictures), workers, _bytes_of):
            for (number, of, at), (hashed, colours) in batch:
                row.append(np.array([number]))
                size.append(np.array([of]))
                place.append(np.array([at]))
                hashes.append(np.array([hashed], dtype=np.uint64))
                cells.append(colours)
        return cls(
            config, np.array(row.read()), np.array(size.read()), np.array(place.read()), np.array(hashes.read()),
            cells.read(), True,
        )  # fmt: skip

    def of(self, config: NearImagesConfig) -> PictureIndex:
        """The same pictures, compared by another config."""
        return PictureIndex(config, self.all_rows, self.size, self.place, self.hashes, self.cells, self.whole)

    def single(self) -> PictureIndex:
        """The same pictures, each for itself."""
        return PictureIndex(self.config, self.all_rows, self.size, self.place, self.hashes, self.cells, False)

    def bands(self) -> Iterator[np.ndarray]:
        # of distance + 1 parts of two hashes at least one is equal when at most `distance` bits differ
        hashes = self.hashes[self.thing]
        yield hashes
        edges = np.linspace(0, 64, self.config.distance + 2).astype(int)
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            yield (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)

    def alike(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        a, b = self.thing[i], self.thing[j]
        found = self._near(a, b)
        if self.whole:
            found &= self.size[a] == self.size[b]
            for k in np.flatnonzero(found & (self.size[a] > 1)).tolist():
                more = np.arange(1, self.size[a[k]])
                found[k] = bool(self._near(a[k] + more, b[k] + more).all())
        return found

    def _near(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        near = np.bitwise_count(self.hashes[a] ^ self.hashes[b]) <= self.config.distance
        some = np.flatnonzero(near)
        for low in range(0, len(some), 4096):
            part = some[low : low + 4096]
            difference = np.abs(self.cells[a[part]].astype(np.int16) - self.cells[b[part]])
            near[part] = difference.mean(axis=1) <= self.config.tolerance
        return near


def _complete(row: np.ndarray, size: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Where the first pictures of the records lie whose pictures all have a hash."""
    first = np.flatnonzero(place == 0)
    last = first + size[first] - 1
    whole = last < len(row)
    first, last = first[whole], last[whole]
    return first[(row[last] == row[first]) & (place[last] == size[first] - 1)]


Batch = list[Picture]


def _batches(pictures: Iterator[Picture]) -> Iterator[Batch]:
    held: Batch = []
    for picture in pictures:
        held.append(picture)
        if len(held) >= BATCH or _bytes_of(held) > BATCH_BYTES:
            yield held
            held = []
    if held:
        yield held


def _bytes_of(batch: Batch) -> int:
    return sum(len(data) for _, data in batch if isinstance(data, bytes))


def _look_at_all(batch: Batch) -> list[tuple[Place, Look]]:
    """Every picture of the batch that has a hash."""
    looks: dict[bytes, Look | None] = {}
    found = []
    for place, data in batch:
        if isinstance(data, bytes) and data not in looks:
            looks[data] = look(data)
        if seen := looks[data] if isinstance(data, bytes) else data:
            found.append((place, seen))
    return found


def read_ahead(items: Iterable[T], fetch: Callable[[T], U], threads: int, weight: Callable[[T], int]) -> Iterator[U]:
    """fetch(item) in order, some fetched ahead by threads; few where the items themselves weigh much.

    At most 2 * threads + 1 results and AHEAD_BYTES of items (or one item) are in memory, and what is being fetched.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[int, Future[U]]] = deque()
        held = 0
        for item in items:
            size = weight(item)
            while waiting and (len(waiting) > 2 * threads or held + size > AHEAD_BYTES):
                gone, future = waiting.popleft()
                held -= gone
                yield future.result()
            waiting.append((size, pool.submit(fetch, item)))
            held += size
        while waiting:
            yield waiting.popleft()[1].result()
