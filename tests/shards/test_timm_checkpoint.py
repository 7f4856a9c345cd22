"""Checkpoints of timm as encoders. Networks run in a process of their own: timm stands in a folder beside the packages."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlm.errors import ConfigError
from mmlm.features.config import EncoderConfig, FeaturesConfig
from mmlm.features.spec import FeatureSpec, ImageSpec
from mmlm.shards import encoders, timm_checkpoint
from mmlm.shards.encoder_inputs import Pictures

NEW = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 1000,
    "num_features": 192,
    "pretrained_cfg": {
        "input_size": [3, 224, 224], "interpolation": "bilinear", "crop_pct": 0.9, "mean": [0.5, 0.4, 0.3],
        "std": [0.5, 0.25, 0.125], "classifier": "head",
    },
}  # fmt: skip
OLD = {"architecture": "resnet18", "num_classes": 1000, **NEW["pretrained_cfg"]}  # type: ignore[dict-item]
RANDOM = """
import json, sys, numpy as np, torch
from pathlib import Path
from safetensors.torch import save_file
from mmlm.shards import timm_checkpoint
timm = timm_checkpoint._timm()
folder, architecture, arguments = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
folder.mkdir(parents=True)
torch.manual_seed(0)
model = timm.create_model(architecture, num_classes=5, **arguments).eval()
with torch.no_grad():
    for one in model.parameters():
        one.normal_(0, 0.05)
