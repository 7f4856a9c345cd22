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
from typing import Any, Protocol

import numpy as np

from mmlm.errors import ConfigError, DataError, LaunchError
from mmlm.features.config import EncoderConfig, FeaturesConfig
from mmlm.features.sample import Sample
from mmlm.features.spec import AudioSpec, EncoderSpec, FeatureSpec, ImageSpec
from mmlm.shards.codec import pack_features
from mmlm.shards.encoder_checkpoint import library_of, load_model, reader_of, shape_of, version_of
from mmlm.shards.encoder_files import digest, folder_of

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
        named.add(library_of(settings[kind]))  # type: ignore[index]
    return {
        "encoders": {
            kind: [one.digest, settings[kind].layer, settings[kind].batch]  # type: ignore[index]
            for kind, one in spec.encoders.items()
        },
        "encoder_versions": {name: version_of(name) for name in ("torch", *sorted(named))},
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
        import torch

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
            reader = reader_of(self.config, self.stored)
            self._loaded = load_model(self.config, reader), reader
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


def _describe(config: EncoderConfig, stored: ImageSpec | AudioSpec) -> EncoderSpec:
    found = digest(config)
    reader = reader_of(config, stored)
    dim, tokens = shape_of(config, reader)
    if isinstance(stored, AudioSpec):
        tokens = max(1, math.ceil(stored.max_frames / 2))
    return EncoderSpec(digest=found, dim=dim, tokens=1 if config.layer == "pooled" else tokens, read=config.read)


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """One thread, plain float32, no gradients; afterwards all is as it was."""
    import torch

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
