"""Stems and places of pictures and sounds: convolutions against torch's own, and what every stem must keep."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmlm.data.collate import collate, field_rows, pack
from mmlm.errors import ConfigError
from mmlm.features.borders import kept_patches
from mmlm.features.sample import Sample
from mmlm.features.spec import AUDIO, IMAGE, AudioSpec, FeatureSpec, ImageSpec
from mmlm.model.config import ModelConfig
from mmlm.model.embeddings import Grid
from mmlm.model.flops import Shape, forward_flops, training_flops
from mmlm.model.hog import ORIENTATIONS, HogStem, colours, edges, features_of
from mmlm.model.stems import PictureConvolutions, SoundConvolutions
from mmlm.model.transformer import FusedTransformer
from tests.small import SPEC, sample

assert SPEC.image
TOKENS = SPEC.image.tokens
CONV: dict[str, Any] = {"image_stem": "conv", "image_places": "grid", "audio_stem": "conv"}


def net(spec: FeatureSpec = SPEC, **changes: Any) -> FusedTransformer:
    torch.manual_seed(0)
    config = ModelConfig(**{"width": 32, "layers": 2, "heads": 4, "attention": "prefix", **CONV, **changes})
    return FusedTransformer(config, spec, len(field_rows(spec))).eval()


def test_convolutions_of_pictures_are_torchs():
    torch.manual_seed(0)
    spec = ImageSpec(size=24, patch=8, channels=3)
    stem = PictureConvolutions(spec, 32)
    pictures_ICHW = torch.randn(2, 3, 24, 24)
    rows = pictures_ICHW.permute(0, 2, 3, 1).reshape(2, 3, 8, 3, 8, 3).transpose(2, 3).reshape(18, 192)
    made = stem(rows, torch.arange(18))  # two pictures of one record
    x = pictures_ICHW
    for convolution in stem.convolutions:
        weight = convolution.map.weight.unflatten(1, (-1, 3, 3))  # type: ignore[union-attr, operator]
        x = F.gelu(F.conv2d(x, weight, convolution.map.bias, stride=2, padding=1))  # type: ignore[union-attr, arg-type]
    wanted = stem.out(x.permute(0, 2, 3, 1).flatten(0, 2))
    assert torch.allclose(made, wanted, atol=1e-5)


def test_the_linear_stem_is_that_of_vit():
    """A convolution as wide as its stride over the picture (Dosovitskiy et al. 2021), and a vector for the place."""
    model = net(image_stem="linear", image_places="table")
    image, D = model.image, 32
    assert image is not None
    made = image(*rows_of(picture := torch.randn(16, 16, 1)))
    kernel = image.project.weight.view(D, 8, 8, 1).permute(0, 3, 1, 2)  # type: ignore[union-attr, operator]
    whole = F.conv2d(picture.permute(2, 0, 1)[None], kernel, image.project.bias, stride=8)  # type: ignore[arg-type]
    wanted = whole[0].flatten(1).T + image.place.weight[:TOKENS]  # type: ignore[index]
    assert torch.allclose(made, wanted, atol=1e-5)


def rows_of(picture_HWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Its patches of 8 by 8, row by row, and their places."""
    patches = [picture_HWC[y : y + 8, x : x + 8].flatten() for y in (0, 8) for x in (0, 8)]
    return torch.stack(patches), torch.arange(4)


def test_convolutions_of_sounds_are_whispers():
    torch.manual_seed(0)
    stem = SoundConvolutions(AudioSpec(n_mels=8, frames_per_token=2), 16)
    sounds = [torch.randn(length * 2, 8) for length in (5, 1, 7)]
    rows = torch.cat([s.reshape(-1, 16) for s in sounds])
    made = stem(rows, torch.cat([torch.arange(n) for n in (5, 1, 7)]))
    wanted = []
    for sound in sounds:
        x = sound.T[None]
        for convolution, stride in ((stem.first, 1), (stem.second, 2)):
            weight = convolution.map.weight.unflatten(1, (-1, 3))
            x = F.gelu(F.conv1d(x, weight, convolution.map.bias, stride=stride, padding=1))
        wanted.append(x[0].T)
    assert torch.allclose(made, torch.cat(wanted), atol=1e-5)


@pytest.mark.parametrize("stem", ["conv", "hog"])
def test_packed_equals_alone(stem: str):
    model = net(image_stem=stem)
    samples = [sample(i, g) for i, g in enumerate([("image", "audio"), ("audio",), ("image",), (), ("image", "audio")])]
    together = model(pack([samples[:3], samples[3:]], SPEC, 96)).label_RC
    alone = torch.cat([model(collate([s], SPEC)).label_RC for s in samples])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_missing_modality_leaves_zero_gradients():
    model = net()
    model(collate([sample(i, ("image",)) for i in range(3)], SPEC)).label_RC.square().sum().backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("answer"):
            assert parameter.grad is not None, name
    assert all(not p.grad.any() for p in model.audio.parameters())  # type: ignore[union-attr]
    assert all(p.grad.any() for n, p in model.image.named_parameters() if "strength" not in n)  # type: ignore[union-attr]


