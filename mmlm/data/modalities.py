"""Taking a modality away from a sample, as if the record had never had it."""

from __future__ import annotations

import dataclasses

import numpy as np

from mmlm.features.sample import Sample
from mmlm.features.spec import AUDIO, FIELDS, IMAGE, FeatureSpec

_SLOTS = {"image": IMAGE, "audio": AUDIO, "fields": FIELDS}


def keep_modalities(sample: Sample, kept: frozenset[str] | set[str]) -> Sample:
    """`sample` with only the modalities in `kept` (image, audio, fields, context); the question always stays."""
    away = set(sample.modalities) - set(kept)
    if not away:
        return sample
    stays = np.ones(len(sample.tokens), bool)
    for name in away & _SLOTS.keys():
        stays[: sample.answer_at] &= sample.tokens[: sample.answer_at] != _SLOTS[name]
    spans = sample.context_spans
    if "context" in away:
        for first, last in spans:
            stays[first:last] = False
        spans = []
    moved = np.cumsum(stays) - 1
    return dataclasses.replace(
        sample,
        tokens=sample.tokens[stays],
        answer_at=int(moved[sample.answer_at]),
        context_spans=[(int(moved[first]), int(moved[last - 1]) + 1) for first, last in spans],
        images=[] if "image" in away else sample.images,
        borders=[] if "image" in away else sample.borders,
        sounds=[] if "audio" in away else sample.sounds,
        fields={} if "fields" in away else sample.fields,
        features={kind: some for kind, some in sample.features.items() if kind not in away},
    )


def alone(sample: Sample, kept: frozenset[str] | set[str]) -> Sample:
    """`<bos>`, the modalities in `kept`, `<answer>`: what an embedding is made of, as `views` makes it in training. The
    question is left out, too, so that what is alike does not depend on how one asks."""
    left = keep_modalities(sample, kept)
    own = np.isin(left.tokens, [_SLOTS[name] for name in kept & _SLOTS.keys()])
    for first, last in left.context_spans:
        own[first:last] = True
    own[left.answer_at :] = False
    own[[0, left.answer_at]] = True
    moved = np.cumsum(own) - 1
    return dataclasses.replace(
        left,
        tokens=left.tokens[own],
        answer_at=int(moved[left.answer_at]),
        context_spans=[(int(moved[first]), int(moved[last - 1]) + 1) for first, last in left.context_spans],
    )


def drop_modalities(sample: Sample, rate: float, rng: np.random.Generator) -> Sample:
    """With probability `rate`, keep a random non-empty part of what is given, each such part equally likely.

    A sample with fewer than two modalities is left alone (modality dropout; Neverova et al. 2015, ModDrop).
    """
    given = sample.modalities
    if len(given) < 2 or rng.random() >= rate:
        return sample
    choice = int(rng.integers(1, 2 ** len(given) - 1))
    return keep_modalities(sample, {name for bit, name in enumerate(given) if choice >> bit & 1})


def expected_loss(sample: Sample, rate: float, spec: FeatureSpec) -> float:
    """Positions that `drop_modalities` takes away from `sample`, on average.

    Of the parts that may be kept, half hold any one modality: so each goes with a probability of `rate` / 2.
    """
    from mmlm.features.encode import opened_length  # here, since it brings the decoders of all media

    if len(sample.modalities) < 2 or not rate:
        return 0.0
    return rate / 2 * (opened_length(sample, spec) - opened_length(keep_modalities(sample, set()), spec))
