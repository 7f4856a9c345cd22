"""Pictures as flat rows: what the linear baselines can tell from them, how large the rows are, and who stands in which."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.ours.stamps_tables import _logistic
from mmlm.evals.answer import Answerer
from mmlm.evals.baselines import Logistic
from mmlm.evals.config import LogisticConfig
from mmlm.evals.flat import BLOCK, flat_rows
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec, ImageSpec
from mmlm.model.hog import ORIENTATIONS, edges
from tests.small import SPEC, sample

PICTURE = frozenset({"image"})


def seen(size: int, channels: int) -> FeatureSpec:
    return SPEC.model_copy(update={"image": ImageSpec(size=size, patch=1, channels=channels)})


def showing(x_HWC: np.ndarray | None, number: int = 0, label: str = "a") -> Sample:
    found = sample(number, ("image",) if x_HWC is not None else ())
    found.images, found.label = [] if x_HWC is None else [x_HWC], label
    return found


def rows(pictures: list[np.ndarray | None], size: int, channels: int) -> np.ndarray:
    return flat_rows([showing(x, n) for n, x in enumerate(pictures)], PICTURE, seen(size, channels), str)


def noise(seed: int, size: int, channels: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "channels", "columns"),
    [
        (64, 3, 256 + 64 * 9 + 16 * 64),
        (224, 3, 256 + 64 * 9 + 16 * 64),  # no more for larger pictures
        (48, 1, 256 + 36 * 9),
        (15, 3, 256 + 16 * 9 + 16 * 64),
        (2, 1, 256 + 16 * 9),
    ],
)
def test_rows_are_as_wide_as_the_size_says_and_no_wider(size: int, channels: int, columns: int):
    found = rows([noise(0, size, channels), None], size, channels)
    assert found.shape == (2, 1 + columns) and found.dtype == np.float32 and np.isfinite(found).all()
    assert found[0, 0] == 1 and not found[1].any()


def test_a_row_does_not_depend_on_those_beside_it():
    pictures = [noise(n, 32, 3) if n % 3 else None for n in range(2 * BLOCK + 3)]
    together = rows(pictures, 32, 3)
    alone = np.concatenate([rows([x], 32, 3) for x in pictures])
    assert np.allclose(together, alone, atol=1e-5)


def test_edges_are_those_of_the_stem():
    x_HWC = noise(1, 32, 1)
    x = torch.from_numpy(x_HWC)[None].float() / 255
    standard = (x - x.mean()) / (x.std(correction=0) + 1e-3)
    found = rows([x_HWC], 32, 1)[0, 1 + 256 :].reshape(4, 4, ORIENTATIONS)
    assert np.allclose(found, edges(standard, 8)[0], atol=1e-5)


def test_colours_say_how_much_of_each_area_has_them():
    red = np.zeros((64, 64, 3), np.uint8)
    red[:16, :8] = (255, 0, 0)  # half of the first area
    colours = rows([red], 64, 3)[0, 1 + 256 + 576 :].reshape(4, 4, 4, 4, 4)
    assert colours[0, 0, 3, 0, 0] == pytest.approx(0.5**0.5) and colours[0, 0, 0, 0, 0] == pytest.approx(0.5**0.5)
    assert colours[1, 2, 0, 0, 0] == 1 and (colours**2).sum() == pytest.approx(16)


def test_memory_does_not_grow_with_the_pictures_beyond_their_rows():
    x_HWC, spec = noise(2, 224, 3), seen(224, 3)
    samples = [showing(x_HWC, n) for n in range(64)]
    flat_rows(samples[:1], PICTURE, spec, str)
    tracemalloc.start()
    found = flat_rows(samples, PICTURE, spec, str)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * found.nbytes + BLOCK * 3 * 4 * 64**2


def stripes(seed: int, upright: bool) -> np.ndarray:
    """Stripes of any shade, width and place, in noise: no single pixel tells them apart."""
    rng = np.random.default_rng(seed)
    along = np.indices((32, 32))[1 if upright else 0]
    wave = 60 * np.sin(2 * np.pi * (along / rng.uniform(5, 9) + rng.random()))
    return np.clip(rng.uniform(90, 160) + wave + rng.normal(0, 15, (32, 32)), 0, 255).astype(np.uint8)[..., None]


def test_a_logistic_regression_learns_what_no_pixel_tells():
    made = [showing(stripes(n, bool(n % 2)), n, "ab"[n % 2]) for n in range(120)]
    model = Logistic(PICTURE, seen(32, 1), str).fit(made[:80], [], LogisticConfig())
    right = [p.label == s.label for p, s in zip(model.predict(made[80:]), made[80:], strict=True)]
    assert np.mean(right) > 0.95


def test_a_kept_regression_is_used_for_the_rows_alone_that_it_was_fitted_on(tmp_path: Path):
    """A folder of benchmarks lives longer than the recipe of the rows."""
    train = [showing(noise(n, 16, 1) // 4 + 120 * (n % 2), n, "ab"[n % 2]) for n in range(30)]
    found = Answerer.__new__(Answerer)
    found.spec, found.tokenizer = seen(16, 1), SimpleNamespace(decode=str)  # type: ignore[assignment]
    asked = train[:4]
    assert _logistic(tmp_path, "picture", PICTURE, train, asked, found) == ["a", "b", "a", "b"]
    (first,) = tmp_path.iterdir()
    first.write_text('["kept", "b", "a", "b"]')
    assert _logistic(tmp_path, "picture", PICTURE, train, asked, found)[0] == "kept"
    darker = [showing(s.images[0] // 2, n, s.label or "") for n, s in enumerate(train)]
    assert _logistic(tmp_path, "picture", PICTURE, darker, darker[:4], found)[0] == "a"
    assert len(list(tmp_path.iterdir())) == 2
