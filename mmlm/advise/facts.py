"""What is known before anything is trained: of the data, from a manifest or a shard set, and of this machine."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm import artifacts, doctor
from mmlm import story as stories
from mmlm.artifacts import Artifact
from mmlm.corpus.records import read_rows
from mmlm.errors import ArtifactError, ConfigError
from mmlm.features import spec as feature_spec
from mmlm.features.borders import picture_positions
from mmlm.features.spec import AudioSpec, FeatureSpec, FieldsSpec, ImageSpec, TaskSpec

if TYPE_CHECKING:
    from mmlm.data.reader import ShardReader

LOOKED_AT = 2000
"""Records whose texts are measured."""
COUNTED = 20_000
"""Different pictures that are told apart at most."""
BYTES_A_TOKEN = 3.0
"""Of text, where no tokenizer is there yet; English, German and Chinese prose lie between 2.4 and 4.2 with vocabularies of
1,000 to 16,000 that were trained on it."""


@dataclass(frozen=True)
class Facts:
    """Of the data."""

    name: str
    """Of the story or folder."""
    spec: FeatureSpec
    """Of the shards; with a manifest alone, what the defaults of `shard` would make of it."""
    shards: Path | None
    train: int
    """Records to learn from."""
    test: int
    val: int
    tokens: float
    """Of text in the training split, all together."""
    answers: float
    """Of them in answers that are texts."""
    pictures: int
    """Different ones to learn from, about: several records may show the same; COUNTED stands for that many or more."""
    media_tokens: float
    """Patches and mel tokens, or what encoders make in their place, of all pictures and sounds of the training split."""

    @property
    def texts(self) -> bool:
        """Whether some task is answered by a text that has to be written."""
        return any(task.has_text or not (task.labels or task.number) for task in self.spec.tasks)

    @property
    def classes(self) -> int:
        return max((len(task.labels) for task in self.spec.tasks), default=0)

    @property
    def media(self) -> tuple[str, ...]:
        return tuple(name for name in ("image", "audio") if getattr(self.spec, name))


@dataclass(frozen=True)
class Machine:
    cores: int
    memory: float
    """Bytes."""
    gpus: list[str] = field(default_factory=list)
    bf16: bool = True
    """Whether products in bf16 are faster here than in float32."""


def machine() -> Machine:
    """This one."""
    found = doctor.examine()
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        flags = ""
    bf16 = bool(found["gpus"]) or any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    if any(name in gpu for gpu in found["gpus"] for name in ("V100", "T4", "P100")):
        bf16 = False
    return Machine(found["cores"], float(found["memory_bytes"]), found["gpus"], bf16)


def look(given: str, out: Path | None = None) -> Facts:
    """The facts of a manifest, a shard set, the output folder of a run, or a story that was scanned.

    Raises ArtifactError or ConfigError saying what is missing.
    """
    path = Path(given)
    if (path / artifacts.NAME).is_file():
        found = artifacts.read(path)
        if found.kind == "manifest":
            return of_manifest(path.resolve().parent.name, found)
        if found.kind == "shards":
            beside = path.resolve().parent / stories.NOUNS["scan"]
            return of_shards(path.resolve().parent.name, path, _manifest(beside))
        raise ArtifactError(f"{path} is a {found.kind}", wanted="a manifest or a shard set")
    nouns = path if path.is_dir() and not (path / "story.yaml").is_file() else None
    folder = nouns or out or Path("runs") / stories.load(given, []).name
    shards, manifest = folder / stories.NOUNS["shard"], _manifest(folder / stories.NOUNS["scan"])
    if (shards / artifacts.NAME).is_file():
        return of_shards(folder.resolve().name, shards, manifest)
    if manifest is None:
        raise ConfigError(
            f"nothing is known of {given}: {folder} holds neither a manifest nor a shard set",
            cure=f"`mmlm scan {given}` first; it costs seconds",
        )
    return of_manifest(folder.resolve().name, manifest)


def _manifest(folder: Path) -> Artifact | None:
    return artifacts.read(folder, "manifest") if (folder / artifacts.NAME).is_file() else None


def of_manifest(name: str, manifest: Artifact) -> Facts:
    """Facts of what was scanned; sizes of features are guessed as `shard` would choose them by default."""
    counts, extra = manifest.counts, manifest.extra
    known = set(TaskSpec.model_fields)
    tasks = [TaskSpec(**{k: v for k, v in row.items() if k in known}) for row in extra.get("tasks") or []]
    kinds = set(counts.get("modalities") or {})
    kinds |= {"image", "audio"} if "video" in kinds else set()
    media = extra.get("media") or {}
    side = float((media.get("image_side") or {}).get("median") or 64)
    seconds = float((media.get("audio_seconds") or {}).get("p95") or 4)
    question, answer = text_bytes(manifest.path)
    fields = extra.get("fields") or {}
    numbers = {n: (float(a), float(b)) for n, (a, b) in (fields.get("numbers") or {}).items()}
    found = FieldsSpec(numbers=numbers, categories=fields.get("categories") or {})
    image = ImageSpec(size=32 if side <= 48 else 64 if side <= 512 else 224, patch=8, channels=3)
    audio = AudioSpec(max_seconds=min(30.0, max(0.5, round(seconds * 1.1, 1))))
    positions = int((question + answer) / BYTES_A_TOKEN) + 8
    positions += image.tokens if "image" in kinds else 0
    positions += -(-audio.max_frames // audio.frames_per_token) if "audio" in kinds else 0
    texts = (question + answer) * counts.get("train", 0)
    spec = FeatureSpec(
        vocab_size=512 if texts < 1e6 else 8192, tokenizer_digest="planned", max_len=-(-2 * positions // 32) * 32,
        image=image if "image" in kinds else None, audio=audio if "audio" in kinds else None,
        fields=found if found.names else None, tasks=sorted(tasks, key=lambda task: task.name),
    )  # fmt: skip
    train = int(counts.get("train", 0))
    return Facts(
        name, spec, None, train, int(counts.get("test", 0)), int(counts.get("val", 0)),
        train * (question + answer) / BYTES_A_TOKEN, train * answer / BYTES_A_TOKEN,
        _pictures(manifest) if spec.image else 0, train * _media_tokens(manifest, spec),
    )  # fmt: skip


def _pictures(manifest: Artifact) -> int:
    found: set[str] = set()
    columns = ["id", "split", *(f"parts.list.element.{name}" for name in ("kind", "uri", "sha256"))]
    for row in read_rows(manifest.path, columns=columns):
        if (row["split"] or "train") == "train":
            shown = (part for part in row["parts"] if part["kind"] in ("image", "video"))
            found |= {part["sha256"] or part["uri"] or f"{row['id']} {n}" for n, part in enumerate(shown)}
        if len(found) >= COUNTED:
            return COUNTED
    return len(found)


def _stored_pictures(train: ShardReader) -> int:
    """Of the same picture the same bytes are stored, so that none is decoded."""
    found: set[int] = set()
    for looked in range(min(len(train), 4 * COUNTED)):
        found |= {hash(data) for name, data in train.members(looked).items() if name.startswith("image")}
        if len(found) >= COUNTED:
            return COUNTED
    return round(len(found) * max(1.0, len(train) / (4 * COUNTED)))


def _media_tokens(manifest: Artifact, spec: FeatureSpec) -> float:
    """Of a record of this manifest, on average: pictures are one each, and sounds as long as half of them are."""
    records = manifest.counts.get("modalities") or {}
    each = {"image": spec.image_positions(1), "audio": 0}
    if spec.audio:
        median = ((manifest.extra.get("media") or {}).get("audio_seconds") or {}).get(
            "median"
        ) or spec.audio.max_seconds
        frames = min(spec.audio.max_frames, int(median * spec.audio.sample_rate) // spec.audio.hop)
        each["audio"] = spec.audio_positions([frames])
    each["video"] = sum(each.values())
    given = sum(records.get(kind, 0) * tokens for kind, tokens in each.items())
    return given / max(sum(int(manifest.counts.get(split, 0)) for split in ("train", "val", "test")), 1)


def of_shards(name: str, folder: Path, manifest: Artifact | None) -> Facts:
    """Facts of a shard set, whose samples are measured themselves."""
    from mmlm.data.reader import ShardReader

    spec = feature_spec.load(folder)
    readers = {split: ShardReader(folder, (split,), 1 << 25) for split in ("train", "val", "test")}
    train = readers["train"]
    step = max(1, len(train) // LOOKED_AT)
    whole, answers, media = [], [], []
    for n in range(0, len(train), step):
        sample = train[n]
        whole.append(len(sample.tokens))
        written = len(sample.tokens) - 1 - sample.answer_at
        answers.append(written if _written(spec, sample.task) else 0)
        media.append(picture_positions(sample, spec) + spec.audio_positions([len(x) for x in sample.sounds]))
    each = (len(train) * (statistics.mean(found) if found else 0.0) for found in (whole, answers, media))
    tokens, answered, shown = each
    return Facts(
        name, spec, folder, len(train), len(readers["test"]), len(readers["val"]), tokens, answered,
        _stored_pictures(train) if spec.image else 0, shown,
    )  # fmt: skip


def _written(spec: FeatureSpec, name: str) -> bool:
    task = next((t for t in spec.tasks if t.name == name), None)
    return task is None or task.has_text or not (task.labels or task.number)


def text_bytes(manifest: Path) -> tuple[float, float]:
    """Mean bytes of a record's texts, and of its written answer, over the first LOOKED_AT records."""
    questions, answers = [], []
    for row in islice(read_rows(manifest, columns=["text_bytes", "answer", "split"]), LOOKED_AT):
        if (row["split"] or "train") == "train":
            answers.append(len((row["answer"] or "").encode()))
            questions.append(row["text_bytes"] - answers[-1])
    if not questions:
        return 0.0, 0.0
    return statistics.mean(questions), statistics.mean(answers)


def as_json(facts: Facts, here: Machine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both as plain values."""
    data = {
        "name": facts.name, "shards": str(facts.shards) if facts.shards else None, "train": facts.train, "val": facts.val,
        "test": facts.test, "modalities": ["text", *facts.spec.modalities], "text_tokens": round(facts.tokens),
        "answer_tokens": round(facts.answers), "pictures": facts.pictures, "media_tokens": round(facts.media_tokens),
        "tasks": [
            {"name": t.name, "classes": len(t.labels), "number": bool(t.number), "text": t.has_text} for t in facts.spec.tasks
        ],
    }  # fmt: skip
    machine = {"cores": here.cores, "memory_bytes": here.memory, "gpus": here.gpus, "fast_bf16": here.bf16}
    return json.loads(json.dumps(data)), machine
