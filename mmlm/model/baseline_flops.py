"""FLOPs of the small models, counted as those of the Transformer are (mmlm/model/flops.py), and what training keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmlm.features.spec import FeatureSpec
from mmlm.model.baseline_config import CnnConfig, RecurrentConfig

if TYPE_CHECKING:
    from mmlm.model.flops import Shape

GATES = {"lstm": 4, "gru": 3}


def recurrent_blocks(config: RecurrentConfig, shape: Shape) -> int:
    """Of the layers alone: each gate reads the input and the state."""
    D = config.width
    return config.layers * 2 * GATES[config.kind] * 2 * D * D * shape.tokens


def cnn_forward(config: CnnConfig, spec: FeatureSpec, shape: Shape) -> tuple[int, int]:
    """(all of a forward pass, of it the first convolutions, whose inputs need no gradient).

    Sounds are counted as one long one; ends of odd lengths add less than one row of a stage each.
    """
    from mmlm.model.convolutional import BINS, GRID

    D, last, times = config.width, config.channels[-1], len(config.channels)
    whole = first = 0
    if spec.image and shape.patches:
        pictures = -(-shape.patches // spec.image.tokens)
        one, its_first = _stages(config, spec.image.channels, spec.image.size, spec.image.size)
        side = min(GRID, _halved(spec.image.size, times))
        whole += pictures * (one + 2 * last * side * side * D)
        first += pictures * its_first
    if spec.audio and shape.mels:
        frames, sounds = shape.mels * spec.audio.frames_per_token, _sounds(spec, shape)
        one, its_first = _stages(config, 1, frames, spec.audio.n_mels)
        whole += one + sounds * 2 * last * min(BINS, _halved(spec.audio.n_mels, times)) * D
        first += its_first
    records = len(shape.lengths)
    heads = shape.answers * 2 * D * (spec.head_rows + (config.embedding or 0))
    return whole + records * 8 * D * D + heads, first


def _sounds(spec: FeatureSpec, shape: Shape) -> int:
    """At least so many: one for each full length."""
    assert spec.audio is not None
    longest = -(-spec.audio.max_frames // spec.audio.frames_per_token)
    return max(1, min(len(shape.lengths), -(-shape.mels // max(longest, 1))))


def _stages(config: CnnConfig, before: int, rows: int, columns: int) -> tuple[int, int]:
    whole = first = 0
    for after in config.channels:
        one = 2 * 9 * before * after * rows * columns
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
        whole += one + 2 * 9 * after * after * rows * columns
        first = first or one
        before = after
    return whole, first


def _halved(size: int, times: int) -> int:
    for _ in range(times):
        size = (size + 1) // 2
    return size


def kept_values(config: CnnConfig | RecurrentConfig, spec: FeatureSpec, shape: Shape) -> int:
    """Numbers that autograd keeps between the forward and the backward pass, heads left out."""
    if isinstance(config, RecurrentConfig):
        # the residual stream, its norm, gates and states of PyTorch's kernel, what is put back in order
        return config.layers * shape.tokens * config.width * (GATES[config.kind] + 6)
    values = 0
    for there, before, rows, columns in (
        (spec.image, spec.image.channels if spec.image else 0, *_picture_rows(spec, shape)),
        (spec.audio, 1, *_sound_rows(spec, shape)),
    ):
        if there is None:
            continue
        values += before * rows * columns
        for after in config.channels:
            values += 5 * after * rows * columns  # convolution, norm in and out, GELU, the mask of sounds
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
            values += 5 * after * rows * columns
    return values + 8 * config.width * len(shape.lengths)


def _picture_rows(spec: FeatureSpec, shape: Shape) -> tuple[int, int]:
    return (-(-shape.patches // spec.image.tokens) * spec.image.size, spec.image.size) if spec.image else (0, 0)


def _sound_rows(spec: FeatureSpec, shape: Shape) -> tuple[int, int]:
    return (shape.mels * spec.audio.frames_per_token, spec.audio.n_mels) if spec.audio else (0, 0)
