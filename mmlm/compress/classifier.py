"""A text classifier of transformers as teacher: it reads the words of the shards' questions by its own tokenizer.

Axes: R record, C class of the task that is taught.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmlm.data.collate import IGNORE, Batch
from mmlm.errors import ConfigError
from mmlm.features.spec import SPECIAL_TOKENS, FeatureSpec
from mmlm.features.text import Tokenizer
from mmlm.model.baseline_config import AnyModelConfig
from mmlm.model.flops import Shape
from mmlm.model.transformer import Output
from mmlm.train.config import LossConfig
from mmlm.train.objectives import Answering
from mmlm.train.terms.one_label import softened_kl
from mmlm.train.terms.term import Term


class SequenceClassifier:
    """A folder with a `…ForSequenceClassification` whose classes are those of one task. Called with a batch it gives the
    logits (R, C) of all its records, classes in the order of the task's. Raises ConfigError when the folder is none."""

    def __init__(self, folder: Path, spec: FeatureSpec, tokenizer: Tokenizer) -> None:
        labels = self._labels(folder)
        self.task = next((n for n, task in enumerate(spec.tasks) if sorted(task.labels) == sorted(labels)), -1)
        if self.task < 0:
            known = "; ".join(f"{task.name}: {', '.join(task.labels[:8])}" for task in spec.tasks if task.labels)
            raise ConfigError(
                f"the classifier in {folder} tells {', '.join(sorted(labels)[:8])} apart",
                wanted=f"the classes of a task: {known}", cure="use another teacher, or name the classes alike",
            )  # fmt: skip
        self.classes = [labels.index(label) for label in spec.tasks[self.task].labels]
        self.rows = spec.label_offsets()[spec.tasks[self.task].name]
        self.tokenizer = tokenizer
        self.model, self.reader = self._load(folder)

    def to(self, device: torch.device) -> SequenceClassifier:
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, batch: Batch) -> torch.Tensor:
        asked = self.reader(self.texts(batch), padding=True, truncation=True, return_tensors="pt")
        logits_RC: torch.Tensor = self.model(**asked.to(self.model.device)).logits[:, self.classes]
        return logits_RC.float()

    def texts(self, batch: Batch) -> list[str]:
        """The words of each record's question, without marks and media."""
        tokens, segments, prompts = (x.cpu() for x in (batch.tokens_BT, batch.segment_BT, batch.prompt_BT))
        T, found = tokens.shape[1], []
        for at in batch.answer_at_R.tolist():
            row, place = divmod(at, T)
            own = (segments[row] == segments[row, place]) & prompts[row] & (tokens[row] >= len(SPECIAL_TOKENS))
            found.append(self.tokenizer.decode(tokens[row][own].tolist()))
        return found

    @staticmethod
    def _labels(folder: Path) -> list[str]:
        try:
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder / 'config.json'} cannot be read ({error})", wanted="a sequence classifier of transformers"
            ) from None
        kind = str((settings.get("architectures") or [""])[0])
        if not kind.endswith("ForSequenceClassification"):
            raise ConfigError(
                f"{folder} holds no sequence classifier ({kind or 'no architecture'})",
                wanted="…ForSequenceClassification", cure="fine-tune it with transformers, or here (train.model.pretrained)",
            )  # fmt: skip
        names = settings.get("id2label") or {}
        return [str(names[key]) for key in sorted(names, key=int)]

    @staticmethod
    def _load(folder: Path) -> tuple[Any, Any]:
        try:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
        except ImportError:
            raise ConfigError(
                "a teacher of transformers needs transformers, which is not installed",
                cure="pip install 'mmlm-workflows[pretrained]'",
            ) from None
        where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, **where
            )
            return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder, **where)
        except Exception as error:  # whatever a strange folder makes transformers raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"the classifier in {folder} cannot be used ({first[:200]})") from None


class Following:
    """The task's own terms, and KL(teacher ‖ student) at a temperature on the class head of the records that the teacher
    knows the classes of (Hinton, Vinyals & Dean 2015, section 2)."""

    def __init__(
        self, config: LossConfig, spec: FeatureSpec, teacher: SequenceClassifier, temperature: float, task: float,
        model: AnyModelConfig | None = None,
    ) -> None:  # fmt: skip
        """`model`: the student. Embeddings are not distilled."""
        self.answering = Answering(config.model_copy(update={"contrastive": None}), spec, model)
        self.teacher, self.temperature, self.task = teacher, temperature, task
        self.names: tuple[str, ...] = (*self.answering.names, "label_kl")

    def counts(self, batch: Batch) -> dict[str, float]:
        return {**self.answering.counts(batch), "label_kl": float(self._taught(batch).sum())}

    def shape(self, batch: Batch) -> Shape:
        return self.answering.shape(batch)

    def prepare(self, model: torch.nn.Module, batches: list[Batch], device: torch.device) -> None:
        self.answering.prepare(model, batches, device)

    def alone(self) -> Following:
        return self

    def __call__(self, model: torch.nn.Module, batch: Batch) -> dict[str, Term]:
        output: Output = model(batch, z_loss=self.answering.z_share)
        terms = self.answering.terms(output, batch, self.task)
        taught_R, (first, last) = self._taught(batch), self.teacher.rows
        teacher_RC = self.teacher(batch).to(output.label_RC.device)
        kl = softened_kl(output.label_RC.float()[taught_R, first:last], teacher_RC[taught_R], self.temperature)
        terms["label_kl"] = Term(kl, self.answering.config.label)
        return terms

    def _taught(self, batch: Batch) -> torch.Tensor:
        return (batch.task_R == self.teacher.task) & (batch.label_R != IGNORE)
