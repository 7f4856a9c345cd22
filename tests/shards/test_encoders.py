from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmlm.artifacts import Artifact
from mmlm.corpus.records import read_records
from mmlm.data.reader import ShardReader
from mmlm.errors import ArtifactError, ConfigError, LaunchError
from mmlm.features.config import EncoderConfig, FeaturesConfig
from mmlm.features.sample import Sample
from mmlm.features.spec import AudioSpec, EncoderSpec, FeatureSpec
from mmlm.features.spec import load as load_spec
from mmlm.shards import encoders, plan
from mmlm.shards.codec import pack, unpack
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard
from mmlm.shards.verify import rebuild, verify
from mmlm.storage import sha256_json
from tests.shards.conftest import CONFIG, make_records, shas, write_manifest

SIDE, MEAN, DEVIATION = 24, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
AUDIO = AudioSpec(n_mels=40, max_seconds=0.5, scale="whisper")
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "hidden_size": 32}


def save_vit(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A tiny random ViT with the preprocessor of one, as transformers writes it."""
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    ViTModel(ViTConfig(**SMALL, image_size=SIDE, patch_size=8, initializer_range=0.3), **settings).save_pretrained(
        folder
    )
    given = {
        "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 2, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": DEVIATION,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(given))
    return folder


def save_whisper(folder: Path) -> Path:
    """A tiny random Whisper that reads one second."""
    import torch
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(1)
    settings = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=40, max_source_positions=50, vocab_size=9, init_std=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperModel(settings).save_pretrained(folder)
    return folder


def configured(folders: dict[str, Path], **settings: Any) -> ShardConfig:
    chosen = {kind: EncoderConfig(folder=str(folder), **{"batch": 4, **settings}) for kind, folder in folders.items()}
    features = CONFIG.features.model_copy(update={"audio": AUDIO, "encoders": chosen})
    return CONFIG.model_copy(update={"features": features})


def stored_samples(path: Path) -> dict[str, Sample]:
    """id → sample with its features, from the tars."""
    found: dict[str, dict[str, bytes]] = {}
    for tar in sorted(path.glob("*.tar")):
        with tarfile.open(tar) as opened:
            for member in opened:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = opened.extractfile(member).read()  # type: ignore[union-attr]
    samples = [unpack(one, features=True) for one in found.values()]
    return {sample.id: sample for sample in samples}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {"image": save_vit(root / "vit"), "audio": save_whisper(root / "whisper")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Artifact, Path]:
    root = tmp_path_factory.mktemp("corpus")
    return write_manifest(root / "manifest", make_records(root / "data", 30)), root / "data"


@pytest.fixture(scope="module")
def shards(corpus, folders, tmp_path_factory) -> Artifact:
    return shard(configured(folders), corpus[0], data=corpus[1], out=tmp_path_factory.mktemp("out") / "shards")


def test_pictures_have_the_features_of_a_direct_pass(shards: Artifact, folders) -> None:
    import torch
    from transformers import ViTModel

    model = ViTModel.from_pretrained(folders["image"]).eval()
    seen = 0
    for sample in stored_samples(shards.path).values():
        assert len(sample.features.get("image", [])) == len(sample.images)
        for image, features in zip(sample.images, sample.features.get("image", []), strict=True):
            colour = Image.fromarray(np.repeat(image, 3, axis=2)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            values = torch.from_numpy(np.asarray(colour) / 255.0 - MEAN) / torch.tensor(DEVIATION)
            with torch.inference_mode():
                direct = model(values.permute(2, 0, 1)[None].float()).last_hidden_state[0].numpy()
            assert features.dtype == np.float16
            assert features.shape == direct.shape == (10, 32)
            np.testing.assert_allclose(features, direct, rtol=1e-3, atol=1e-3)
            seen += 1
    assert seen == 20
    spec = load_spec(shards.path)
    assert (spec.encoders["image"].tokens, spec.encoders["image"].dim) == (10, 32)


def test_sounds_have_the_features_that_whisper_gives(shards: Artifact, corpus, folders) -> None:
    """Its own way is another one: zeros behind the sound, then the log-mel of one whole second."""
    import torch
    from transformers import WhisperFeatureExtractor, WhisperModel

    model = WhisperModel.from_pretrained(folders["audio"]).get_encoder().eval()
    extractor = WhisperFeatureExtractor(feature_size=40, chunk_length=1)
    records = {record.id: record for record in read_records(corpus[0].path)}
    seen = 0
    for sample in stored_samples(shards.path).values():
        for mel, features in zip(sample.sounds, sample.features.get("audio", []), strict=True):
            full = np.full((1, 40, 100), max(-1.5, mel.max() - 2.0), np.float32)
            full[0, :, : len(mel)] = mel.T
            with torch.inference_mode():
                direct = model(torch.from_numpy(full)).last_hidden_state[0].numpy()
            assert features.shape == (math.ceil(len(mel) / 2), 32)
            np.testing.assert_allclose(features, direct[: len(features)], rtol=1e-3, atol=1e-3)
            uri = next(part.uri for part in records[sample.id].parts if part.kind == "audio")
            assert uri
            wave, rate = soundfile.read(corpus[1] / uri, dtype="float32")
            wave = np.asarray(_resampled(wave, rate))
            own = extractor(wave, sampling_rate=16000, return_tensors="pt").input_features
            with torch.inference_mode():
                there = model(own).last_hidden_state[0].numpy()[: len(features)]
            assert np.corrcoef(there.ravel(), features.ravel())[0, 1] > 0.995  # silence of -1.5 behind it gives 0.990
            seen += 1
    assert seen == 20
    assert load_spec(shards.path).encoders["audio"].tokens == 25


def _resampled(wave: np.ndarray, rate: int) -> np.ndarray:
    import soxr

    made: np.ndarray = soxr.resample(wave, rate, 16000)
    return made


def test_the_set_is_sound_and_the_reader_reads_it(shards: Artifact, corpus) -> None:
    assert verify(shards.path) == []
    assert rebuild(shards.path, corpus[0].path, corpus[1], 2)[0] == []
    samples = stored_samples(shards.path)
    for sample in ShardReader(shards.path, ("train", "test")):
        assert sample.features == {}  # training does not ask for them yet
        assert len(sample.images) == len(samples[sample.id].images)


def test_without_encoders_nothing_changes(corpus, shards: Artifact, tmp_path: Path) -> None:
    config = configured({})
    plain = shard(config, corpus[0], data=corpus[1], out=tmp_path / "plain")
    spec = load_spec(plain.path)
    assert spec.encoders == {}
    assert "encoders" not in plain.extra
    old = spec.model_dump(mode="json")
    del old["encoders"]
    for task in old["tasks"]:
        del task["multiple"], task["number"]
    if old["image"]:
        del old["image"]["padding"], old["image"]["scale"]
    assert FeatureSpec.model_validate(old).digest == spec.digest == sha256_json(old)
    assert encoders.recipe(config.features, spec) == {}
    other = stored_samples(shards.path)
    for key, sample in stored_samples(plain.path).items():
        assert pack(sample) == {k: v for k, v in pack(other[key]).items() if not k.startswith("features_")}


def test_features_come_back_as_they_were_packed() -> None:
    rng = np.random.default_rng(0)
    some = {
        "image": [rng.normal(size=(3, 4)).astype(np.float16) for _ in range(11)],
        "audio": [np.ones((2, 5), np.float16)],
    }
    sample = Sample("r", "t", np.array([1, 3], np.int32), 1, features=some)
    packed = pack(sample)
    assert list(packed) == sorted(packed)
    again = unpack(packed, features=True).features
    assert again.keys() == some.keys()
    for kind in some:
        for one, other in zip(some[kind], again[kind], strict=True):
            np.testing.assert_array_equal(one, other)


def test_another_batch_is_another_recipe_with_the_same_features(
    corpus, shards: Artifact, folders, tmp_path: Path
) -> None:
    other = shard(configured(folders, batch=7), corpus[0], data=corpus[1], out=tmp_path / "other")
    assert not ids(other) & ids(shards)
    before = stored_samples(shards.path)
    for key, sample in stored_samples(other.path).items():
        for kind, some in sample.features.items():
            for one, same in zip(some, before[key].features[kind], strict=True):
                np.testing.assert_allclose(one, same, rtol=1e-3, atol=1e-4)


def ids(made: Artifact) -> set[str]:
    import pyarrow.parquet as pq

    return set(pq.read_table(made.path / "manifest.parquet")["unit_id"].to_pylist())


def test_the_content_of_a_checkpoint_counts_and_not_its_place(
    corpus, shards: Artifact, folders, tmp_path: Path
) -> None:
    moved = {kind: Path(shutil.copytree(folder, tmp_path / kind)) for kind, folder in folders.items()}
    (moved["image"] / "README.md").write_text("is not read")
    spec = load_spec(shards.path)
    config = configured(moved)
    same = {slot.unit_id for slot in plan.plan(corpus[0].path, config, spec)}
    assert same == ids(shards)
    save_vit(moved["image"], seed=5)
    changed = encoders.describe(config.features, spec)
    assert changed["audio"] == spec.encoders["audio"]
    assert changed["image"] != spec.encoders["image"]
    other = spec.model_copy(update={"encoders": changed})
    assert other.digest != spec.digest
    assert not {slot.unit_id for slot in plan.plan(corpus[0].path, config, other)} & same
    with pytest.raises(ConfigError, match="digest"):  # changed behind the back of a run
        encoders.make_encoders(config.features, spec)["image"].encode([np.zeros((16, 16, 1), np.uint8)])
    out = tmp_path / "shards"
    shard(configured({"image": moved["image"]}), corpus[0], data=corpus[1], out=out)
    save_vit(moved["image"], seed=6)
    with pytest.raises(ArtifactError, match="another"):  # the same path, and not the same shards
        shard(configured({"image": moved["image"]}), corpus[0], data=corpus[1], out=out)


@pytest.mark.parametrize("layer", ["last", "pooled"])
@pytest.mark.parametrize("kind", ["clip", "siglip", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit"])
def test_the_families_of_vision_models(kind: str, layer: Literal["last", "pooled"], tmp_path: Path) -> None:
    """Pairs of encoders give their vision part; a model without the pooler's weights has no pooled features."""
    import torch
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    vision: dict[str, Any] = {**SMALL, "image_size": SIDE, "patch_size": 8}
    text = {**SMALL, "vocab_size": 9, "num_hidden_layers": 1}
    folder = tmp_path / kind
    settings = AutoConfig.for_model(
        kind, **({"vision_config": vision, "text_config": text} if "clip" in kind or kind == "siglip" else vision)
    )
    model = AutoModel.from_config(settings, **({"add_pooling_layer": False} if kind == "vit" else {}))
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"crop_size": SIDE, "do_center_crop": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    config = configured({"image": folder}, layer=layer).features
    spec = FeatureSpec(vocab_size=9, tokenizer_digest="", max_len=9, image=CONFIG.features.image, tasks=[])
    spec = spec.model_copy(update={"encoders": encoders.describe(config, spec)})
    encoder = encoders.make_encoders(config, spec)["image"]
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 1), np.uint8)
    if (kind, layer) == ("vit", "pooled"):
        with pytest.raises(ConfigError, match="layer: last"):
            encoder.encode([picture])
        return
    (found,) = encoder.encode([picture])
    assert found.shape == (spec.encoders["image"].tokens, spec.encoders["image"].dim)
    values = torch.from_numpy(np.repeat(picture, 3, 2).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.inference_mode():
        direct = getattr(model, "vision_model", model)(pixel_values=values)
    wanted = direct.last_hidden_state[0] if layer == "last" else direct.pooler_output
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-3, atol=1e-3)


