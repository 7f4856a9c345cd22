"""Forward and backward passes of the fused Transformer in bf16 over texts, each token of which is predicted.

Padding is dropped at the door, so texts of any length go in as they are. A lap for texts of one length (`even`) and one for
texts as they are (`uneven`), each a number of passes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.clock import Memory, Watch, batches, contest, wait
from mmlm.data.collate import collate
from mmlm.features.sample import Sample
from mmlm.features.spec import FeatureSpec, TaskSpec
from mmlm.model.config import ModelConfig
from mmlm.model.transformer import FusedTransformer, count_parameters


def build(options: dict[str, Any], vocabulary: int) -> tuple[FusedTransformer, FeatureSpec]:
    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    spec = FeatureSpec(vocab_size=vocabulary, tokenizer_digest="", max_len=1 << 14, tasks=[TaskSpec(name="text")])
    return FusedTransformer(ModelConfig(**options["model"]), spec).bfloat16().to(options["device"]), spec


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for lap, length in (("uneven", None), ("even", options["length"])):
        rows, vocabulary = batches(source, {**options, "length": length}, 1 if out.name == "warm" else options["steps"])
        net, spec = build(options, vocabulary)
        memory = Memory(options["device"])
        pieces = [[Sample("", "text", np.array(ids, np.int32), -1) for ids in batch] for batch in rows]
        losses = []
        with watch.lap(lap):
            for batch in pieces:
                inputs = collate(batch, spec).to(torch.device(options["device"]))
                net.zero_grad()
                answer = net(inputs, z_loss=0.0).answer
                (answer.sum / len(answer.each_A)).backward()
                losses.append(round(answer.each_A.mean().item(), 4))
            wait(options["device"])
        told[lap] = sum(len(ids) - 1 for batch in rows for ids in batch)
        told |= {f"{lap} peak": memory.peak(), f"{lap} losses": losses, "parameters": count_parameters(net)}
    return told


if __name__ == "__main__":
    contest(work)