def two_of(kind: str, a: int, b: int) -> Sample:
    """A record with the picture or sound of sample `a` before its context, and that of `b` behind it."""
    one = sample(3, (kind, "context"))
    tokens, middle = one.tokens.tolist(), one.context_spans[0][1]
    tokens = [*tokens[:middle], {"image": IMAGE, "audio": AUDIO}[kind], *tokens[middle:]]
    both = [sample(n, (kind,)) for n in (a, b)]
    name = {"image": "images", "audio": "sounds"}[kind]
    media: dict[str, Any] = {name: [getattr(n, name)[0] for n in both]}
    return dataclasses.replace(one, tokens=np.array(tokens, np.int32), answer_at=one.answer_at + 1, **media)


def are_told_apart(model: FusedTransformer, kind: str) -> None:
    """Which came first counts, and what stands beside the record does not."""
    ab, ba = (model(collate([two_of(kind, *order)], SPEC)).label_RC for order in ((1, 2), (2, 1)))
    assert not torch.allclose(ab, ba, atol=1e-3)
    beside = model(pack([[two_of(kind, 1, 2), sample(4), two_of(kind, 2, 1)]], SPEC)).label_RC
    assert torch.allclose(beside[[0, 2]], torch.cat([ab, ba]), atol=1e-5)


@pytest.mark.parametrize("stem", [{}, {"image_stem": "hog"}, {"image_stem": "linear", "image_places": "table"}])
def test_several_pictures_anywhere_are_told_apart(stem: dict[str, Any]):
    are_told_apart(net(**stem), "image")


@pytest.mark.parametrize("stem", ["conv", "linear"])
def test_several_sounds_in_one_record_are_told_apart(stem: str):
    """Each from its own first moment."""
    batch = collate([two_of("audio", 1, 2)], SPEC)
    starts = (batch.mel_at_M == 0).nonzero()[:, 0].tolist()
    assert len(starts) == 2 and batch.mel_at_M.tolist() == [*range(starts[1]), *range(len(batch.mel_at_M) - starts[1])]
    are_told_apart(net(audio_stem=stem), "audio")


def test_a_frame_of_a_video_has_its_time_and_its_rows_and_columns():
    places = Grid(2, 16)
    at = torch.arange(12)  # three frames of two by two patches
    made = places(at).view(3, 2, 2, 16).detach()
    times = made[:, 0, 0] - made[0, 0, 0]
    assert len({tuple(t.tolist()) for t in times}) == 3
    assert torch.allclose(made - times[:, None, None], made[:1].expand(3, 2, 2, 16), atol=1e-5), (
        "the same in each frame"
    )
    down, right = made[0, 1, 0] - made[0, 0, 0], made[0, 0, 1] - made[0, 0, 0]
    assert torch.allclose(made[0, 1, 1], made[0, 0, 0] + down + right, atol=1e-5)


def test_the_flops_of_convolutions_are_those_that_pytorch_counts():
    model = net()
    batch = collate([sample(3)] * 4, SPEC)
    shape = Shape.of(batch)
    with FlopCounterMode(display=False) as counter:
        model(batch)
    assert counter.get_total_flops() == forward_flops(model.config, SPEC, shape)
    with FlopCounterMode(display=False) as counter:
        out = model(batch)
        (out.answer_AV.sum() + out.label_RC.sum()).backward()
    assert counter.get_total_flops() == training_flops(model.config, SPEC, shape)


def test_the_flops_of_the_map_behind_histograms_are_those_that_pytorch_counts():
    model = net(image_stem="hog")
    assert model.image is not None
    with FlopCounterMode(display=False) as counter:
        model.image.project(torch.randn(2 * TOKENS, SPEC.image.patch_dim), torch.arange(2 * TOKENS))  # type: ignore[union-attr]
    asked = Shape.of(collate([sample(3)] * 4, SPEC))
    two = dataclasses.replace(asked, patches=2 * TOKENS)
    none = dataclasses.replace(asked, patches=0)
    assert counter.get_total_flops() == forward_flops(model.config, SPEC, two) - forward_flops(model.config, SPEC, none)


def bars(turn: float, shade: float = 1.0) -> torch.Tensor:
    """(1, 16, 16, 1): a wave of stripes whose gradient points to `turn`, radians."""
    down, right = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    return shade * (0.5 * (right * math.cos(turn) + down * math.sin(turn))).sin()[None, ..., None]


