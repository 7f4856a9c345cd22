"""What the discriminator of adversarial fusion pays: its cross-entropy for each modality of each record, text among them, of
what the layout reads.

The blocks before it get its gradient turned round (mmlm/model/adversary.py).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mmlm.data.collate import Batch
from mmlm.features.spec import FeatureSpec
from mmlm.model.adversary import modality_pairs
from mmlm.model.config import ModelConfig
from mmlm.model.fusion_config import AdversarialConfig
from mmlm.model.layouts import read_by
from mmlm.model.streams import part_of, records_of
from mmlm.model.transformer import Output
from mmlm.train.terms.term import Term


class Modality:
    name = "modality"

    def __init__(self, weight: float, layout: str, spec: FeatureSpec) -> None:
        self.weight, self.layout, self.modalities = weight, layout, spec.modalities

    @classmethod
    def of(cls, model: ModelConfig, spec: FeatureSpec) -> Modality | None:
        """None where there is no discriminator."""
        return cls(model.fusion.weight, model.layout, spec) if isinstance(model.fusion, AdversarialConfig) else None

    def count(self, batch: Batch) -> float:
        part = part_of(batch, read_by(self.layout, batch))
        return float(len(torch.unique(modality_pairs(part, self.modalities, records_of(part)))))

    def term(self, output: Output, batch: Batch) -> Term:
        assert output.modality is not None
        logits, kind_Z = output.modality
        return Term(F.cross_entropy(logits.float(), kind_Z, reduction="sum"), self.weight)