def test_sounds_pooled_are_the_mean_of_what_they_last(folders) -> None:
    config = configured({"audio": folders["audio"]}).features
    spec = FeatureSpec(vocab_size=9, tokenizer_digest="", max_len=9, audio=AUDIO, tasks=[])
    mels = [
        np.random.default_rng(i).normal(0, 0.3, (frames, 40)).astype(np.float16) for i, frames in enumerate((31, 50))
    ]
    tokens = _encode(config, spec, mels)
    pooled = _encode(configured({"audio": folders["audio"]}, layer="pooled").features, spec, mels)
    assert [one.shape for one in tokens] == [(16, 32), (25, 32)]
    assert [one.shape for one in pooled] == [(1, 32)] * 2
    for one, mean in zip(tokens, pooled, strict=True):
        np.testing.assert_allclose(one.astype(np.float32).mean(0), mean[0], atol=2e-3)


def _encode(config: FeaturesConfig, spec: FeatureSpec, items: list[np.ndarray]) -> list[np.ndarray]:
    spec = spec.model_copy(update={"encoders": encoders.describe(config, spec)})
    (encoder,) = encoders.make_encoders(config, spec).values()
    return encoder.encode(items)


def test_lossy_pictures_are_encoded_as_they_will_be_read(corpus, folders, tmp_path: Path) -> None:
    config = configured({"image": folders["image"]}).model_copy(update={"image_codec": "jpeg", "image_quality": 20})
    made = shard(config, corpus[0], data=corpus[1], out=tmp_path / "shards")
    spec = load_spec(made.path)
    encoder = encoders.make_encoders(config.features, spec)["image"]
    sample = next(one for one in stored_samples(made.path).values() if one.images)
    np.testing.assert_allclose(encoder.encode(sample.images)[0], sample.features["image"][0], rtol=1e-3, atol=1e-4)


