"""transformers 5.23.0: LlamaForCausalLM with `sdpa` attention in bf16, texts padded to the longest of their batch.

Equal lengths are given without a mask, which lets sdpa take its causal kernel.
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

    warm = out.name == "warm"
    rows, vocabulary = batches(source, options, 1 if warm else options["steps"])
    model = build(options, vocabulary)
    model.train()
    memory, losses = Memory(options["device"]), []
    with watch.lap("work"):
        for batch in rows:
            ids = [torch.tensor(row) for row in batch]
            given = {"input_ids": pad_sequence(ids, batch_first=True)}
            given["labels"] = given["input_ids"]
            if len({len(row) for row in batch}) > 1:
                mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
                given |= {"attention_mask": mask, "labels": given["input_ids"].masked_fill(mask == 0, -100)}
            model.zero_grad()
            loss = model(**{name: tensor.to(options["device"]) for name, tensor in given.items()}, use_cache=False).loss
            loss.backward()
            losses.append(round(loss.item(), 4))
        wait(options["device"])
    tokens = sum(len(row) - 1 for batch in rows for row in batch)
    parameters = sum(p.numel() for p in model.parameters())
    return {"items": tokens, "parameters": parameters, "losses": losses, "peak": memory.peak()}


if __name__ == "__main__":
    contest(work)
