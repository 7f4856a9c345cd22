"""Pretrained encoders: stored pictures and sounds → the features of a checkpoint that lies on local disk.

A checkpoint is a folder as transformers writes it: `config.json`, weights as safetensors and, for pictures,
`preprocessor_config.json`; or, for pictures, as timm writes it (`timm_checkpoint`). Pickled weights are never opened,
code that comes with a checkpoint is never run, nothing is fetched.

The same bytes come out wherever the work is done, on one kind of processor and one pinned stack: weights and arithmetic
are float32, one thread computes, and batches never reach beyond a unit and all have the same size, the last filled up.
Another `batch` may change the last bits, which the rounding to float16 mostly hides: so it is part of the recipe.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmlm.errors import ConfigError, DataError, LaunchError
from mmlm.features.config import EncoderConfig, FeaturesConfig
from mmlm.features.sample import Sample
from mmlm.features.spec import AudioSpec, EncoderSpec, FeatureSpec, ImageSpec
from mmlm.shards import timm_checkpoint
from mmlm.shards.codec import pack_features
from mmlm.shards.encoder_files import digest, folder_of, read_json
from mmlm.shards.encoder_inputs import Pictures, Sounds

IMAGE_MODELS = ("clip", "clip_vision_model", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "siglip",
                "siglip_vision_model", "vit")  # fmt: skip
"""`model_type` of the checkpoints that read square pictures of one size."""
AUDIO_MODELS = ("whisper",)
AHEAD = 2
"""Batches of one encoder that are computed while the next are being read."""
HELD_BYTES = 64 << 20
"""Bytes of samples that wait for their features; beyond, batches are filled up and sent."""
Features = list[np.ndarray]
"""For each item (tokens, dim) float16."""


class Ask(Protocol):
    """Something that encodes items, here or elsewhere."""

    batch: int

    def submit(self, items: list[np.ndarray]) -> Callable[[], Features]:
        """Begin with at most `batch` items; what is returned waits for the result."""
        ...


def digests(config: FeaturesConfig) -> dict[str, dict[str, str]]:
    """What an artifact's identity holds of the encoders: {} where there are none."""
    found: dict[str, str] = {kind: digest(one) for kind, one in sorted(config.encoders.items())}
    return {"encoders": found} if found else {}


def describe(config: FeaturesConfig, spec: FeatureSpec) -> dict[str, EncoderSpec]:
    """What the encoders of `config` give for what `spec` stores; without those whose kind the corpus does not have.

    Raises ConfigError when a checkpoint cannot be used, or reads something else than what is stored.
    """
    found = {}
    for kind, one in sorted(config.encoders.items()):
        if getattr(config, kind) is None:
            raise ConfigError(
                f"features.encoders.{kind}, but there is no features.{kind}",
                wanted=f"features.{kind}: the encoder reads what is stored", cure=f"set features.{kind} as well",
            )  # fmt: skip
        stored: ImageSpec | AudioSpec | None = getattr(spec, kind)
        if stored is not None:
            found[str(kind)] = _describe(one, stored)
    return found


def recipe(config: FeaturesConfig, spec: FeatureSpec) -> dict[str, Any]:
    """What of the encoders changes bytes: their digests in place of their folders. {} where there are none."""
    if not spec.encoders:
        return {}
    settings = config.encoders
    named: set[str] = set()
    for kind in spec.encoders:
        named.add("timm" if timm_checkpoint.is_timm(_config(settings[kind])) else "transformers")  # type: ignore[index]
    return {
        "encoders": {
            kind: [one.digest, settings[kind].layer, settings[kind].batch]  # type: ignore[index]
            for kind, one in spec.encoders.items()
        },
        "encoder_versions": {name: _version(name) for name in ("torch", *sorted(named))},
    }


def make_encoders(config: FeaturesConfig, spec: FeatureSpec) -> dict[str, PretrainedEncoder]:
    """kind → encoder, in order of kind; weights are read when the first item comes."""
    found = {}
    for kind, one in sorted(spec.encoders.items()):
        stored = getattr(spec, kind)
        settings = config.encoders[kind]  # type: ignore[index]
        found[kind] = PretrainedEncoder(settings.model_copy(update={"folder": folder_of(settings)}), one, stored)
    return found


