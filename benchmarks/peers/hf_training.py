"""transformers 5.23.0 + accelerate 1.15.0: LlamaForCausalLM with `sdpa` attention, batches of similar length padded to
their longest, bf16 by accelerate, AdamW, clipping; the training loop of accelerate's documentation.

With `deepspeed`, accelerate's DeepSpeedPlugin at ZeRO 2; on a CPU two of its just-in-time builds are avoided, as ours does.
With `weights` bf16 the model itself is bf16 and has no float32 copy, which is faster and trains worse.
"""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

from clock import Watch, contest


def documents(source: Path) -> tuple[list[dict[str, Any]], int]:
    """Token ids and length of each text, and the size of the vocabulary."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    with (source / "docs.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    rows = [[0, *encoded.ids, 0] for encoded in tokenizer.encode_batch(texts)]
    return [{"input_ids": row, "length": len(row)} for row in rows], tokenizer.get_vocab_size()


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Padded to the longest; the loss ignores padding."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(row["input_ids"]) for row in rows]
    tokens = pad_sequence(ids, batch_first=True)
    mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def accelerator(options: dict[str, Any]) -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin

    if not options.get("deepspeed"):
        precision = "no" if options.get("weights") == "bf16" else "bf16"
        return Accelerator(mixed_precision=precision, cpu=options["device"] == "cpu")
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", str(20_000 + os.getpid() % 10_000))
    if options["device"] == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plugin = DeepSpeedPlugin(zero_stage=2, gradient_clipping=1.0, gradient_accumulation_steps=1)
    return Accelerator(mixed_precision="bf16", deepspeed_plugin=plugin, cpu=options["device"] == "cpu")


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import torch
    from torch.utils.data import DataLoader
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(options["threads"])
    warm, steps = (1, 1) if out.name == "warm" else (options["warm"], options["steps"])
    rows: Any
    (rows, vocabulary), shape = documents(source), options["model"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=shape["width"], intermediate_size=shape["mlp_width"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], max_position_embeddings=1 << 14,
        tie_word_embeddings=False, use_cache=False, pad_token_id=None, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    if options.get("weights") == "bf16":
        model = model.bfloat16()
    parameters = sum(p.numel() for p in model.parameters())
    runner = accelerator(options)
    # as LengthGroupedSampler has the texts of a mega-batch, which of so few would be a single batch
    sampler = sorted(range(len(rows)), key=lambda n: -rows[n]["length"])
    loader: Any = DataLoader(rows, batch_size=options["batch"], sampler=sampler, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    model, optimizer, loader = runner.prepare(model, optimizer, loader)
    model.train()
    batches = itertools.chain.from_iterable(loader for _ in itertools.count())
    losses, tokens, padded = [], 0, 0

    def step(batch: dict[str, Any]) -> None:
        loss = model(**batch).loss
        runner.backward(loss)
        if not options.get("deepspeed"):  # which clips by itself
            runner.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))

    for _ in range(warm):
        step(next(batches))
    with watch.lap("work"):
        for _ in range(steps):
            batch = next(batches)
            tokens += int((batch["labels"][:, 1:] != -100).sum())
            padded += batch["labels"][:, 1:].numel()
            step(batch)
    return {"items": tokens, "parameters": parameters, "losses": losses, "padding": 1 - tokens / padded}


if __name__ == "__main__":
    contest(work)
