"""transformers 5.23.0: `generate` of LlamaForCausalLM with `sdpa` attention in bf16, greedy, with its cache (`cache`: the
dynamic one, its default, or `static`); no answer ends before its limit. One lap for each size of the batch (`batch 8`), in
which the prompts are read, too."""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from pathlib import Path
from typing import Any

from clock import Watch, batches, contest, wait
from hf_passes import build


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import torch

    warm = out.name == "warm"
    ((rows,), vocabulary), limit = batches(source, options, 1), 8 if warm else options["new"]
    model = build(options, vocabulary).eval()
    model.generation_config.eos_token_id = None
    made = {}
    more = {"cache_implementation": options["cache"]} if options.get("cache") else {}
    for size in options["sizes"]:
        with watch.lap(f"batch {size}"), torch.inference_mode():
            given = torch.tensor(rows[:size]).to(options["device"])
            found = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=limit, do_sample=False, use_cache=True,
                **more,
            )  # fmt: skip
            made[f"batch {size}"] = found[:, given.shape[1] :].numel()
            wait(options["device"])
    return {**made, "parameters": sum(p.numel() for p in model.parameters())}


if __name__ == "__main__":
    contest(work)
