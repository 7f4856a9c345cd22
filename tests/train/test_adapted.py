"""Adapters trained under DeepSpeed on a random model of transformers, resumed, at rest, and asked for by request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.loader import Loader
from mmlm.errors import ArtifactError, ConfigError
from mmlm.features import spec as feature_spec
from mmlm.launch.local import ranks
from mmlm.model import adapters
from mmlm.publish.answering import Responder
from mmlm.publish.export import export
from mmlm.tracking import NullTracker
from mmlm.train import adapted, weights
from mmlm.train.config import TrainConfig
from mmlm.train.objectives import Answering, loss_of
from mmlm.train.schedule import learning_rate
from mmlm.train.train import train
from mmlm.world import World

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(keypad_shards: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with the shards' own tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    config = transformers.Qwen3Config(
        vocab_size=feature_spec.load(keypad_shards.path).vocab_size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.2,
        max_position_embeddings=128,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    shutil.copyfile(keypad_shards.path / "tokenizer.json", folder / "tokenizer.json")
    return folder


def settings(base: Path, **changes: Any) -> dict[str, Any]:
    return {
        "steps": 4, "save_every": 2, "keep": 3, "log_every": 1, "precision": "fp32", "data": {"batch": 16},
        "model": {"pretrained": {"folder": str(base)}},
        "lora": {"rank": 4, "targets": ["blocks"]},
        **changes,
    }  # fmt: skip


def run(shards: Artifact, out: Path, count: int, given: dict[str, Any]) -> Artifact:
    return train(parse(TrainConfig, given, "test"), shards, out=out, launch=ranks(count), tracker=NullTracker())


def losses(out: Path) -> list[float]:
    return [json.loads(line)["metrics"]["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def reference(shards: Artifact, base: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Plain PyTorch on the same adapters: losses, and what was trained."""
    from mmlm.train import pretrained

    given = parse(TrainConfig, settings(base), "test")
    config, spec = pretrained.settled(given, shards.path), feature_spec.load(shards.path)
    torch.manual_seed(config.seed)
    model = adapted.build(config, spec, shards.path)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    groups = [
        {"params": [p for p in trained.values() if id(p) in matrices], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in trained.values() if id(p) not in matrices], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    loader, objective = Loader(shards.path, config.data, config.seed, World()), Answering(config.loss, spec)
    found = []
    for step in range(config.steps):
        batch = loader.batch(step)
        loss = loss_of(objective(model, batch), objective.counts(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), config.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, config.optimizer.lr, config.schedule)
        optimizer.step()
        found.append(loss.item())
    return found, {n: p.detach() for n, p in trained.items()}


@pytest.fixture(scope="module")
def trained(keypad_shards: Artifact, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(keypad_shards, tmp_path_factory.mktemp("lora") / "model", 1, settings(base, zero={"stage": 3}))


def test_adapters_learn_as_in_plain_pytorch_and_the_base_stays(trained: Artifact, keypad_shards: Artifact, base: Path):
    wanted, parts = reference(keypad_shards, base)
    assert losses(trained.path) == pytest.approx(wanted, rel=1e-4) and wanted[-1] < wanted[0]
    stored = weights.load_model(trained.path, feature_spec.load(trained.path))
    state = stored.state_dict()
    assert all(torch.allclose(state[name], tensor, atol=2e-4) for name, tensor in parts.items())
    theirs = load_file(base / "model.safetensors")
    plain = load_file(trained.path / "model.safetensors")
    assert torch.equal(plain["blocks.1.feed_forward.out.weight"], theirs["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(plain["answer.weight"], theirs["lm_head.weight"])

    saved = trained.path / "checkpoints" / "step-00000004"
    names = set(load_file(saved / "weight.safetensors"))
    assert names == set(parts) and not any("base_layer" in name or name == "tokens.weight" for name in names)
    digest = json.loads((trained.path / "config.json").read_text())["pretrained"]["digest"]
    assert json.loads((saved / "state.json").read_text())["data"]["base"] == digest
    adapter = json.loads((trained.path / "adapters" / "default" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == f"sha256:{digest}" and adapter["r"] == 4
    assert str(base) not in (trained.path / "config.json").read_text() + json.dumps(trained.config)


def test_a_training_of_adapters_goes_on_after_a_stop_at_another_stage(
    trained: Artifact, keypad_shards: Artifact, base: Path, tmp_path: Path
):
    out = tmp_path / "model"
    shutil.copytree(trained.path, out)
    (out / "artifact.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    shutil.rmtree(out / "adapters")
    (out / artifacts.WORK).write_text(json.dumps({"fingerprint": trained.fingerprint}))
    resumed = run(keypad_shards, out, 1, settings(base, zero={"stage": 2}, accumulate=2))
    assert resumed.counts["zero_stage"] == 2 and losses(out) == pytest.approx(losses(trained.path), rel=1e-5)
    kept, made = (load_file(path / "adapters" / "default" / adapted.TENSORS) for path in (trained.path, out))
    assert kept.keys() == made.keys() and all(torch.allclose(kept[n], made[n], atol=1e-4) for n in kept)


@pytest.mark.slow  # two processes that import torch and DeepSpeed, three times
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "fp32"), (0, "fp32")])
def test_two_ranks_equal_one(
    trained: Artifact, keypad_shards: Artifact, base: Path, tmp_path: Path, stage: int, precision: str
):
    two = run(keypad_shards, tmp_path / "two", 2, settings(base, zero={"stage": stage}, precision=precision))
    assert losses(two.path) == pytest.approx(losses(trained.path), rel=1e-4 if precision == "fp32" else 2**-6)


def test_a_request_chooses_the_adapter_and_export_merges_it(trained: Artifact, base: Path, tmp_path: Path):
    responder = Responder(trained.path)
    question = {"text": responder.spec.tasks[0].questions[0]}
    asked = [
        question,
        {**question, "adapter": "none"},
        {**question, "adapter": "default"},
        {**question, "adapter": "x"},
    ]
    usual, bare, named, wrong = responder.answer(asked)
    assert usual == named and usual["label_scores"] != bare["label_scores"]
    assert wrong["error"].endswith("no adapter 'x'; wanted default or none")
    assert responder.answer([question])[0] == usual

    merged = tmp_path / "merged"
    export(str(trained.path), merged, "safetensors")
    alone = Responder(merged)
    assert not alone.adapters and alone.answer([question])[0]["label_scores"] == pytest.approx(
        usual["label_scores"], abs=1e-5
    )
    assert "a question without adapter" in alone.answer([{**question, "adapter": "default"}])[0]["error"]
    export(str(trained.path), tmp_path / "base", "llama", adapter="none")
    again, first = load_file(tmp_path / "base" / "model.safetensors"), load_file(base / "model.safetensors")
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_an_adapter_of_another_base_is_refused(trained: Artifact, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(trained.path, folder)
    spec = feature_spec.load(folder)
    path = folder / "adapters" / "default" / "adapter_config.json"
    kept = path.read_text()
    path.write_text(kept.replace("sha256:", "sha256:0"))
    with pytest.raises(ArtifactError, match="is for the base 0"):
        weights.load_model(folder, spec)
    path.write_text(kept.replace("blocks.0.attention.qkv", "blocks.7.attention.qkv"))
    with pytest.raises(ArtifactError, match=r"adapts blocks.7.attention.qkv; wanted linear maps of this model"):
        weights.load_model(folder, spec)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="no adapter that can be read"):
        weights.load_model(folder, spec)
    with pytest.raises(ConfigError, match=r"lora needs model\.pretrained"):
        parse(TrainConfig, {"lora": {}}, "train")
    assert adapters.names(weights.load_model(trained.path, spec)) == ["default"]


@pytest.mark.slow
def test_a_merged_model_has_no_adapters(keypad_shards: Artifact, base: Path, trained: Artifact, tmp_path: Path):
    lora = {"rank": 4, "targets": ["blocks"], "merged": True}
    made = run(keypad_shards, tmp_path / "model", 1, settings(base, zero={"stage": 3}, lora=lora))
    assert not (made.path / "adapters").exists()
    spec = feature_spec.load(made.path)
    one, other = weights.load_model(made.path, spec), weights.load_model(trained.path, spec)
    adapters.merge(other)
    for name, tensor in one.state_dict().items():
        assert torch.allclose(tensor, other.state_dict()[name], atol=1e-6), name
