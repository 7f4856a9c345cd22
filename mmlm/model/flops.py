"""FLOPs of a batch: every matrix product of the model, a multiplication and an addition counted as two.

What a step is worth, not what a kernel happens to do: padding counts nothing, attention counts L² for each record of L
positions (both triangles, as Chowdhery et al. 2022, appendix B, do), recomputed activations only when asked for.
Norms, softmax, activation functions and embedding look-ups are left out: under 1 % from width 512 on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from mmlm.features.spec import FeatureSpec
from mmlm.model.baseline_config import AnyModelConfig, CnnConfig, RecurrentConfig
from mmlm.model.baseline_flops import cnn_forward, recurrent_blocks
from mmlm.model.config import ModelConfig
from mmlm.model.fusion_config import AddConfig, AdversarialConfig, CrossAttentionConfig, LateConfig
from mmlm.model.hog import features_of
from mmlm.model.huggingface.stems import picture_flops, sound_flops, width_of
from mmlm.model.packed import numbered
from mmlm.model.stems import convolution_flops
from mmlm.model.streams import SLOTS, slots_of, without_slots
from mmlm.model.transformer import IGNORE, Inputs


class Frozen(NamedTuple):
    """What has no gradient."""

    maps: float = 0.0
    """Share of the weights of linear maps, without those of pretrained encoders; 1 where only adapters are trained."""
    encoders: tuple[float, float] = (0.0, 0.0)
    """Share of the weights of the pretrained encoder of pictures, and of that of sounds."""


NOTHING = Frozen()


@dataclass(frozen=True)
class Shape:
    """What a batch asks of the model, in numbers."""

    lengths: tuple[int, ...]
    """Positions of each record or piece."""
    targets: int
    """Positions that a next token is predicted for: rows of the vocabulary head."""
    answers: int = 0
    """Records with an `<answer>`: rows of the class head."""
    patches: int = 0
    mels: int = 0
    read: int | None = None
    """Positions that a head reads, which is where the last feed-forward works; by default as many as `targets`."""
    prompts: tuple[int, ...] | None = None
    """Positions of each record before `<answer>`, of a piece its media; by default all but the targets."""
    media: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Positions of each record that hold a modality, by its name; of those that are not named, none."""
    tags: tuple[int, ...] = ()
    """Runs of such positions in each record, for which text that is read by itself keeps a token each."""

    @classmethod
    def of(cls, batch: Inputs) -> Shape:
        """The shape of a real batch. On a GPU this waits for the batch to be there: take it before the batch is moved."""
        record_X = numbered(batch.segment_BT)
        prompt_BT = batch.prompt_BT.flatten().index_fill(0, batch.answer_at_R, False).view(batch.prompt_BT.shape)
        lengths = torch.bincount(record_X)

        def in_each(mask_BT: torch.Tensor) -> tuple[int, ...]:
            """How many positions of each record are marked."""
            counts = torch.bincount(record_X[mask_BT[batch.segment_BT >= 0]], minlength=len(lengths))
            return tuple(counts.tolist())

        text, with_tags = in_each(without_slots(batch)), in_each(without_slots(batch, tags=True))
        return cls(
            lengths=tuple(lengths.tolist()),
            prompts=in_each(prompt_BT),
            media={name: in_each(slots_of(batch, name)) for name in SLOTS},
            tags=tuple(b - a for a, b in zip(text, with_tags, strict=True)),
            targets=int((batch.target_BT != IGNORE).sum()),
            answers=len(batch.answer_at_R),
            patches=len(batch.patches_PD),
            mels=len(batch.mels_MD),
            read=int((batch.target_BT != IGNORE).flatten().index_fill(0, batch.answer_at_R, True).sum()),
        )

    @property
    def tokens(self) -> int:
        """Real positions, without padding."""
        return sum(self.lengths)

    def among(self, name: str) -> tuple[int, ...]:
        """Positions of each record that hold this modality; of `text`, those that hold none."""
        if name != "text":
            return self.media.get(name) or (0,) * len(self.lengths)
        return tuple(n - sum(m) for n, *m in zip(self.lengths, *self.media.values(), strict=True))

    @property
    def prompts_or_rest(self) -> tuple[int, ...]:
        """`prompts`, or what the targets leave of each record."""
        if self.prompts is not None:
            return self.prompts
        each = -(-self.targets // max(len(self.lengths), 1))
        return tuple(max(0, length - each) for length in self.lengths)


def forward_flops(config: AnyModelConfig, spec: FeatureSpec, shape: Shape) -> int:
    """FLOPs of one forward pass."""
    if isinstance(config, CnnConfig):
        return cnn_forward(config, spec, shape)[0]
    encoders = sum(map(sum, encoder_flops(config, spec, shape)))
    return _blocks(config, spec, shape) + _heads(config, spec, shape) + sum(_media(config, spec, shape)) + encoders


def training_flops(
    config: AnyModelConfig, spec: FeatureSpec, shape: Shape, *, recomputed: bool = False, frozen: Frozen = NOTHING
) -> int:
    """FLOPs of one forward and backward pass: a product's two gradients cost as much as itself each; media features
    need no gradient of their own. `recomputed` adds the second forward pass of checkpointed blocks: give it for the
    time a step takes, leave it out for MFU. What adapters cost themselves, and the second gradient of the scores of
    attention, are left out.
    """
    if isinstance(config, CnnConfig):
        whole, first = cnn_forward(config, spec, shape)
        return 3 * whole - first
    blocks = _blocks(config, spec, shape)
    first, rest = _media(config, spec, shape)
    whole = round((3 - frozen.maps) * (blocks + _heads(config, spec, shape))) + 3 * rest + 2 * first
    whole += sum(
        round((3 - 2 * share) * behind + (2 - share) * reading)  # nothing flows back through one that rests whole
        for (reading, behind), share in zip(encoder_flops(config, spec, shape), frozen.encoders, strict=True)
    )
    if not recomputed:
        return whole
    trained = zip(encoder_flops(config, spec, shape), frozen.encoders, strict=True)
    return whole + blocks + sum(behind for (_, behind), share in trained if share < 1)


def encoder_flops(config: AnyModelConfig, spec: FeatureSpec, shape: Shape) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of the pretrained encoders of pictures and of sounds, one forward pass: of the map that reads what comes in, and of all
    behind it. Each picture and each sound is encoded as a whole."""
    image, audio = (getattr(config, f"{kind}_encoder", None) for kind in ("image", "audio"))
    pictures, sounds = media_of(spec, shape)
    reading, behind = picture_flops(image) if image else (0, 0)
    hearing, beyond = sound_flops(audio) if audio else (0, 0)
    return (pictures * reading, pictures * behind), (sounds * hearing, sounds * beyond)


def media_of(spec: FeatureSpec, shape: Shape) -> tuple[int, int]:
    """How many pictures and how many sounds a batch has; of patches and mel tokens that are left out, too few."""
    pictures = -(-shape.patches // spec.image.tokens) if spec.image else 0
    longest = -(-spec.audio.max_frames // spec.audio.frames_per_token) if spec.audio else 1
    records = sum(n > 0 for n in shape.media.get("audio", ()))
    return pictures, max(records, -(-shape.mels // longest)) if spec.audio else 0


class Stack(NamedTuple):
    """Blocks that follow each other, and what goes through them."""

    layers: int
    lengths: Sequence[int]
    """Positions of each record."""
    read: int
    """Positions that are read in the end, which is where the last feed-forward works."""
    asked: Sequence[int] | None = None
    """What each record's positions ask beside themselves: all blocks, or gated layers of their own."""
    gates: int = 0
    """Gated layers, each of an attention and a feed-forward, in which they do so."""


def stacks_of(config: ModelConfig, spec: FeatureSpec, shape: Shape) -> list[Stack]:
    """Those that the heads read come last."""
    read, seen = shape.targets if shape.read is None else shape.read, _read_by(config, shape)
    if config.layout != "encoder_decoder":
        return _fused(config, spec, seen, shape.answers if config.layout == "encoder" else read)
    encoders, decoders = _fused(config, spec, seen, None), []
    for each in _sequences(config, spec, seen):
        written = [n - m for n, m, asked in zip(shape.lengths, seen.lengths, each, strict=True) if asked is not None]
        share = round(read * len(written) / max(len(each), 1))
        decoders.append(Stack(config.layers, written, share, [n for n in each if n is not None]))
    return encoders + decoders[::-1]


def _read_by(config: ModelConfig, shape: Shape) -> Shape:
    """What the blocks in which modalities meet read (`layouts.read_by`)."""
    if config.layout == "decoder":
        return shape
    prompts = shape.prompts_or_rest
    if config.layout == "encoder":  # of a record also `<answer>`, which a piece of a long one has not
        prompts = tuple(n + (r < shape.answers) for r, n in enumerate(prompts))
    return replace(shape, lengths=prompts)


def _sequences(config: ModelConfig, spec: FeatureSpec, shape: Shape) -> list[list[int | None]]:
    """Positions of each record in what goes through the blocks, one list an expert (of most fusions there is one): None
    where a record lacks its modality."""
    if isinstance(config.fusion, AddConfig | CrossAttentionConfig):
        tags = shape.tags or (0,) * len(shape.lengths)
        return [[text + tag for text, tag in zip(shape.among("text"), tags, strict=True)]]
    if not isinstance(config.fusion, LateConfig):
        return [list(shape.lengths)]
    text = shape.among("text")
    media = [zip(text, shape.among(name), strict=True) for name in spec.modalities]
    return [list(text), *([t + m if m else None for t, m in each] for each in media)]


def _fused(config: ModelConfig, spec: FeatureSpec, shape: Shape, read: int | None) -> list[Stack]:
    """`read` by default all that goes through the blocks."""
    kind, layers, stacks = config.fusion, config.reading_layers, []
    for each in _sequences(config, spec, shape):
        has = [n for n in each if n is not None]
        share = sum(has) if read is None else round(read * len(has) / max(len(each), 1))
        stacks.append(Stack(layers, has, share))
    if not isinstance(kind, AddConfig | CrossAttentionConfig):
        return stacks[::-1]
    media = [shape.among(name) for name in spec.modalities]
    if isinstance(kind, CrossAttentionConfig):
        asked = [sum(each) for each in zip(*media, strict=True)] or [0] * len(shape.lengths)
        stacks = [stacks[0]._replace(asked=asked, gates=-(-layers // kind.every))]
    return [*(Stack(kind.layers, [n for n in each if n], sum(each)) for each in media), *stacks]


def _blocks(config: ModelConfig | RecurrentConfig, spec: FeatureSpec, shape: Shape) -> int:
    if isinstance(config, RecurrentConfig):
        return recurrent_blocks(config, shape)
    made = sum(_stack(config, stack) for stack in stacks_of(config, spec, shape))
    if isinstance(config.fusion, AdversarialConfig):  # the discriminator, of each modality that a record has
        seen = _read_by(config, shape)
        judged = sum(n > 0 for name in ("text", *spec.modalities) for n in seen.among(name))
        made += 2 * judged * config.fusion.width * (config.width + 1 + len(spec.modalities))
    return made


def _stack(config: ModelConfig, stack: Stack) -> int:
    D, H, tokens = config.width, config.head_width, sum(stack.lengths)
    maps = 2 * D * H * (2 * config.heads + 2 * config.key_value_heads)
    scores = sum(4 * length * length * H * config.heads for length in stack.lengths)  # Q Kᵀ, then its product with V
    across = _across(config, stack.lengths, stack.asked) if stack.asked is not None else 0
    fed = (stack.layers - 1 + stack.gates) * tokens + stack.read
    products = 3 if config.mlp == "swiglu" else 2
    asking = (stack.gates or stack.layers) * across
    return stack.layers * (maps * tokens + scores) + asking + 2 * products * D * config.feed_forward * fed


def _across(config: ModelConfig, asking: Sequence[int], asked: Sequence[int]) -> int:
    """Of the attention of one block from these positions of each record to those."""
    D, H = config.width, config.head_width
    maps = 2 * D * H * (2 * config.heads * sum(asking) + 2 * config.key_value_heads * sum(asked))
    return maps + sum(4 * a * b * H * config.heads for a, b in zip(asking, asked, strict=True))


def _heads(config: ModelConfig | RecurrentConfig, spec: FeatureSpec, shape: Shape) -> int:
    rows = spec.head_rows + (getattr(config, "embedding", None) or 0)
    words = 0 if getattr(config, "layout", "") == "encoder" else shape.targets
    experts = 1 + len(spec.modalities) if isinstance(getattr(config, "fusion", None), LateConfig) else 1
    return 2 * experts * config.width * (words * spec.vocab_size + shape.answers * rows)


def _media(config: ModelConfig | RecurrentConfig, spec: FeatureSpec, shape: Shape) -> tuple[int, int]:
    """Of the maps that read features, and of those behind them in a stem. A picture is convolved as a whole, also where
    patches at its edges are left out."""
    D, first, rest = config.width, 0, 0
    stems = (config.image_stem, config.audio_stem) if isinstance(config, ModelConfig) else ("linear", "linear")
    if encoder := spec.encoder("image"):
        first += 2 * shape.patches * encoder.dim * D
    elif image := getattr(config, "image_encoder", None):
        rest += 2 * shape.patches * width_of(image.settings) * D
    elif spec.image and stems[0] == "linear":
        first += 2 * shape.patches * spec.image.patch_dim * D
    elif spec.image and stems[0] == "hog":  # histograms are no products of matrices: `hog.moved_bytes`
        first += 2 * shape.patches * features_of(spec.image) * D
    elif spec.image:
        pictures = -(-shape.patches // spec.image.tokens)
        reading, behind = convolution_flops(spec.image, D)
        first, rest = first + pictures * reading, rest + pictures * behind
    if encoder := spec.encoder("audio"):
        first += 2 * shape.mels * encoder.dim * D
    elif audio := getattr(config, "audio_encoder", None):
        rest += 2 * shape.mels * width_of(audio.settings) * D
    elif spec.audio and stems[1] == "linear":
        first += 2 * shape.mels * spec.audio.token_dim * D
    elif spec.audio:
        frames = shape.mels * spec.audio.frames_per_token
        first += 6 * frames * spec.audio.n_mels * D
        rest += 6 * (frames // 2) * D * D + (frames * D * D if spec.audio.frames_per_token > 2 else 0)
    return first, rest