save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
side = arguments.get("img_size", 64)
cfg = {"input_size": [3, side, side], "interpolation": "bicubic", "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.125]}
(folder / "config.json").write_text(json.dumps({
    "architecture": architecture, "num_classes": 5, "model_args": arguments, "pretrained_cfg": cfg}))
picture = np.load(folder.parent / "picture.npy")
values = (picture.astype(np.float32) / 255 - np.float32(cfg["mean"])) / np.float32(cfg["std"])
with torch.inference_mode():
    given = model.forward_features(torch.from_numpy(values.transpose(2, 0, 1)[None]).contiguous())
    pooled = model.forward_head(given, pre_logits=True)
np.savez(folder / "direct.npz", given=given.numpy(), pooled=pooled.numpy())
"""


def configured(folder: Path, layer: str = "last") -> tuple[FeaturesConfig, FeatureSpec]:
    one = EncoderConfig.model_validate({"folder": str(folder), "layer": layer, "batch": 2})
    image = ImageSpec(size=64, patch=16, channels=3)
    config = FeaturesConfig(image=image, encoders={"image": one})
    return config, FeatureSpec(vocab_size=9, tokenizer_digest="", max_len=9, image=image, tasks=[])


def checkpoint(folder: Path, settings: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("settings", [NEW, OLD, {**NEW, "model_type": "timm_wrapper"}])
def test_pictures_are_made_as_the_network_was_trained(settings: dict, tmp_path: Path) -> None:
    config = EncoderConfig(folder=str(checkpoint(tmp_path / "one", settings)))
    reader = Pictures(config, ImageSpec(size=64, patch=16, channels=3), settings)
    assert reader.empty() == (1, 3, 224, 224)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (64, 64, 3), np.uint8)
    (found,) = reader.read([picture], 1)
    large = np.asarray(Image.fromarray(picture).resize((224, 224), Image.Resampling.BILINEAR), np.float32)
    wanted = (large / 255 - np.array([0.5, 0.4, 0.3], np.float32)) / np.array([0.5, 0.25, 0.125], np.float32)
    np.testing.assert_allclose(found, wanted.transpose(2, 0, 1), atol=1e-5)


def test_arguments_of_the_network_hold_before_what_it_was_trained_with() -> None:
    settings = {**NEW, "model_args": {"img_size": [48, 64], "in_chans": 1}}
    settings["pretrained_cfg"] = {**NEW["pretrained_cfg"], "mean": [0.5], "std": [0.25]}  # type: ignore[dict-item]
    given = timm_checkpoint.preprocessor(settings)
    assert (given["size"], given["num_channels"]) == ({"height": 48, "width": 64}, 1)


@pytest.mark.parametrize(
    "change", [{"mean": [0.5]}, {"mean": None}, {"input_size": [3]}, {"interpolation": "cubist"}, {"input_size": 7}]
)
def test_a_config_that_does_not_say_how_is_refused(change: dict, tmp_path: Path) -> None:
    settings = {**NEW, "pretrained_cfg": {**NEW["pretrained_cfg"], **change}}  # type: ignore[dict-item]
    config, spec = configured(checkpoint(tmp_path / "one", settings))
    with pytest.raises(ConfigError, match="cannot be used"):
        encoders.describe(config, spec)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_without_timm_the_cure_is_named(tmp_path: Path) -> None:
    config, spec = configured(checkpoint(tmp_path / "one", NEW))
    with pytest.raises(ConfigError, match=r"timm, which is not installed.*mmlm-workflows\[timm\]"):
        encoders.describe(config, spec)


@pytest.fixture(scope="module")
def with_timm(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that finds timm and a torchvision, without what they would install."""
    folder = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, "timm==1.0.31", "torchvision==0.28.0"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot fetch timm: {done.stderr.strip()[-200:]}")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), str(folder)])}


ENCODE = """
import json, sys, numpy as np
from pathlib import Path
from mmlm.errors import ConfigError
from mmlm.shards import encoders
from tests.shards.test_timm_checkpoint import configured
folder, layer = Path(sys.argv[1]), sys.argv[2]
config, spec = configured(folder, layer)
try:
    spec = spec.model_copy(update={"encoders": encoders.describe(config, spec)})
    one = encoders.make_encoders(config, spec)["image"]
    (found,) = one.encode([np.load(folder.parent / "picture.npy")])
except ConfigError as error:
    sys.exit(f"refused: {error}")
assert found.shape == (spec.encoders["image"].tokens, spec.encoders["image"].dim)
np.save(folder / f"{layer}.npy", found)
print(json.dumps(encoders.recipe(config, spec)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "arguments", "tokens"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, 17),
        ("resnet10t", {}, 4),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": [1, 1, 1, 1], "window_size": 2}, 4),
        ("mobilenetv3_small_050", {}, 4),
    ],
)
def test_features_are_those_of_a_direct_pass(
    architecture: str, arguments: dict, tokens: int, with_timm: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / architecture
    np.save(tmp_path / "picture.npy", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))

    def run(script: str, *words: str) -> str:
        command = [sys.executable, "-c", script, str(folder), *words]
        done = subprocess.run(command, env=with_timm, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run(RANDOM, architecture, json.dumps(arguments))
    direct = np.load(folder / "direct.npz")
    given = direct["given"][0]
    if given.ndim == 3:  # a map: (channels, rows, columns), or Swin's (rows, columns, channels)
        given = (given if "swin" in architecture else given.transpose(1, 2, 0)).reshape(tokens, -1)
    recipe = json.loads(run(ENCODE, "last"))
    assert recipe["encoder_versions"]["timm"] == "1.0.31"
    run(ENCODE, "pooled")
    assert given.std() > 1e-3
    np.testing.assert_allclose(np.load(folder / "last.npy"), given, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(np.load(folder / "pooled.npy")[0], direct["pooled"][0], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_weights_that_lack_are_refused_and_not_made_up(with_timm: dict[str, str], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    np.save(tmp_path / "picture.npy", np.zeros((64, 64, 3), np.uint8))
    folder = tmp_path / "one"
    command = [sys.executable, "-c", RANDOM, str(folder), "resnet10t", "{}"]
    subprocess.run(command, env=with_timm, check=True, capture_output=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["layer1.0.conv1.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = subprocess.run(
        [sys.executable, "-c", ENCODE, str(folder), "last"], env=with_timm, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "refused: " in done.stderr
    assert "layer1.0.conv1.weight" in done.stderr