class PretrainedEncoder:
    """One checkpoint in this process, on its GPU if it sees one. Travels to other processes without its weights."""

    def __init__(self, config: EncoderConfig, spec: EncoderSpec, stored: ImageSpec | AudioSpec) -> None:
        self.config, self.spec, self.stored = config, spec, stored
        self.batch = config.batch
        self._loaded: tuple[Any, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return PretrainedEncoder, (self.config, self.spec, self.stored)

    def submit(self, items: list[np.ndarray]) -> Callable[[], Features]:
        found = self.encode(items)
        return lambda: found

    def encode(self, items: list[np.ndarray]) -> Features:
        """Features of at most `batch` stored items, pictures (H, W, C) uint8 or log-mels (frames, n_mels).

        Raises ConfigError when the checkpoint is not what it was, LaunchError when the GPU's memory does not suffice.
        """
        torch = _torch()
        model, reader = self._load()
        inputs = reader.read(items, self.batch)
        with _reproducible():
            try:
                device = next(model.parameters()).device
                given = model(**{reader.argument: torch.from_numpy(inputs).to(device)})
                chosen = given.last_hidden_state
                if self.config.layer == "pooled" and not isinstance(self.stored, AudioSpec):
                    chosen = given.pooler_output[:, None]
                values = chosen[: len(items)].float().cpu().numpy()
            except torch.OutOfMemoryError:
                raise LaunchError(
                    f"the memory of the GPU does not hold {self.batch} items for {self.config.folder}",
                    cure="lower `batch` of that encoder",
                ) from None
        return [self._stored(value, item) for value, item in zip(values, items, strict=True)]

    def _stored(self, values: np.ndarray, item: np.ndarray) -> np.ndarray:
        """(tokens, dim) float32 → what is stored: of a sound only the tokens that it lasts, or their mean."""
        if isinstance(self.stored, AudioSpec):
            values = values[: max(1, math.ceil(len(item) / 2))]
            if self.config.layer == "pooled":
                values = values.mean(axis=0, keepdims=True)
        if not np.isfinite(values).all():
            raise DataError(
                f"the encoder in {self.config.folder} gives values that are not numbers", cure="use another checkpoint"
            )
        largest = np.finfo(np.float16).max  # beyond that float16 knows only infinity
        return np.clip(values, -largest, largest).astype(np.float16)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            if (found := digest(self.config)) != self.spec.digest:
                raise ConfigError(
                    f"the checkpoint in {self.config.folder} has the digest {found[:12]}",
                    wanted=f"{self.spec.digest[:12]}, which the shards were begun with",
                    cure="put the same files there, on every machine",
                )
            reader = _reader(self.config, self.stored)
            self._loaded = _load_model(self.config, reader), reader
        return self._loaded


def with_features(
    packed: Iterable[tuple[Sample, dict[str, bytes]]],
    encoders: Mapping[str, Ask],
    stored_images: Callable[[Sample, Mapping[str, bytes]], list[np.ndarray]],
) -> Iterator[tuple[Sample, dict[str, bytes]]]:
    """The samples with their `features` and the members that hold them, in the same order.

    `stored_images` gives the pictures of a sample as a reader of the shard will see them. Which items share a batch
    depends on the samples alone.
    """
    queues = {kind: _Queue(encoder) for kind, encoder in encoders.items()}
    waiting: deque[tuple[Sample, dict[str, bytes], int]] = deque()
    held = 0
    for sample, members in packed:
        size = sum(map(len, members.values()))
        for kind, queue in queues.items():
            items = stored_images(sample, members) if kind == "image" else sample.sounds
            if items:
                sample.features[kind] = []
                size += sum(item.nbytes for item in items)
                for item in items:
                    queue.add(item, sample.features[kind])
        waiting.append((sample, members, size))
        held += size
        if held > HELD_BYTES:
            for queue in queues.values():
                queue.finish()
        while waiting and _is_whole(waiting[0][0]):
            sample, members, size = waiting.popleft()
            held -= size
            yield sample, dict(sorted({**members, **pack_features(sample.features)}.items()))
    for queue in queues.values():
        queue.finish()
    for sample, members, _ in waiting:
        yield sample, dict(sorted({**members, **pack_features(sample.features)}.items()))


_MISSING = np.zeros((0, 0), np.float16)
"""Stands where features are still to come."""


def _is_whole(sample: Sample) -> bool:
    return all(one is not _MISSING for some in sample.features.values() for one in some)


class _Queue:
    """Items of one kind on their way through an encoder."""

    def __init__(self, encoder: Ask) -> None:
        self.encoder = encoder
        self.items: list[np.ndarray] = []
        self.places: list[tuple[Features, int]] = []
        self.sent: deque[tuple[Callable[[], Features], list[tuple[Features, int]]]] = deque()

    def add(self, item: np.ndarray, features: Features) -> None:
        """Queue `item`; its features will stand at the end of `features`."""
        features.append(_MISSING)
        self.items.append(item)
        self.places.append((features, len(features) - 1))
        if len(self.items) == self.encoder.batch:
            self._send()
            if len(self.sent) > AHEAD:
                self._receive()

    def finish(self) -> None:
        """Wait for the features of all items."""
        if self.items:
            self._send()
        while self.sent:
            self._receive()

    def _send(self) -> None:
        self.sent.append((self.encoder.submit(self.items), self.places))
        self.items, self.places = [], []

    def _receive(self) -> None:
        result, places = self.sent.popleft()
        for (features, at), value in zip(places, result(), strict=True):
            features[at] = value


def settings_of(config: EncoderConfig, stored: ImageSpec | AudioSpec) -> tuple[dict[str, Any], Pictures | Sounds]:
    """What a checkpoint says of its encoder, and how that reads what is stored. Raises ConfigError when it cannot."""
    reader = _reader(config, stored)
    if isinstance(reader, Pictures) and reader.timm:
        return reader.timm, reader
    return _settings(config).to_dict(), reader


def weights_of(config: EncoderConfig, stored: ImageSpec | AudioSpec) -> Any:
    """The encoder of a checkpoint of transformers with its weights, float32. Raises ConfigError when some lack."""
    return _from_transformers(config, _reader(config, stored))


def _describe(config: EncoderConfig, stored: ImageSpec | AudioSpec) -> EncoderSpec:
    found = digest(config)
    reader = _reader(config, stored)
    dim, tokens = shape_of(config, reader)
    if isinstance(stored, AudioSpec):
        tokens = max(1, math.ceil(stored.max_frames / 2))
    return EncoderSpec(digest=found, dim=dim, tokens=1 if config.layer == "pooled" else tokens, read=config.read)


def _reader(config: EncoderConfig, stored: ImageSpec | AudioSpec) -> Pictures | Sounds:
    settings = _config(config)
    kind, models = ("audio", AUDIO_MODELS) if isinstance(stored, AudioSpec) else ("image", IMAGE_MODELS)
    model = settings.get("model_type")
    if model not in models and not (kind == "image" and timm_checkpoint.is_timm(settings)):
        raise ConfigError(
            f"{config.folder} holds a model of type {model!r}",
            wanted=f"one of {', '.join(models)} for "
            + ("pictures, or a checkpoint of timm" if kind == "image" else "sounds"),
        )
    if "quantization_config" in settings or (Path(config.folder) / "adapter_config.json").exists():
        raise ConfigError(f"{config.folder} is quantised or an adapter", wanted="plain weights in one folder")
    try:
        if isinstance(stored, AudioSpec):
            return Sounds(config, stored, settings)
        return Pictures(config, stored, settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"config.json of {config.folder} cannot be used ({error})") from None


def _torch() -> Any:
    import torch

    return torch


def _config(config: EncoderConfig) -> dict[str, Any]:
    return read_json(config, "config.json") or {}


def _version(name: str) -> str:
    """Of a library that computes features. Raises ConfigError when it is not installed."""
    if name == "timm":
        return timm_checkpoint.required_version()
    try:
        return version(name)
    except PackageNotFoundError:
        raise ConfigError(
            "features.encoders need transformers, which is not installed",
            cure="pip install 'mmlm-workflows[encoders]'",
        ) from None


def _transformers() -> Any:
    """The library, quiet. Raises ConfigError when it is not installed."""
    _version("transformers")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _settings(config: EncoderConfig) -> Any:
    """The checkpoint's own settings; of a pair of encoders those of its vision part. Raises ConfigError."""
    folder = folder_of(config)
    try:
        found = _transformers().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ConfigError:
        raise
    except Exception as error:  # whatever a strange config.json makes transformers raise
        raise _unusable(config, error) from None
    return getattr(found, "vision_config", found)


def shape_of(config: EncoderConfig, reader: Pictures | Sounds) -> tuple[int, int]:
    """(dim, tokens) of the chosen layer, without reading weights: by a pass in which nothing is computed. Raises ConfigError
    when the checkpoint does not take what `reader` gives it."""
    torch = _torch()
    timm = reader.timm if isinstance(reader, Pictures) else None
    settings = None if timm else _settings(config)
    try:
        with torch.device("meta"), torch.inference_mode():
            if timm:
                model = timm_checkpoint.build(timm).eval()
            else:
                library = _transformers()
                # float32 as the weights will be read: else whatever type the checkpoint was saved in
                made = {"dtype": torch.float32, "attn_implementation": "sdpa", "trust_remote_code": False}
                model = _part(library.AutoModel.from_config(settings, **made))
            given = model(**{reader.argument: torch.zeros(reader.empty())})
        chosen = given.last_hidden_state
        if config.layer == "pooled" and isinstance(reader, Pictures):
            chosen = given.pooler_output[:, None]
    except ConfigError:
        raise
    except Exception as error:  # sizes that do not fit raise what torch likes
        raise _unusable(config, error) from None
    return int(chosen.shape[2]), int(chosen.shape[1])


def _load_model(config: EncoderConfig, reader: Pictures | Sounds) -> Any:
    """The encoder with its weights, on the GPU if there is one. Raises ConfigError when weights lack or do not fit."""
    found = _from_timm(config) if isinstance(reader, Pictures) and reader.timm else _from_transformers(config, reader)
    device = "cuda" if _torch().cuda.is_available() else "cpu"
    return found.eval().requires_grad_(False).to(device)


def _from_timm(config: EncoderConfig) -> Any:
    try:
        return timm_checkpoint.load(folder_of(config)).float()
    except ConfigError:
        raise
    except Exception as error:
        raise _unusable(config, error) from None


def _from_transformers(config: EncoderConfig, reader: Pictures | Sounds) -> Any:
    settings, torch = _settings(config), _torch()
    try:
        model, report = _transformers().AutoModel.from_pretrained(
            folder_of(config), config=settings, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:
        raise _unusable(config, error) from None
    unused = "decoder." if isinstance(reader, Sounds) else "pooler." if config.layer == "last" else "-"
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise ConfigError(
            f"{name} in {config.folder} has the shape {list(found)}", wanted=f"{list(wanted)}, as its config.json says",
            cure="take config.json and the weights from one checkpoint",
        )  # fmt: skip
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(unused))
    if missing:
        raise ConfigError(
            f"the weights in {config.folder} lack {len(missing)} of the model's tensors, such as {missing[0]}",
            wanted="all of them: those that lack would be random",
            cure="choose `layer: last`" if all("pooler" in name for name in missing) else "use another checkpoint",
        )
    return _part(model)


def _part(model: Any) -> Any:
    """Of a model with an encoder and a decoder, the encoder."""
    return model.get_encoder() if model.config.model_type in AUDIO_MODELS else model


def _unusable(config: EncoderConfig, error: Exception) -> ConfigError:
    lines = str(error).strip().split("\n")
    first = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])[:300]
    return ConfigError(
        f"the checkpoint in {config.folder} cannot be used ({type(error).__name__}: {first})",
        cure="use another checkpoint",
    )


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """One thread, plain float32, no gradients; afterwards all is as it was."""
    torch = _torch()
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
        quiet = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), quiet:
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
