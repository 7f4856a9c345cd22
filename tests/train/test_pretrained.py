"""Models of transformers, made here at random, as the trunk: the same logits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmlm.data.collate import collate
from mmlm.errors import ConfigError
from mmlm.features import spec as feature_spec
from mmlm.features.spec import ANSWER, BOS, EOS, FeatureSpec, ImageSpec, TaskSpec
from mmlm.features.text import Tokenizer
from mmlm.model.config import ModelConfig
from mmlm.publish.export import export
from mmlm.train import pretrained, weights
from mmlm.train.config import TrainConfig
from tests.model.texts import logits_of, texts
from tests.small import sample

transformers = pytest.importorskip("transformers")
TEXTS = ["red green blue", "one two three four", "a cat, a dog and a bird"]


def folder_of(where: Path, kind: str = "Llama", **changes: Any) -> Path:
    """A random model with a tokenizer that is not ours, as `save_pretrained` leaves them."""
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator(TEXTS, trainer)
    given = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    shape = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(5)
    parts = {key: changes.pop(key) for key in ("max_shard_size",) if key in changes}
    config = getattr(transformers, f"{kind}Config")(**{**shape, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "bias" in name:  # transformers makes them 0
            torch.nn.init.normal_(parameter)
    model.save_pretrained(where, **parts)
    given.save_pretrained(where)
    return where


def shards_of(where: Path, tokenizer: str) -> tuple[FeatureSpec, Path]:
    """What a shard set made with a tokenizer.json holds beside its shards."""
    where.mkdir()
    made = Tokenizer(tokenizer)
    made.save(where)
    spec = FeatureSpec(
        vocab_size=made.vocab_size, tokenizer_digest=made.digest, max_len=96,
        image=ImageSpec(size=16, patch=8, channels=1), tasks=[TaskSpec(name="t", labels=["a", "b"])],
    )  # fmt: skip
    feature_spec.save(spec, where)
    return spec, where


def given(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"model": {"pretrained": {"folder": str(folder)}, **changes}})


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5, "head_dim": 12}),
    "llama, tied, in shards": ("Llama", {"tie_word_embeddings": True, "max_shard_size": "20KB"}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_trunk_says_what_the_model_said(tmp_path: Path, kind: str):
    name, changes = KINDS[kind]
    folder = folder_of(tmp_path / "hf", name, **changes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("shards" in kind)
    spec, shards = shards_of(tmp_path / "shards", (folder / "tokenizer.json").read_text())
    config = pretrained.settled(given(folder), shards)
    net = pretrained.build(config.model, spec, shards).eval()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    known = spec.vocab_size - 9
    with torch.no_grad():
        for ids in texts(spec.vocab_size, lengths=(2, 50)):
            wanted = model(ids[None] - 9).logits[0, :, :known]
            assert torch.allclose(logits_of(net, ids, spec)[:, 9:], wanted, atol=1e-5)
        assert torch.equal(net.tokens.weight[BOS], model.get_input_embeddings().weight[0])
        assert torch.equal(net.tokens.weight[EOS], model.get_input_embeddings().weight[1])
        assert net.image is not None
        size = net.tokens.weight.std()
        assert (
            0.5 < net.tokens.weight[ANSWER].std() / size < 2
            and 0.3 < next(net.image.place.parameters()).std() / size < 2
        )

    # and back: the same rows under the same ids, ours behind them
    out = tmp_path / "model"
    out.mkdir()
    weights.save_model(out, net.state_dict(), net.config, shards)
    export(str(out), tmp_path / "again", "llama")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    assert type(again) is type(model)
    ids = torch.tensor([[3, 20, 7, 250]])
    with torch.no_grad():
        assert torch.allclose(again(ids).logits[..., :known], model(ids).logits[..., :known], atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer("a cat")["input_ids"] == Tokenizer.load(shards)._inner.encode("a cat").ids
    assert tokenizer.bos_token_id == known + BOS

    # what we exported is a trunk for the same shards, marks included
    third = pretrained.build(pretrained.settled(given(tmp_path / "again"), shards).model, spec, shards)
    assert torch.equal(third.tokens.weight, net.tokens.weight)
    assert torch.equal(third.answer.weight, net.answer.weight)


def test_what_fusion_adds_is_as_large_as_text(tmp_path: Path):
    folder = folder_of(tmp_path / "hf")
    spec, shards = shards_of(tmp_path / "shards", (folder / "tokenizer.json").read_text())
    config = pretrained.settled(given(folder, fusion="add"), shards)
    net = pretrained.build(config.model, spec, shards).eval()
    said: list[torch.Tensor] = []
    for encoder in net.fusion.encoders.values():  # type: ignore[union-attr, operator]
        encoder.register_forward_hook(lambda module, given, made: said.append(made))
    with torch.no_grad():
        net(collate([sample(0, ("image",))], spec))
        size = net.tokens.weight.std()
        large = [float(made.square().mean().sqrt() / size) for made in said if len(made)]
    assert large and all(0.5 < rms < 2 for rms in large)


def test_identity_is_the_content_and_not_the_place(tmp_path: Path):
    one, other = folder_of(tmp_path / "one"), folder_of(tmp_path / "other")
    _, shards = shards_of(tmp_path / "shards", (one / "tokenizer.json").read_text())
    a, b = (pretrained.nameless(pretrained.settled(given(f), shards)) for f in (one, other))
    assert (
        isinstance(a.model, ModelConfig) and a == b and a.model.pretrained is not None and not a.model.pretrained.folder
    )
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "rope_parameters": {"rope_theta": 7.0}}))
    changed = pretrained.nameless(pretrained.settled(given(other), shards))
    assert (
        isinstance(changed.model, ModelConfig)
        and changed.model.pretrained != a.model.pretrained
        and changed.model.rope_theta == 7
    )
    pinned = {"model": {"pretrained": {"folder": str(other), "digest": a.model.pretrained.digest}}}
    with pytest.raises(ConfigError, match="has the digest"):
        pretrained.settled(TrainConfig.model_validate(pinned), shards)


def test_what_does_not_fit_is_refused(tmp_path: Path):
    folder = folder_of(tmp_path / "hf")
    own = (folder / "tokenizer.json").read_text()
    spec, shards = shards_of(tmp_path / "shards", own)

    def said(config: TrainConfig, where: Path = shards) -> str:
        with pytest.raises(ConfigError) as caught:
            pretrained.build(pretrained.settled(config, where).model, spec, where)
        return str(caught.value)

    assert "no folder" in said(given(tmp_path / "nowhere"))
    assert "train.model.width = 64" in said(given(folder, width=64)) and "wanted 32" in said(given(folder, width=64))
    assert pretrained.settled(given(folder, width=32, dropout=0.1), shards).model.dropout == 0.1

    other = json.loads(own)
    other["model"]["merges"] = other["model"]["merges"][:-1]
    _, strange = shards_of(tmp_path / "strange", json.dumps(other))
    found = said(given(folder), strange)
    assert "another tokenizer" in found and f"features.tokenizer.file to {folder}/tokenizer.json" in found

    weights_file = folder / "model.safetensors"
    kept = weights_file.read_bytes()
    weights_file.write_bytes(kept[:100])
    assert "cannot be read" in said(given(folder))
    tensors = load(kept)
    tensors["model.layers.0.mlp.up_proj.weight"][0] = float("inf")
    save_file(tensors, weights_file, {"format": "pt"})
    assert "values that are not numbers" in said(given(folder))
    weights_file.rename(folder / "pytorch_model.bin")
    assert "only pytorch_model.bin" in said(given(folder)) and "never opened" in said(given(folder))
    weights_file.write_bytes(kept)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    assert "lack 'model.layers.2.input_layernorm.weight'" in said(given(folder))
    (folder / "config.json").write_text(json.dumps({**settings, "intermediate_size": 64}))
    assert "do not fit its config.json" in said(given(folder))
    (folder / "config.json").unlink()
    assert "has no config.json" in said(given(folder))
    assert ModelConfig().pretrained is None
