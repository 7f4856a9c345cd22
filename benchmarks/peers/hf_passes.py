"""transformers 5.23.0: LlamaForCausalLM with `sdpa` attention in bf16, texts padded to the longest of their batch.

Equal lengths are given without a mask, which lets sdpa take its causal kernel. A lap for texts of one length (`even`) and one
for texts as they are (`uneven`), each a number of passes.
"""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from pathlib import Path
from typing import Any

from clock import Memory, Watch, batches, contest, wait


def build(options: dict[str, Any], vocabulary: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(options["threads"])
    shape = options["model"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=shape["width"], intermediate_size=shape["mlp_width"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], max_position_embeddings=1 << 14,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).bfloat16().to(options["device"])


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    told: dict[str, Any] = {}
    for lap, length in (("uneven", None), ("even", options["length"])):
        rows, vocabulary = batches(source, {**options, "length": length}, 1 if out.name == "warm" else options["steps"])
        model = build(options, vocabulary)
        model.train()
        memory, losses = Memory(options["device"]), []
        with watch.lap(lap):
            for batch in rows:
                ids = [torch.tensor(row) for row in batch]
                given = {"input_ids": pad_sequence(ids, batch_first=True)}
                given["labels"] = given["input_ids"]
                if not length:
                    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
                    given |= {"attention_mask": mask, "labels": given["input_ids"].masked_fill(mask == 0, -100)}
                model.zero_grad()
                given = {name: tensor.to(options["device"]) for name, tensor in given.items()}
                loss = model(**given, use_cache=False).loss
                loss.backward()
                losses.append(round(loss.item(), 4))
            wait(options["device"])
        told[lap] = sum(len(row) - 1 for batch in rows for row in batch)
        parameters = sum(p.numel() for p in model.parameters())
        told |= {f"{lap} peak": memory.peak(), f"{lap} losses": losses, "parameters": parameters}
    return told


if __name__ == "__main__":
    contest(work)
