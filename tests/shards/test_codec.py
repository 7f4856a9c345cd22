from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from mmlm.errors import DataError
from mmlm.features.sample import Sample
from mmlm.features.spec import ImageSpec
from mmlm.shards.codec import ImageCodec, pack, unpack


def smooth(channels: int, side: int = 32) -> np.ndarray:
    """(side, side, channels) uint8 without edges, so that lossy codecs keep it well."""
    y, x = np.mgrid[:side, :side] * 2 * np.pi / side
    planes = [np.sin(x + i) * np.cos(y - i) * 100 + 128 for i in range(channels)]
    return np.stack(planes, -1).astype(np.uint8)


def make(*images: np.ndarray, sounds: tuple[np.ndarray, ...] = ()) -> Sample:
    return Sample("r", "t", np.array([1, 4, 3], np.int32), 2, images=list(images), sounds=list(sounds))


@pytest.mark.parametrize(("codec", "ending"), [("png", "png"), ("webp", "webp"), ("raw", "npy")])
def test_without_loss(codec: ImageCodec, ending: str) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    sample = make(colour, colour[..., :1])
    members = pack(sample, codec, patch=8)
    grey_ending = "png" if codec == "webp" else ending  # WebP has no grey
    assert sorted(members) == ["image0." + ending, "image1." + grey_ending, "json", "tokens.npy"]
    again = unpack(members)
    assert [x.shape for x in again.images] == [(32, 32, 3), (32, 32, 1)]
    for before, after in zip(sample.images, again.images, strict=True):
        np.testing.assert_array_equal(before, after)
    assert pack(sample, codec, patch=8) == members


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_fixed_quality(codec: ImageCodec, channels: int) -> None:
    image = smooth(channels)
    small, large = (pack(make(image), codec, quality) for quality in (20, 95))
    name = "image0.jpg" if codec == "jpeg" else "image0.webp" if channels == 3 else "image0.png"
    assert (len(small[name]) < len(large[name])) == (name != "image0.png")
    found = unpack(large).images[0]
    assert found.shape == image.shape
    assert abs(found.astype(int) - image).max() <= 16
    assert abs(found.astype(int) - image).mean() < 4


def test_jpeg_without_a_quality_takes_ninety() -> None:
    assert pack(make(smooth(3)), "jpeg") == pack(make(smooth(3)), "jpeg", 90) != pack(make(smooth(3)), "jpeg", 89)


def test_jpegs_and_webps_are_read_by_pillow_too() -> None:
    image = smooth(3)
    for codec in ("jpeg", "webp", "png"):
        members = pack(make(image), codec, 95)  # type: ignore[arg-type]
        name = next(name for name in members if name.startswith("image"))
        seen = np.asarray(Image.open(io.BytesIO(members[name])))
        np.testing.assert_array_equal(seen, unpack(members).images[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_raw_patches_are_laid_out_as_the_model_cuts_them(channels: int) -> None:
    from mmlm.data.arrays import _patches as patches_of_the_model  # here: it takes torch along into other processes

    image = np.random.default_rng(1).integers(0, 256, (24, 24, channels), np.uint8)
    stored = np.load(io.BytesIO(pack(make(image), "raw", patch=6)["image0.npy"]), allow_pickle=False)
    spec = ImageSpec(size=24, patch=6, channels=channels)  # type: ignore[arg-type]
    assert stored.shape == (spec.tokens, spec.patch_dim)
    wanted = patches_of_the_model([make(image)], spec)[0]  # standardised: the same order, another scale
    plain = stored.astype(np.float32)
    np.testing.assert_allclose((plain - plain.mean()) / (plain.std() + 0.255), wanted, atol=1e-4)


def test_sounds_keep_their_precision() -> None:
    mel = np.random.default_rng(2).normal(size=(7, 4))
    single, half = mel.astype(np.float32), mel.astype(np.float16)
    again = unpack(pack(make(sounds=(single, half, mel))))
    assert [x.dtype for x in again.sounds] == [np.float32, np.float16, np.float16]
    for before, after in zip((single, half, half), again.sounds, strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_same_bytes_in_another_process() -> None:
    def digest(codec: ImageCodec) -> str:
        members = pack(make(smooth(3)), codec, None if codec == "png" else 80, 8)
        return hashlib.sha256(b"".join(members[name] for name in sorted(members))).hexdigest()

    code = (
        "import hashlib; from tests.shards.test_codec import *\n"
        "for c in ('png', 'webp', 'jpeg', 'raw'):\n"
        "    m = pack(make(smooth(3)), c, None if c == 'png' else 80, 8)\n"
        "    print(hashlib.sha256(b''.join(m[n] for n in sorted(m))).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert there == [digest(codec) for codec in ("png", "webp", "jpeg", "raw")]


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def announcing(shape: tuple[int, int]) -> bytes:
    """An array whose header says `shape` and whose body is 4 bytes."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.getvalue() + b"abcd"


def jpeg_announcing(side: int) -> bytes:
    data = bytearray(pack(make(smooth(3)), "jpeg")["image0.jpg"])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def saved(form: str, picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, form)
    return out.getvalue()


HOSTILE = {
    "a pickled object": ("image0.npy", npy(np.array([{"a": 1}], dtype=object))),
    "an array of another kind": ("image0.npy", npy(np.zeros((4, 192), np.float64))),
    "no square of patches": ("image0.npy", npy(np.zeros((3, 192), np.uint8))),
    "no square patch": ("image0.npy", npy(np.zeros((4, 191), np.uint8))),
    "no pixel": ("image0.npy", npy(np.zeros((0, 0), np.uint8))),
    "an array that announces too much": ("image0.npy", announcing((1 << 20, 1 << 30))),
    "a tokens array that announces too much": ("tokens.npy", announcing((1 << 20, 1 << 30))),
    "a PNG bomb": ("image0.png", png_header(30_000, 30_000)),
    "a larger PNG bomb": ("image0.png", png_header(2**31 - 1, 2**31 - 1)),
    "a JPEG bomb": ("image0.jpg", jpeg_announcing(60_000)),
    "half a PNG": ("image0.png", pack(make(smooth(3)))["image0.png"][:200]),
    "half a JPEG": ("image0.jpg", pack(make(smooth(3)), "jpeg")["image0.jpg"][:300]),
    "a GIF by the name of a PNG": ("image0.png", saved("GIF", Image.new("L", (8, 8)))),
    "alpha": ("image0.png", saved("PNG", Image.new("RGBA", (8, 8)))),
    "nothing": ("image0.webp", b""),
    "sixteen bits": ("image0.png", saved("PNG", Image.fromarray(np.zeros((8, 8), np.uint16)))),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_members_that_are_not_ours_are_refused(what: str) -> None:
    name, data = HOSTILE[what]
    members = {**pack(make()), name: data}
    with pytest.raises(DataError, match="cannot be read"):
        unpack(members)


def test_other_members_are_left_alone() -> None:
    members = {**pack(make(smooth(1))), "image0.pkl": b"\x80\x04.", "image1.tiff": b"II*\0", "audio0.wav": b"RIFF"}
    assert len(unpack(members).images) == 1
