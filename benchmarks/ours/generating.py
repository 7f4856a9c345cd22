"""Greedy generation with the fused Transformer's cache in bf16; no answer ends before its limit. One lap for each size of the
batch (`batch 8`), in which the prompts are read, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ours.passes import build
from benchmarks.peers.clock import Watch, batches, contest, wait
from mmlm.data.collate import collate
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, EOS
from mmlm.model.generation import generate
from mmlm.model.transformer import count_parameters


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    warm = out.name == "warm"
    ((rows,), vocabulary), limit = batches(source, options, 1), 8 if warm else options["new"]
    net, spec = build(options, vocabulary)
    net.eval()
    net.answer.weight.data[EOS] = 0
    made = {}
    for size in options["sizes"]:
        samples = [Sample("", "text", np.array([*ids[:-1], ANSWER], np.int32), len(ids) - 1) for ids in rows[:size]]
        with watch.lap(f"batch {size}"):
            batch = collate(samples, spec, pad_left=True, with_answer=False).to(net.tokens.weight.device)
            made[f"batch {size}"] = sum(len(ids) for ids in generate(net, batch, limit).ids)
            wait(options["device"])
    return {**made, "parameters": count_parameters(net)}


if __name__ == "__main__":
    contest(work)
