"""Sample: one record as arrays. What shards store, what batches are made of, what a question to a model becomes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Sample:
    """`tokens` is `<bos> prompt… <answer> answer… <eos>` with one slot token (IMAGE, AUDIO, FIELDS) per media part.

    A slot is opened to its real number of positions when batches are made. A question without a known answer ends
    with `<answer>`.
    """

    id: str
    task: str
    tokens: np.ndarray
    """(T,) int32."""
    answer_at: int
    """Index of the `<answer>` token in `tokens`; the classification head reads there."""
    images: list[np.ndarray] = field(default_factory=list)
    """Each (H, W, C) uint8, in order of their slots."""
    sounds: list[np.ndarray] = field(default_factory=list)
    """Each (frames, mels) float16 log-mel, in order of their slots."""
    fields: dict[str, float | str | None] = field(default_factory=dict)
    context_spans: list[tuple[int, int]] = field(default_factory=list)
    """Half-open ranges of `tokens` that hold context text (with its mark); may be taken away."""
    lang: str = ""
    split: str = ""
    group: str = ""
    source: str = ""
    """Where the record comes from, as the corpus said: a file, a folder, or a name."""
    label: str | None = None
    labels: list[str] | None = None
    number: float | None = None
    answer: str | None = None
    """The text to be answered: the record's own, else its label."""
    borders: list[tuple[int, int]] = field(default_factory=list)
    """With `padding: drop`, of each picture the rows and the columns of patches at either end that become no tokens."""
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """`image`, `audio` → what a pretrained encoder made of each picture or sound: (tokens, dim) float16."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Sorted names of what is given beside the question: audio, context, fields, image."""
        given = {"image": self.images, "audio": self.sounds, "fields": self.fields, "context": self.context_spans}
        return tuple(sorted(name for name, value in given.items() if value))
