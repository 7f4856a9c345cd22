"""What the discriminator of adversarial fusion pays: its cross-entropy for each modality of each record, text among them.

The blocks before it get its gradient turned round (mmlm/model/adversary.py).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mmlm.data.collate import Batch
from mmlm.features.spec import FeatureSpec
from mmlm.model.adversary import modality_pairs
from mmlm.model.fusion_config import AdversarialConfig
from mmlm.model.streams import records_of
from mmlm.model.transformer import Output
from mmlm.train.terms.term import Term


class Modality:
    name = "modality"

    def __init__(self, config: AdversarialConfig, spec: FeatureSpec) -> None:
        self.weight, self.modalities = config.weight, spec.modalities

    def count(self, batch: Batch) -> float:
        return float(len(torch.unique(modality_pairs(batch, self.modalities, records_of(batch)))))

    def term(self, output: Output, batch: Batch) -> Term:
        assert output.modality is not None
        logits, kind_Z = output.modality
        return Term(F.cross_entropy(logits.float(), kind_Z, reduction="sum"), self.weight)