class Doubling:
    """Gives each item twice; notes the sizes of its batches."""

    def __init__(self, batch: int) -> None:
        self.batch, self.sizes = batch, list[int]()

    def submit(self, items: list[np.ndarray]) -> Any:
        self.sizes.append(len(items))
        return lambda: [2 * item for item in items]


def test_samples_keep_their_order_and_their_own_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> list[Sample]:
        counts = [(0, 0), (3, 0), (1, 1), (0, 0), (7, 0), (0, 1), (2, 0)] * 5
        return [
            Sample(
                str(i), "t", np.zeros(1, np.int32), 0, [np.full((1, 1), 10 * i + j) for j in range(a)],
                [np.full((1, 1), 1000 + i) for _ in range(b)],
            )
            for i, (a, b) in enumerate(counts)
        ]  # fmt: skip

    for held in (encoders.HELD_BYTES, 0, 400):
        monkeypatch.setattr(encoders, "HELD_BYTES", held)
        asked = {"image": Doubling(4), "audio": Doubling(3)}
        packed = ((sample, {"json": b"x" * 10}) for sample in made())
        found = list(encoders.with_features(packed, asked, lambda sample, _: sample.images))
        assert [sample.id for sample, _ in found] == [str(i) for i in range(35)]
        for sample, packed_members in found:
            pairs = [*zip(sample.images, sample.features.get("image", []), strict=True),
                     *zip(sample.sounds, sample.features.get("audio", []), strict=True)]  # fmt: skip
            assert all(2 * item == feature for item, feature in pairs)
            assert len(packed_members) == 1 + len(pairs)
        assert sum(asked["image"].sizes) == 65
        assert max(asked["image"].sizes) <= 4