def test_edges_are_told_apart_by_their_orientation_not_by_their_strength():
    for n in range(ORIENTATIONS):
        turn = math.pi * n / ORIENTATIONS
        found = edges(bars(turn), 8)
        assert (found.argmax(-1) == n).all(), n
        assert torch.allclose(found, edges(bars(turn, 0.5), 8), atol=0.02)
        assert torch.allclose(found, edges(bars(turn + math.pi), 8), atol=1e-3), "an edge has no direction"
    flat = edges(torch.full((1, 16, 16, 1), 0.7), 8, torch.ones(1, 16, 16, 1))
    assert not flat.any()


def test_slopes_of_histograms_are_finite_where_nothing_changes():
    """An explanation follows them from a plain picture on."""
    stem = HogStem(ImageSpec(size=16, patch=8, channels=3), 8)
    rows = torch.zeros(4, 192, requires_grad=True)
    stem(rows, torch.arange(4)).sum().backward()
    assert rows.grad is not None and rows.grad.isfinite().all() and rows.grad.abs().max() < 100


def test_colours_are_shares_of_pixels_between_their_nearest_levels():
    x = torch.randn(2, 16, 16, 3)
    found = colours(x, 8)
    assert found.shape == (2, 2, 2, 64) and torch.allclose(found.sum(-1), torch.ones(2, 2, 2), atol=1e-5)
    one = colours(torch.tensor([-1.5, 0.5, 0.0]).expand(1, 16, 16, 3), 8)[0, 0, 0].view(4, 4, 4)
    assert one[0, 2, 1] == 0.5 and one[0, 2, 2] == 0.5


def test_a_token_is_what_its_patch_shows():
    """Of two pictures that differ inside one patch, its token differs, and those beside it whose edges are compared with its."""
    spec = ImageSpec(size=32, patch=8, channels=1)
    torch.manual_seed(0)
    stem = HogStem(spec, 8)
    rows = torch.randn(16, 64)
    other = rows.clone()
    other[5].view(8, 8)[2:6, 2:6] += 1.0
    change = (stem(rows, torch.arange(16)) - stem(other, torch.arange(16))).abs().sum(-1) > 1e-6
    assert set(change.nonzero()[:, 0].tolist()) <= {0, 1, 2, 4, 5, 6, 8, 9, 10} and change[5]
    assert stem.out.weight.shape == (8, features_of(spec))
    assert features_of(ImageSpec(size=32, patch=16, channels=3)) == 4 * 76


def test_patches_that_no_power_of_two_makes_are_refused():
    spec = SPEC.model_copy(update={"image": ImageSpec(size=24, patch=12, channels=1)})
    with pytest.raises(ConfigError, match="patches of 12 pixels"):
        net(spec)


DROPPING = SPEC.model_copy(update={"image": ImageSpec(size=32, patch=8, channels=1, padding="drop")})


def wide(seed: int, high: int) -> np.ndarray:
    """A picture of 32 by `high` pixels in the middle of white, with a white stripe of its own."""
    picture = np.full((32, 32, 1), 255, np.uint8)
    picture[16 - high // 2 : 16 + high // 2] = np.random.default_rng(seed).integers(0, 200, (high, 32, 1))
    picture[:, 8:16] = 255
    return picture


def kept_of(x_HWC: np.ndarray, spec: ImageSpec) -> list[int]:
    return kept_patches(dataclasses.replace(sample(0, ("image",)), images=[x_HWC]), spec)[0].tolist()


def test_padding_becomes_no_token():
    assert DROPPING.image is not None
    keeping = DROPPING.image.model_copy(update={"padding": "keep"})
    assert kept_of(wide(0, 32), DROPPING.image) == list(range(16))
    assert kept_of(wide(0, 16), DROPPING.image) == list(range(4, 12)), "a white column inside stays"
    assert len(kept_of(np.full((32, 32, 1), 255, np.uint8), DROPPING.image)) == 4, "something stays"
    assert kept_of(wide(0, 16), keeping) == list(range(16))


@pytest.mark.parametrize("stem", [{}, {"image_stem": "hog"}, {"image_stem": "linear", "image_places": "table"}])
def test_pictures_of_several_shapes_packed_equal_alone(stem: dict[str, Any]):
    model = net(DROPPING, **stem)
    samples = [
        dataclasses.replace(two_of("image", i, i), images=[wide(i, h), wide(i, 32)]) for i, h in enumerate((8, 16, 32))
    ]
    samples += [dataclasses.replace(sample(9, ("image",)), images=[wide(9, 8)])] * 2
    batch = pack([samples[:2], samples[2:]], DROPPING, 96)
    assert len(batch.patches_PD) == 8 + 8 + 16 + 3 * 16 + 2 * 8
    together = model(batch).label_RC
    alone = torch.cat([model(collate([s], DROPPING)).label_RC for s in samples])
    assert torch.allclose(together, alone, atol=1e-5)


def test_specs_that_keep_padding_have_the_digest_they_had():
    assert SPEC.digest != SPEC.model_copy(update={"image": SPEC.image.model_copy(update={"padding": "drop"})}).digest  # type: ignore[union-attr]
