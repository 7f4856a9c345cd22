"""Pretrained encoders as stems, made here at random, against transformers itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from mmlm.config import identity
from mmlm.data.collate import Batch, collate
from mmlm.errors import ConfigError
from mmlm.features import spec as feature_spec
from mmlm.features.config import FeaturesConfig
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, AUDIO, BOS, EOS, IMAGE, AudioSpec, FeatureSpec, ImageSpec, TaskSpec
from mmlm.model.config import ModelConfig
from mmlm.model.flops import Shape, forward_flops, training_flops
from mmlm.model.huggingface.stems import empty_encoder
from mmlm.model.transformer import FusedTransformer
from mmlm.publish.export import export
from mmlm.shards import encoders
from mmlm.train import planning, pretrained, weights
from mmlm.train.config import TrainConfig
from mmlm.train.groups import frozen_share, let_rest
from tests.shards.test_encoders import DEVIATION, MEAN, SIDE, save_vit, save_whisper
from tests.train.test_pretrained import folder_of as trunk_folder
from tests.train.test_pretrained import shards_of as trunk_shards

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
VISION: dict[str, dict[str, Any]] = {
    "ViT": {"intermediate_size": 64, "hidden_dropout_prob": 0.5},
    "DeiT": {"intermediate_size": 64},
    "Dinov2": {"mlp_ratio": 2, "use_swiglu_ffn": True},
    "Dinov2WithRegisters": {"mlp_ratio": 2, "num_register_tokens": 3},
    "DINOv3ViT": {"intermediate_size": 64, "num_register_tokens": 2, "use_gated_mlp": True},
    "CLIPVision": {"intermediate_size": 64, "attention_dropout": 0.5},
    "SiglipVision": {"intermediate_size": 64},
}


def vision_folder(where: Path, kind: str) -> Path:
    """A random vision model that lets every pixel be felt, as `save_pretrained` leaves it."""
    save_vit(where)  # for its preprocessor
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**SMALL, **VISION[kind]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(where)
    return where


def spec_of(**changes: Any) -> FeatureSpec:
    made: dict[str, Any] = {
        "vocab_size": 64, "tokenizer_digest": "none", "max_len": 96,
        "image": ImageSpec(size=SIDE, patch=8, channels=3, scale="fixed"),
        "audio": AudioSpec(n_mels=40, max_seconds=0.5, frames_per_token=4, scale="whisper"),
        "tasks": [TaskSpec(name="kind", labels=["a", "b", "c"], has_text=True)],
    }  # fmt: skip
    return FeatureSpec.model_validate(made | changes)


def shards_of(where: Path, **changes: Any) -> Path:
    where.mkdir(parents=True, exist_ok=True)
    feature_spec.save(spec_of(**changes), where)
    return where


def config_of(**model: Any) -> TrainConfig:
    return TrainConfig.model_validate({"model": {"width": 32, "layers": 1, "heads": 2, **model}})


def built(shards: Path, **model: Any) -> FusedTransformer:
    config = pretrained.settled(config_of(**model), shards)
    return pretrained.build(config.model, feature_spec.load(shards), shards)


def stem_of(net: FusedTransformer, kind: str) -> Any:
    """The stem of pictures or sounds, with its encoder."""
    return net.get_submodule(f"{kind}.project")


def sample(seed: int, given: tuple[str, ...] = ("image", "audio"), channels: int = 3) -> Sample:
    rng = np.random.default_rng(seed)
    slots = [slot for name, slot in (("image", IMAGE), ("audio", AUDIO)) if name in given]
    tokens = [BOS, *slots, *rng.integers(9, 64, 4).tolist(), ANSWER, *rng.integers(9, 64, 2).tolist(), EOS]
    pictures = [rng.integers(0, 256, (SIDE, SIDE, channels)).astype(np.uint8) for _ in range(1 + seed % 2)]
    loud = rng.uniform(-0.4, 1.4)
    sounds = [rng.uniform(max(loud - 2, -1.5), loud, (int(rng.integers(5, 50)), 40)).astype(np.float32)]
    for sound in sounds:
        sound[0, 0] = loud
    if len(pictures) == 2 and "image" in given:
        tokens.insert(1, IMAGE)
    at = tokens.index(ANSWER)
    return Sample(
        f"s{seed}", "kind", np.array(tokens, np.int32), at, images=pictures if "image" in given else [],
        sounds=sounds if "audio" in given else [], label="abc"[seed % 3], split="train", group=f"g{seed}",
    )  # fmt: skip


def batch_of(spec: FeatureSpec, given: tuple[str, ...] = ("image", "audio"), many: int = 4, channels: int = 3) -> Batch:
    return collate([sample(n, given, channels) for n in range(many)], spec)


@pytest.mark.parametrize("kind", VISION)
def test_pictures_go_through_the_encoder_as_transformers_runs_it(kind: str, tmp_path: Path) -> None:
    folder, shards = vision_folder(tmp_path / "vision", kind), shards_of(tmp_path / "shards")
    spec = feature_spec.load(shards)
    net = built(shards, image_encoder={"folder": str(folder)}).train()  # nothing is dropped there either
    batch = batch_of(spec)
    with torch.no_grad():
        stem = stem_of(net, "image")
        found = stem(batch.patches_PD, batch.patch_at_P)
        model = transformers.AutoModel.from_pretrained(folder).eval()
        pictures = np.stack([p for n in range(4) for p in sample(n).images])
        values = (torch.from_numpy(pictures / 255.0 - MEAN) / torch.tensor(DEVIATION)).float().permute(0, 3, 1, 2)
        wanted = stem.out(model(pixel_values=values).last_hidden_state[:, -9:])
    assert torch.allclose(found, wanted.flatten(0, 1), atol=2e-5)
    out = net(batch)
    (out.answer_AV.square().sum() + out.label_RC.square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in net.named_parameters() if n.startswith("image.project"))


def test_sounds_go_through_the_encoder_as_transformers_runs_it(tmp_path: Path) -> None:
    folder, shards = save_whisper(tmp_path / "whisper"), shards_of(tmp_path / "shards")
    spec = feature_spec.load(shards)
    batch = batch_of(spec)
    sounds = [s for n in range(4) for s in sample(n).sounds]
    net = built(shards, audio_encoder={"folder": str(folder)})
    stem = stem_of(net, "audio")
    model = transformers.AutoModel.from_pretrained(folder).get_encoder().eval()

    def direct() -> torch.Tensor:
        """Of each sound, filled up to a second, the mean of two tokens for each stack of four frames."""
        rows = []
        for sound in sounds:
            full = np.full((1, 40, 100), max(-1.5, sound.max() - 2.0), np.float32)
            full[0, :, : len(sound)] = sound.T
            hidden = model(torch.from_numpy(full)).last_hidden_state[0]
            rows.append(hidden.unflatten(0, (25, 2)).mean(1)[: -(-len(sound) // 4)])
        return torch.cat(rows)

    with torch.no_grad():
        found = stem(batch.mels_MD, batch.mel_at_M)
        assert torch.allclose(found, stem.out(direct()), atol=2e-5)
    net(batch).label_RC.square().sum().backward()
    learns = {n: p for n, p in net.named_parameters() if n.startswith("audio.project") and p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in learns.values()) and len(learns) > 20

    short = built(shards, audio_encoder={"folder": str(folder), "seconds": 0.53})
    assert isinstance(short.config, ModelConfig) and short.config.audio_encoder
    assert short.config.audio_encoder.settings["max_source_positions"] == 28  # 56 frames, whole stacks of 4
    own = stem_of(short, "audio").encoder.state_dict()
    for name, tensor in stem.encoder.state_dict().items():
        assert torch.equal(own[name], tensor[:28] if "embed_positions" in name else tensor)
    assert short(batch).label_RC.isfinite().all()


def test_smaller_pictures_grey_ones_and_fewer_patches(tmp_path: Path) -> None:
    folder = vision_folder(tmp_path / "vision", "SiglipVision")
    image = ImageSpec(size=12, patch=12, channels=1, scale="fixed")
    shards = shards_of(tmp_path / "shards", image=image)
    net = built(shards, image_encoder={"folder": str(folder)})
    picture = np.random.default_rng(0).integers(0, 256, (12, 12)).astype(np.uint8)
    one = Sample("s", "kind", np.array([BOS, IMAGE, ANSWER, EOS], np.int32), 2, images=[picture[..., None]], label="a")
    batch = collate([one], feature_spec.load(shards))
    assert batch.patches_PD.shape == (1, 144)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    large = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    values = (torch.from_numpy(large)[..., None] / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    with torch.no_grad():
        mean = model(pixel_values=values.permute(2, 0, 1)[None].float()).last_hidden_state.mean(1)
        found = stem_of(net, "image")(batch.patches_PD, batch.patch_at_P)
    assert torch.allclose(
        found, stem_of(net, "image").out(mean), atol=0.05
    )  # Pillow rounds to whole grey values, and clips


def test_what_is_missing_is_touched_in_training_and_not_computed_otherwise(tmp_path: Path) -> None:
    folders = {"image": vision_folder(tmp_path / "v", "ViT"), "audio": save_whisper(tmp_path / "w")}
    shards = shards_of(tmp_path / "shards")
    net = built(shards, **{f"{kind}_encoder": {"folder": str(folder)} for kind, folder in folders.items()})
    batch = batch_of(feature_spec.load(shards), given=())
    net(batch).label_RC.square().sum().backward()
    inside = [p for n, p in net.named_parameters() if ".project." in n and p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in inside)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(batch)
    assert not any(".project" in name for name in counter.get_flop_counts())


def test_a_model_holds_its_encoders_and_forgets_their_folders(tmp_path: Path) -> None:
    folders = {"image": vision_folder(tmp_path / "v", "CLIPVision"), "audio": save_whisper(tmp_path / "w")}
    shards = shards_of(tmp_path / "shards")
    (shards / "tokenizer.json").write_text("{}")
    spec = feature_spec.load(shards)
    asked = config_of(**{f"{kind}_encoder": {"folder": str(folder)} for kind, folder in folders.items()})
    config = pretrained.settled(asked, shards)
    net = pretrained.build(config.model, spec, shards).eval()
    out = tmp_path / "model"
    out.mkdir()
    weights.save_model(out, net.state_dict(), net.config, shards)
    for folder in folders.values():
        folder.rename(folder.with_name(folder.name + "-elsewhere"))
        assert str(folder) not in (out / "config.json").read_text()
    again = weights.load_model(out, spec).eval()
    assert torch.equal(again(batch_of(spec)).label_RC, net(batch_of(spec)).label_RC)
    known = pretrained.nameless(config)
    assert isinstance(known.model, ModelConfig) and isinstance(net.config, ModelConfig)
    assert known.model.image_encoder and net.config.image_encoder
    assert known.model.image_encoder.digest == net.config.image_encoder.digest
    assert known.model.image_encoder.settings == {}, (
        "which follow from the digest, and from the version of transformers"
    )
    elsewhere = {f"{kind}_encoder": {"folder": str(f) + "-elsewhere"} for kind, f in folders.items()}
    assert pretrained.nameless(pretrained.settled(config_of(**elsewhere), shards)) == known


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "DINOv3ViT", "CLIPVision", "SiglipVision"])
def test_a_model_made_in_bfloat16_is_so_throughout(kind: str, tmp_path: Path) -> None:
    """As `from_pretrained` makes one of a folder of bfloat16 weights."""
    folders = {"image": vision_folder(tmp_path / "v", kind), "audio": save_whisper(tmp_path / "w")}
    shards = shards_of(tmp_path / "shards")
    net = built(shards, **{f"{kind}_encoder": {"folder": str(folder)} for kind, folder in folders.items()}).eval()
    spec = feature_spec.load(shards)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        half = weights.build(net.config, spec).eval()
    finally:
        torch.set_default_dtype(before)
    half.load_state_dict(net.state_dict())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    batch = batch_of(spec)
    with torch.no_grad():
        assert torch.allclose(half(batch).label_RC.float(), net(batch).label_RC, atol=0.1)


def test_only_known_types_are_built() -> None:
    """Of a config.json that somebody sent: no code of its own, and no question whether to run it."""
    for settings in ({"model_type": "gpt2"}, {"auto_map": {"AutoModel": "theirs.Model"}}):
        with pytest.raises(ConfigError, match=r"a pretrained stem of type .*; wanted one of vit, deit"):
            empty_encoder(settings)


def test_a_model_without_them_is_what_it_was_before_there_were_any() -> None:
    assert not {"image_encoder", "audio_encoder"} & set(identity(config_of())["model"])
    assert "image_encoder" in identity(config_of(image_encoder={"folder": "x"}))["model"]


def test_a_trunk_is_exported_without_them_and_says_so(tmp_path: Path) -> None:
    trunk = trunk_folder(tmp_path / "llama")
    spec, shards = trunk_shards(tmp_path / "shards", (trunk / "tokenizer.json").read_text())
    spec = spec.model_copy(update={"image": ImageSpec(size=SIDE, patch=8, channels=3, scale="fixed")})
    feature_spec.save(spec, shards)
    model = {"pretrained": {"folder": str(trunk)}, "image_encoder": {"folder": str(save_vit(tmp_path / "v"))}}
    config = pretrained.settled(TrainConfig.model_validate({"model": model}), shards)
    net = pretrained.build(config.model, spec, shards)
    (tmp_path / "model").mkdir()
    weights.save_model(tmp_path / "model", net.state_dict(), net.config, shards)
    made = export(str(tmp_path / "model"), tmp_path / "out", "llama")
    assert made.architecture == "LlamaForCausalLM" and "image" in made.left_out
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.model.norm.weight, net.state_dict()["norm.weight"])


def test_rest_rates_and_recomputation(tmp_path: Path) -> None:
    folders = {"image": vision_folder(tmp_path / "v", "Dinov2"), "audio": save_whisper(tmp_path / "w")}
    shards = shards_of(tmp_path / "shards")
    model = {f"{kind}_encoder": {"folder": str(folder)} for kind, folder in folders.items()}
    net = built(shards, **model).train()
    batch = batch_of(feature_spec.load(shards))
    net(batch).label_RC.square().sum().backward()
    plain = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    net.set_up(recompute=1)
    net(batch).label_RC.square().sum().backward()
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, plain[name], atol=1e-5), name
    with pytest.raises(ValueError, match="image_stem conv and image_encoder: give one of them"):
        config_of(image_stem="conv", image_encoder={"folder": "x"})
    freeze = [{"modules": ["image.project.encoder"]}]
    rests = let_rest(net, TrainConfig.model_validate({"freeze": freeze}))
    position = (
        "audio.project.encoder.embed_positions.weight"  # which nothing trains, and a checkpoint holds all the same
    )
    assert position in rests and len(rests) > 1
    assert all(name.startswith("image.project.encoder.") for name in rests if name != position)
    share = frozen_share(net)
    assert share.maps == 0 and share.encoders == (1.0, 0.0)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "DINOv3ViT", "SiglipVision"])
def test_flops_and_parameters_are_those_that_pytorch_counts(kind: str, tmp_path: Path) -> None:
    folders = {"image": vision_folder(tmp_path / "v", kind), "audio": save_whisper(tmp_path / "w")}
    shards = shards_of(tmp_path / "shards")
    spec = feature_spec.load(shards)
    model = {f"{name}_encoder": {"folder": str(folder)} for name, folder in folders.items()}
    config = pretrained.settled(config_of(**model), shards)
    net = pretrained.build(config.model, spec, shards)
    batch = batch_of(spec, many=8)
    for kind_of_media in ("image", "audio"):
        stem_of(net, kind_of_media).encoder.set_attn_implementation("eager")  # fused attention is not counted on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stem_of(net, "image")(batch.patches_PD, batch.patch_at_P)
        stem_of(net, "audio")(batch.mels_MD, batch.mel_at_M)
    bare = config_of().model
    shape = Shape.of(batch)
    more = forward_flops(config.model, spec, shape) - forward_flops(bare, spec, shape)
    first = 2 * shape.patches * 192 * 32 + 2 * shape.mels * 160 * 32  # the linear stems that these replace
    assert more + first == pytest.approx(counter.get_total_flops(), rel=0.02)
    whole = planning.counted(config, config.model, spec)
    assert whole.parameters == sum(p.numel() for p in net.parameters())
    rest = TrainConfig.model_validate(
        {**config.model_dump(mode="json"), "freeze": [{"modules": ["image.project.encoder", "audio.project.encoder"]}]}
    )
    resting = planning.counted(rest, rest.model, spec)
    assert resting.trained < whole.trained / 2
    spared = training_flops(config.model, spec, shape) - training_flops(
        config.model, spec, shape, frozen=resting.frozen
    )
    assert spared == pytest.approx(2 * counter.get_total_flops(), rel=0.15)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no pictures": ({"image": None}, {}, "shards without features.image"),
    "relative": ({"image": ImageSpec(size=SIDE, patch=8, channels=3)}, {}, "scale relative"),
    "another grid": ({"image": ImageSpec(size=SIDE, patch=12, channels=3, scale="fixed")}, {}, "2 × 2 patches.*: 1, 3"),
    "another digest": ({}, {"image_encoder": {"digest": "0" * 64}}, "has the digest"),
    "no folder": ({}, {"image_encoder": {"folder": "/nowhere"}}, r"^train\.model\.image_encoder: /nowhere is no folder"),
    "none named": ({}, {"image_encoder": {"folder": ""}}, "has no folder"),
    "long sounds": (
        {"audio": AudioSpec(n_mels=40, max_seconds=2, scale="whisper")}, {"audio_encoder": {}}, r"max_seconds = 2"
    ),
    "odd stacks": (
        {"audio": AudioSpec(n_mels=40, max_seconds=0.5, scale="whisper", frames_per_token=5)}, {"audio_encoder": {}},
        "frames_per_token = 5",
    ),
    "too few seconds": ({}, {"audio_encoder": {"seconds": 0.2}}, r"seconds = 0\.2.*from 0\.5.*to 1,"),
    "seconds between two stacks": ({}, {"audio_encoder": {"seconds": 0.47}}, r"seconds = 0\.47;.*from 0\.5.*to 1,"),
    "another scale": (
        {"audio": AudioSpec(n_mels=40, max_seconds=0.5)}, {"audio_encoder": {}}, "scale relative.*scale whisper"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    stored, asked, message = REFUSED[name]
    folders = {"image": save_vit(tmp_path / "v"), "audio": save_whisper(tmp_path / "w")}
    shards = shards_of(tmp_path / "shards", **stored)
    asked = asked if "audio_encoder" in asked else {"image_encoder": {}, **asked}
    model = {
        key: {"folder": str(folders[key.split("_")[0]]), **value} if key.endswith("_encoder") else value
        for key, value in asked.items()
    }
    with pytest.raises(ConfigError) as caught:
        pretrained.settled(config_of(**model), shards)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_of_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """Their config.json names the type, in which transformers would make the encoder."""
    folders = {"image": save_vit(tmp_path / "v"), "audio": save_whisper(tmp_path / "w")}
    for folder in folders.values():
        transformers.AutoModel.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]
    shards = shards_of(tmp_path / "shards")
    net = built(shards, **{f"{kind}_encoder": {"folder": str(folder)} for kind, folder in folders.items()})
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert net(batch_of(feature_spec.load(shards))).label_RC.isfinite().all()
    features = FeaturesConfig.model_validate(
        {"audio": {}, "encoders": {kind: {"folder": str(folder)} for kind, folder in folders.items()},
         "image": {"size": SIDE, "patch": 8, "channels": 3}}
    )  # fmt: skip
    assert {kind: one.dim for kind, one in encoders.describe(features, spec_of()).items()} == {"image": 32, "audio": 32}


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(path: Path, name: str) -> None:
    tensors = load_file(path)
    tensors[name][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "pictures of another size": (
        lambda folder: rewrite(folder / "preprocessor_config.json", size={"height": 48, "width": 48}),
        r"cannot be used \(ValueError: Input image size \(48\*48\) doesn't match model \(24\*24\)",
    ),
    "another shape": (
        lambda folder: rewrite(folder / "config.json", intermediate_size=96),
        r"has the shape \[64.*wanted \[96.*as its config\.json says",
    ),
    "no numbers": (
        lambda folder: spoil(folder / "model.safetensors", "layernorm.weight"),
        r"layernorm\.weight in .* has values that are not numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_told_with_its_key(name: str, tmp_path: Path) -> None:
    """What would otherwise end in an error of transformers on a rank, or in losses that are no numbers."""
    breaks, message = BROKEN[name]
    folder = save_vit(tmp_path / "v")
    breaks(folder)
    with pytest.raises(ConfigError) as caught:
        built(shards_of(tmp_path / "shards"), image_encoder={"folder": str(folder)})
    said = str(caught.value)
    assert said.startswith("train.model.image_encoder: ") and re.search(message, said, re.DOTALL), said
