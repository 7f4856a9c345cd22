"""Near-duplicate pictures: buckets against all pairs; blank, broken, huge and merely similar pictures."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmlm.corpus.curation import columns
from mmlm.corpus.curation.buckets import Sets, pairs_in_buckets, rounds_across
from mmlm.corpus.curation.config import NearImagesConfig
from mmlm.corpus.curation.linking import sets_of
from mmlm.corpus.curation.near_images import PictureIndex, look
from tests.corpus.curation.curated import drops, encoded, losers_by_brute_force, orders, painting, row


def corpus(seed: int) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Pictures and their copies as JPEG, smaller, blurred and darker; records of one and of two pictures."""
    rng = random.Random(seed)
    files = {f"p{k:03d}.png": encoded(painting(1000 * seed + k)) for k in range(60)}
    for k in range(12):
        pixels = painting(1000 * seed + k)
        files[f"jpeg{k:03d}.jpg"] = encoded(pixels, "JPEG", quality=60)
        files[f"small{k:03d}.webp"] = encoded(pixels, "WEBP", size=48, quality=70)
        files[f"blur{k:03d}.png"] = encoded(pixels, blur=1.0)
    names = sorted(files)
    rows = [
        row(f"r{k:03d}", "What is this?", pictures=[n], split=rng.choice(["train"] * 6 + ["val", "test"]))
        for k, n in enumerate(rng.sample(names, len(names)))
    ]
    for k in range(12):
        rows.append(row(f"two{k}a", pictures=[f"p{k:03d}.png", f"p{k + 20:03d}.png"]))
        rows.append(row(f"two{k}b", pictures=[f"jpeg{k:03d}.jpg", f"p{k + 20 + k % 2:03d}.png"]))
    return rows, files


def alike_by_hand(files: dict[str, bytes], distance: int, tolerance: float) -> Any:
    looks = {name: look(data) for name, data in files.items()}

    def near(a: str, b: str) -> bool:
        one, other = looks[a], looks[b]
        if one is None or other is None:
            return False
        bits = (one[0] ^ other[0]).bit_count()
        return bits <= distance and abs(one[1].astype(int) - other[1].astype(int)).mean() <= tolerance

    def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
        one, other = ([p["uri"] for p in r["parts"] if p["kind"] == "image"] for r in (a, b))
        return len(one) == len(other) > 0 and all(map(near, one, other))

    return alike


@pytest.mark.parametrize(("seed", "distance"), [(0, 4), (1, 4), (2, 9), (3, 0)])
def test_drops_are_those_of_the_brute_force(seed: int, distance: int, tmp_path: Path) -> None:
    rows, files = corpus(seed)
    expected = losers_by_brute_force(rows, alike_by_hand(files, distance, 5.0))
    assert len(expected) > (30 if distance else 5)
    for order in orders(rows):
        assert set(drops(order, tmp_path, files, near_images={"distance": distance}).events) == expected


def test_the_number_of_workers_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "ALONE", 1)
    monkeypatch.setattr("mmlm.corpus.curation.near_images.BATCH", 8)
    rows, files = corpus(4)
    alone = drops(rows, tmp_path, files, near_images={}, contamination={})
    assert alone == drops(rows, tmp_path, files, workers=2, near_images={}, contamination={})
    assert len(alone.events) > 20


@pytest.mark.parametrize("distance", [0, 1, 4, 7, 15])
def test_buckets_find_every_pair_within_the_distance(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 1 << 63, 300, dtype=np.uint64)
    for k in range(200):  # planted, with up to two bits more than may differ
        for bit in rng.choice(64, rng.integers(0, distance + 3), replace=False):
            hashes[k] = hashes[k] if k < 100 else hashes[k - 100] ^ np.uint64(1 << int(bit))
    cells = np.zeros((300, 192), dtype=np.uint8)
    one, nothing = np.ones(300, dtype=np.int64), np.zeros(300, dtype=np.int64)
    index = PictureIndex(NearImagesConfig(distance=distance), np.arange(300), one, nothing, hashes, cells, True)
    found = sets_of(index, np.zeros(300, dtype=np.uint64))
    expected = Sets(300)
    for i in range(300):
        for j in range(i):
            if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= distance:
                expected.join(i, j)
    everyone = np.arange(300)
    assert found.roots(everyone).tolist() == expected.roots(everyone).tolist()
    assert len(set(expected.roots(everyone).tolist())) < 300 or distance == 0