def spoiled(folders: dict[str, Path], tmp_path: Path, name: str, **changes: Any) -> Path:
    """A copy of the ViT's folder whose config.json is changed."""
    folder = Path(shutil.copytree(folders["image"], tmp_path / name))
    settings = json.loads((folder / "config.json").read_text())
    settings.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return folder


def test_checkpoints_that_are_refused(corpus, folders, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    pickled = spoiled(folders, tmp_path, "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    bare = spoiled(folders, tmp_path, "bare")
    (bare / "preprocessor_config.json").unlink()
    lacking = spoiled(folders, tmp_path, "lacking")
    tensors = load_file(lacking / "model.safetensors")
    tensors.pop("layernorm.weight")
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    outside = spoiled(folders, tmp_path, "outside")
    (outside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
    garbled = spoiled(folders, tmp_path, "garbled")
    (garbled / "config.json").write_text("[" * 100_000)
    damaged = spoiled(folders, tmp_path, "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:999])
    cases = {
        tmp_path / "gone": "is no folder",
        tmp_path: "no config.json",
        pickled: "pytorch_model.bin",
        bare: "preprocessor_config.json",
        lacking: "layernorm.weight",
        outside: r"\.\./other",
        garbled: "cannot be read",
        damaged: "cannot be used",
        spoiled(folders, tmp_path, "timm", model_type=None, architecture="vit_tiny"): "cannot be used",
        spoiled(folders, tmp_path, "text", model_type="bert"): "'bert'",
        spoiled(folders, tmp_path, "small", quantization_config={"bits": 4}): "quantised",
        spoiled(folders, tmp_path, "heads", num_attention_heads=5): r"has the shape \[32\]; wanted \[30\]",
        spoiled(folders, tmp_path, "wide", hidden_size=64): "has the shape",
        folders["audio"]: "'whisper'",
    }
    for number, (folder, message) in enumerate(cases.items()):
        with pytest.raises(ConfigError, match=message):
            shard(configured({"image": folder}), corpus[0], data=corpus[1], out=tmp_path / f"out{number}")


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (AUDIO.model_copy(update={"scale": "relative"}), "scale relative; wanted scale whisper"),
        (AUDIO.model_copy(update={"n_mels": 80}), "n_mels 80; wanted n_mels 40"),
        (AUDIO.model_copy(update={"max_seconds": 1.5}), "max_seconds = 1.5; wanted at most 1,"),
        (None, "no features.audio"),
    ],
)
def test_sounds_that_whisper_does_not_read(folders, audio: AudioSpec | None, message: str) -> None:
    config = configured({"audio": folders["audio"]}).features.model_copy(update={"audio": audio})
    spec = FeatureSpec(vocab_size=9, tokenizer_digest="", max_len=9, audio=audio, tasks=[])
    with pytest.raises(ConfigError, match=message):
        encoders.describe(config, spec)


def test_room_is_planned_for_features() -> None:
    spec = FeatureSpec(vocab_size=9, tokenizer_digest="", max_len=9, image=CONFIG.features.image, audio=AUDIO, tasks=[])
    more = spec.model_copy(update={"encoders": {"image": EncoderSpec(digest="", dim=32, tokens=10)}})
    assert more.image_bytes - spec.image_bytes == 640
    assert more.audio_bytes == spec.audio_bytes
    assert more.video_bytes == spec.video_bytes


@pytest.mark.slow
def test_on_ray_the_bytes_are_the_same(corpus, shards: Artifact, folders, tmp_path: Path) -> None:
    config = configured(folders).model_copy(update={"ray_from": 0})
    for workers in (1, 2):
        made = shard(config, corpus[0], data=corpus[1], out=tmp_path / f"{workers}", workers=workers)
        assert made.counts["workers"] == workers
        assert shas(made.path) == shas(shards.path)


DRIVER = """
import sys
from pathlib import Path
from mmlm import artifacts
from mmlm.config import parse
from mmlm.shards.config import ShardConfig
from mmlm.shards.shard import shard

manifest, data, out, config = sys.argv[1:]
if __name__ == "__main__":
    import json
    shard(parse(ShardConfig, json.loads(config), "test"), artifacts.read(manifest), data=data, out=Path(out), workers=2)
"""


@pytest.mark.slow
def test_killed_on_ray_the_rerun_gives_the_same_bytes(corpus, shards: Artifact, folders, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    config = configured(folders).model_copy(update={"ray_from": 0})
    given = [str(corpus[0].path), str(corpus[1]), str(out), config.model_dump_json()]
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *given],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, start_new_session=True,
    )  # fmt: skip
    deadline = time.time() + 120
    while not list(out.glob("*.tar")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "artifact.json").exists()
    made = shard(configured(folders).model_copy(update={"ray_from": 0}), corpus[0], data=corpus[1], out=out, workers=1)
    assert shas(made.path) == shas(shards.path)


@pytest.mark.slow
def test_an_error_in_an_actor_is_told_as_it_is(corpus, folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["image"], tmp_path / "vit"))
    config = configured({"image": folder}).model_copy(update={"ray_from": 0})
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:999])
    with pytest.raises((ConfigError, LaunchError), match="cannot be used"):
        shard(config, corpus[0], data=corpus[1], out=tmp_path / "shards", workers=1)
