"""Greedy generation with the fused Transformer's cache in bf16; no answer ends before its limit. Lap `work` holds the prompt,
too."""

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
    (rows,), vocabulary = batches(source, options, 1)
    net, spec = build(options, vocabulary)
    net.eval()
    net.answer.weight.data[EOS] = 0
    samples = [Sample("", "text", np.array([*ids[:-1], ANSWER], np.int32), len(ids) - 1) for ids in rows]
    limit, made = 8 if out.name == "warm" else options["new"], 0
    with watch.lap("work"):
        for _ in range(1 if out.name == "warm" else options["times"]):
            batch = collate(samples, spec, pad_left=True, with_answer=False)
            made += sum(len(ids) for ids in generate(net, batch.to(net.tokens.weight.device), limit).ids)
        wait(options["device"])
    return {"items": made, "parameters": count_parameters(net)}


if __name__ == "__main__":
    contest(work)