def test_blank_plain_broken_and_huge_pictures_have_no_hash_and_stay(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    gradient = np.repeat(np.arange(96, dtype=np.uint8)[None, :, None], 96, 0).repeat(3, 2)
    files = {
        "white.png": encoded(np.full((40, 40, 3), 255, np.uint8)),
        "white2.png": encoded(np.full((90, 90, 3), 255, np.uint8)),
        "black.png": encoded(np.zeros((40, 40, 3), np.uint8)),
        "grain1.png": encoded((250 + noise.integers(0, 4, (96, 96, 3))).astype(np.uint8)),
        "grain2.png": encoded((250 + noise.integers(0, 4, (96, 96, 3))).astype(np.uint8)),
        "across.png": encoded(gradient), "down.png": encoded(gradient.transpose(1, 0, 2).copy()),
        "empty.png": b"", "broken.png": encoded(painting(1))[:200], "text.png": b"no picture",
        "bomb.png": bomb(100_000, 100_000), "bomb2.png": bomb(9_000, 9_000),
    }  # fmt: skip
    assert {name: look(data) for name, data in files.items()} == dict.fromkeys(files)
    rows = [row(name, pictures=[name]) for name in files] + [row("missing", pictures=["nowhere.png"])]
    found = drops(rows, tmp_path, files, near_images={})
    assert found.events == {}
    assert found.figures["near_images"][""] == {"kept": len(files) + 1, "dropped": 0, "changed": 0}


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises very many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def test_one_drawing_in_two_colours_is_two_pictures(tmp_path: Path) -> None:
    red = painting(3).copy()
    blue = red[:, :, ::-1].copy()
    red[:, :, 0], blue[:, :, 2] = 250, 250
    files = {"red.png": encoded(red), "blue.png": encoded(blue), "red.jpg": encoded(red, "JPEG", quality=80)}
    rows = [row(n, pictures=[n]) for n in files]
    assert set(drops(rows, tmp_path, files, near_images={}).events) == {"red.png"}


def test_alpha_palette_grey_and_16_bit_are_the_picture_they_show() -> None:
    from PIL import Image

    pixels = painting(5)
    plain = look(encoded(pixels))
    assert plain
    picture = Image.fromarray(pixels)
    grey = np.asarray(picture.convert("L"))
    assert (found := look(_saved(picture.convert("RGBA")))) and found[0] == plain[0]
    palette = picture.quantize(16)
    one, other = look(_saved(palette)), look(_saved(palette.convert("RGB")))
    assert one and other and one[0] == other[0]
    deep = look(_saved(Image.fromarray(grey.astype(np.uint16) * 257)))
    flat = look(_saved(Image.fromarray(grey)))
    assert deep and flat and deep[0] == flat[0]


def _saved(picture: Any) -> bytes:
    import io

    held = io.BytesIO()
    picture.save(held, "PNG")
    return held.getvalue()


def test_several_questions_about_one_picture_stay_together(tmp_path: Path) -> None:
    files = {"a.png": encoded(painting(1)), "b.jpg": encoded(painting(1), "JPEG", quality=70)}
    rows = [row(f"a{k}", f"question {k}", pictures=["a.png"], group="a") for k in range(3)]
    rows += [row(f"b{k}", f"question {k}", pictures=["b.jpg"], group="b", split="test") for k in range(3)]
    assert set(drops(rows, tmp_path, files, near_images={}).events) == {"a0", "a1", "a2"}


def test_pairs_in_buckets_are_all_pairs_of_equal_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmlm.corpus.curation.buckets.CHUNK", 7)
    for seed in range(20):
        keys = np.random.default_rng(seed).integers(0, 9, 30).astype(np.uint64)
        found = [(a, b) for i, j in pairs_in_buckets(keys) for a, b in zip(i.tolist(), j.tolist(), strict=True)]
        assert sorted(found) == [(i, j) for i in range(30) for j in range(i + 1, 30) if keys[i] == keys[j]]
        everyone = np.ones(12, dtype=bool)
        met = [r(everyone) for r in rounds_across(keys[:12], keys[12:])]
        across = [(a, b) for i, j in met for a, b in zip(i.tolist(), j.tolist(), strict=True)]
        assert sorted(across) == [(i, j) for i in range(12) for j in range(18) if keys[i] == keys[12 + j]]
    assert list(pairs_in_buckets(np.empty(0, np.uint64))) == []


def test_very_many_equal_texts_and_pictures_take_no_longer_than_others(tmp_path: Path) -> None:
    """A question asked of every picture is one bucket; so is one picture, or one text, that everybody has."""
    files = {"a.png": encoded(painting(1))}
    rows = [row(f"q{k:05d}", "What is this?", pictures=[f"{k}.png"]) for k in range(6_000)]
    rows += [row(f"s{k:05d}", "one and the same text", split="test" if k % 9 == 0 else "train") for k in range(6_000)]
    rows += [row(f"t{k:05d}", "one and the same text", group="g", task="t") for k in range(6_000)]
    rows += [row(f"p{k:05d}", pictures=["a.png"]) for k in range(300)]
    found = drops(rows, tmp_path, files, near_text={}, near_images={}, contamination={})
    assert len(found.events) == 5_999 + 299 + 6_000  # t: train has the words of s00000, which is in test


MEMORY = """
import resource, struct, sys
from pathlib import Path
from mmlm.corpus.curation.config import CurateConfig
from mmlm.corpus.curation.set_steps import find_drops
from mmlm.storage import read_uri
from tests.corpus.curation.curated import row

folder = Path(sys.argv[1])

def bmp(name, width, height):
    with open(folder / name, "wb") as file:
        file.write(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54))
        file.write(struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0))
        file.truncate(54 + 3 * width * height)  # black, and no block of the disk
    return name

rows = [row(f"large{k:02d}", pictures=[bmp(f"large{k}.bmp", 5000, 4000)]) for k in range(12)]
rows += [row("many", pictures=[bmp(f"small{k}.bmp", 1000, 1200) for k in range(120)])]
rows += [row(f"x{k:02d}", pictures=[f"small{k}.bmp"]) for k in range(60)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read = lambda uri, most: read_uri(uri, folder, most)
find_drops(lambda: iter(rows), CurateConfig.model_validate({"near_images": {}}), read, folder / "work")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_memory_is_bounded_whatever_the_size_of_pictures_and_records(tmp_path: Path) -> None:
    """Twelve pictures of 60 MB, and a record of 120 of 3.6 MB each: 145 MB measured for both together."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) < 250
