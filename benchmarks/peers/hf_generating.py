"""transformers 5.23.0: `generate` of LlamaForCausalLM with `sdpa` attention in bf16, greedy, with its cache (`cache`: the
dynamic one, its default, or `static`); no answer ends before its limit. Lap `work` holds the prompt, too."""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from pathlib import Path
from typing import Any

from clock import Watch, batches, contest, wait
from hf_passes import build


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import torch

    (rows,), vocabulary = batches(source, options, 1)
    model = build(options, vocabulary).eval()
    model.generation_config.eos_token_id = None
    given = torch.tensor(rows).to(options["device"])
    limit, made = 8 if out.name == "warm" else options["new"], 0
    more = {"cache_implementation": options["cache"]} if options.get("cache") else {}
    with watch.lap("work"), torch.inference_mode():
        for _ in range(1 if out.name == "warm" else options["times"]):
            found = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=limit, do_sample=False, use_cache=True,
                **more,
            )  # fmt: skip
            made += found[:, given.shape[1] :].numel()
        wait(options["device"])
    return {"items": made, "parameters": sum(p.numel() for p in model.parameters())}


if __name__ == "__main__":
    contest(work)
