"""From a manifest and a config to the FeatureSpec and the tokenizer of a shard set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

from mmlm.artifacts import Artifact
from mmlm.config import resolved
from mmlm.corpus.records import read_rows, target_of
from mmlm.errors import DataError
from mmlm.features.chat import find_template
from mmlm.features.config import FeaturesConfig
from mmlm.features.encode import answer_text
from mmlm.features.spec import FeatureSpec, FieldsSpec, TaskSpec
from mmlm.features.text import FILE, Tokenizer, given_tokenizer, text_bytes, train_tokenizer
from mmlm.shards.draw import drawn_for_training
from mmlm.shards.encoders import describe


def find_tokenizer(manifest: Artifact, config: FeaturesConfig, out: Path, earlier: Artifact | None = None) -> Tokenizer:
    """The tokenizer that an earlier, killed run left in `out`, the one that is given, or that of the shard set
    `earlier` if it was trained with the same settings; else a newly trained one.
    """
    if (out / FILE).exists():
        return Tokenizer.load(out)
    if config.tokenizer.file:
        return given_tokenizer(config.tokenizer.file)
    if earlier and config.tokenizer.keep:
        before = earlier.config.get("features", {}).get("tokenizer")
        if before == resolved(config.tokenizer):
            return Tokenizer.load(earlier.path)
    return train_tokenizer(training_texts(manifest.path, config.tokenizer.max_bytes), config.tokenizer)


_SPOKEN = [
    "id", "split", "label", "labels", "number", "answer", "parts.list.element.kind", "parts.list.element.text",
]  # fmt: skip


def training_texts(manifest: Path, most: int) -> Iterator[str]:
    """Questions, context and answers of the training split, in order of id; of more than `most` bytes, those of records
    that are drawn evenly over the split."""
    keep = drawn_for_training(manifest, most)
    if keep and _at_most(_texts(manifest), most):
        keep = None
    return _texts(manifest, keep)


def _texts(manifest: Path, keep: Callable[[str], bool] | None = None) -> Iterator[str]:
    for row in read_rows(manifest, columns=_SPOKEN, keep=keep):
        if (row["split"] or "train") != "train":
            continue
        yield from (part["text"] for part in row["parts"] if part["kind"] == "text" and part["text"])
        if answer := answer_text(target_of(row)):
            yield answer


def _at_most(texts: Iterator[str], most: int) -> bool:
    """Whether `texts` have no more than `most` bytes; read up to there."""
    return not any(total > most for total in accumulate(map(text_bytes, texts)))


def make_spec(manifest: Artifact, config: FeaturesConfig, tokenizer: Tokenizer) -> FeatureSpec:
    """What the shards will hold: the config's sizes for the modalities that the manifest has, and its tasks."""
    tasks, kinds = _read_tasks(manifest)
    if not tasks:
        raise DataError(f"{manifest.path} has no record", cure="look into refused.parquet, then scan again")
    spec = FeatureSpec(
        vocab_size=tokenizer.vocab_size,
        tokenizer_digest=tokenizer.digest,
        max_len=config.max_len,
        image=config.image if "image" in kinds else None,
        audio=config.audio if "audio" in kinds else None,
        video=config.video if "video" in kinds else None,
        chat_template=find_template(config),
        fields=_read_fields(manifest) if config.fields and "fields" in kinds else None,
        tasks=tasks,
    )
    return spec.model_copy(update={"encoders": describe(config, spec)}) if config.encoders else spec


def _read_tasks(manifest: Artifact) -> tuple[list[TaskSpec], set[str]]:
    """The manifest's tasks, sorted by name, and the kinds of media and fields that its records have."""
    known = set(TaskSpec.model_fields)
    given = manifest.extra.get("tasks") or {}
    rows = given if isinstance(given, list) else [{"name": name, **value} for name, value in given.items()]
    tasks = [TaskSpec(**{key: value for key, value in row.items() if key in known}) for row in rows]
    return sorted(tasks, key=lambda task: task.name), _kinds(manifest)


def _kinds(manifest: Artifact) -> set[str]:
    """`image`, `audio`, `video`, `fields`: what the records have, by the manifest's own counts where it has them."""
    if counted := manifest.counts.get("modalities"):
        kinds = set(counted)
    else:
        rows = read_rows(manifest.path, columns=["parts.list.element.kind"])
        kinds = {part["kind"] for row in rows for part in row["parts"]}
    return kinds | ({"image", "audio"} if "video" in kinds else set())


def _read_fields(manifest: Artifact) -> FieldsSpec | None:
    given = manifest.extra.get("fields") or {}
    numbers = {name: (float(mean), float(deviation)) for name, (mean, deviation) in given.get("numbers", {}).items()}
    found = FieldsSpec(numbers=numbers, categories=given.get("categories", {}))
    return found if found.names else None
