"""BERT-style encoders, made here at random, as classifiers and as teachers, against transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from mmlm.compress.classifier import Following, SequenceClassifier
from mmlm.data.collate import Batch, pack
from mmlm.errors import ConfigError
from mmlm.evals.answer import Answerer
from mmlm.evals.explain import explain
from mmlm.features import spec as feature_spec
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, BOS, EOS, FeatureSpec, ImageSpec, TaskSpec
from mmlm.features.text import Tokenizer
from mmlm.model.config import ModelConfig
from mmlm.model.huggingface.encoder import EncoderModel
from mmlm.publish.export import export
from mmlm.train import adapted, pretrained, weights
from mmlm.train.config import LossConfig, TrainConfig
from mmlm.train.objectives import loss_of

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "the", "is", "##ly", "not", "very"]
TEXTS = ["the film is very good", "a bad film", "not badly", "Good"]
MARKS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def folder_of(where: Path, head: bool = False, **changes: Any) -> Path:
    inner = HFTokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    transformers.BertTokenizerFast(tokenizer_object=inner, **MARKS).save_pretrained(where)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, initializer_range=0.3, id2label={0: "yes", 1: "no"}, **changes,
    )  # fmt: skip
    torch.manual_seed(4)
    made = transformers.BertForSequenceClassification if head else transformers.BertModel
    made(config).save_pretrained(where)
    return where


def shards_of(where: Path, tokenizer: str, **task: Any) -> tuple[FeatureSpec, Path]:
    where.mkdir()
    made = Tokenizer(tokenizer)
    made.save(where)
    tasks = [TaskSpec(**{"name": "verdict", "labels": ["no", "yes"], **task})]
    spec = FeatureSpec(vocab_size=made.vocab_size, tokenizer_digest=made.digest, max_len=30, tasks=tasks)
    feature_spec.save(spec, where)
    return spec, where


def batch_of(spec: FeatureSpec, tokenizer: Tokenizer) -> Batch:
    """Two sequences of two records each."""
    samples = []
    for n, text in enumerate(TEXTS):
        tokens = [BOS, *tokenizer.encode(text), ANSWER, *tokenizer.encode("bad"), EOS]
        at = tokens.index(ANSWER)
        samples.append(Sample(f"s{n}", "verdict", np.array(tokens, np.int32), at, label=["no", "yes"][n % 2]))
    return pack([samples[:2], samples[2:]], spec)


def test_an_encoder_reads_the_question_as_transformers_does(tmp_path: Path):
    folder = folder_of(tmp_path / "bert")
    spec, shards = shards_of(tmp_path / "shards", (folder / "tokenizer.json").read_text())
    given = TrainConfig.model_validate({"model": {"pretrained": {"folder": str(folder)}}})
    config = pretrained.settled(given, shards)
    net = pretrained.build(config.model, spec, shards).eval()
    assert isinstance(net, EncoderModel) and isinstance(config.model, ModelConfig) and config.model.layers == 2
    batch = batch_of(spec, Tokenizer.load(shards))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    asked = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**asked).last_hidden_state
        mask = asked["attention_mask"][..., None]
        wanted = (hidden * mask).sum(1) / mask.sum(1)
        assert torch.allclose(net.records(batch), wanted, atol=1e-5)
        out = net(batch, z_loss=0.0)
    assert out.label_RC.shape == (4, 2) and out.answer is not None and not out.answer.each_A.any()
    net.train()
    net(batch).label_RC.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())

    out_folder = tmp_path / "model"
    out_folder.mkdir()
    weights.save_model(out_folder, net.state_dict(), net.config, shards)
    again = weights.load_model(out_folder, spec).eval()
    assert torch.equal(again(batch).label_RC, net.eval()(batch).label_RC)
    assert str(folder) not in (out_folder / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"EncoderModel.*--format hf or safetensors"):
        export(str(out_folder), tmp_path / "out", "llama")


def test_an_adapter_leaves_the_encoder_as_it_is(tmp_path: Path):
    pytest.importorskip("peft")
    folder = folder_of(tmp_path / "bert")
    spec, shards = shards_of(tmp_path / "shards", (folder / "tokenizer.json").read_text())
    given = TrainConfig.model_validate({"model": {"pretrained": {"folder": str(folder)}}, "lora": {}})
    net = adapted.build(pretrained.settled(given, shards), spec, shards)
    net(batch_of(spec, Tokenizer.load(shards))).label_RC.square().sum().backward()
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name for name in learning if "lora_" not in name} == {"label.weight", "label.bias"}
    assert any(name.startswith("encoder.") for name in learning)


def test_an_encoder_passes_over_nothing(tmp_path: Path):
    folder = folder_of(tmp_path / "bert")
    spec, shards = shards_of(tmp_path / "shards", (folder / "tokenizer.json").read_text())

    def settled(**changes: object) -> TrainConfig:
        given = TrainConfig.model_validate({"model": {"pretrained": {"folder": str(folder)}, **changes}})
        return pretrained.settled(given, shards)

    assert settled()
    with pytest.raises(ConfigError, match="fusion adversarial on an encoder of texts"):
        settled(fusion="adversarial")
    with pytest.raises(ConfigError, match=r"model\.embedding on an encoder of texts"):
        settled(embedding=8)
    feature_spec.save(spec.model_copy(update={"image": ImageSpec(size=16, patch=8, channels=1)}), shards)
    with pytest.raises(ConfigError, match="records with image"):
        settled()


def test_what_an_encoder_cannot_do_is_refused(tmp_path: Path):
    folder = folder_of(tmp_path / "bert")
    tokenizer = (folder / "tokenizer.json").read_text()
    given = TrainConfig.model_validate({"model": {"pretrained": {"folder": str(folder)}}})
    _, worded = shards_of(tmp_path / "worded", tokenizer, has_text=True)
    with pytest.raises(ConfigError, match="verdict is answered in words"):
        pretrained.settled(given, worded)
    spec, shards = shards_of(tmp_path / "shards", tokenizer)
    long = spec.model_copy(update={"max_len": 90})
    feature_spec.save(long, shards)
    with pytest.raises(ConfigError, match=r"features.max_len = 90; wanted at most 40"):
        pretrained.settled(given, shards)
    feature_spec.save(spec, shards)
    given = TrainConfig.model_validate({"model": {"mlp": "relu", "pretrained": {"folder": str(folder)}}})
    with pytest.raises(ConfigError, match=r"train.model.mlp = 'relu'.*wanted 'gelu'"):
        pretrained.settled(given, shards)


def test_a_sequence_classifier_leads_a_student_with_another_tokenizer(tmp_path: Path):
    folder = folder_of(tmp_path / "bert", head=True)
    ours = HFTokenizer(
        models.WordLevel({"[UNK]": 0, **{w: i + 1 for i, w in enumerate(" ".join(TEXTS).split())}}, "[UNK]")
    )
    ours.pre_tokenizer = pre_tokenizers.Whitespace()
    spec, shards = shards_of(tmp_path / "shards", ours.to_str())
    teacher = SequenceClassifier(folder, spec, Tokenizer.load(shards))
    batch = batch_of(spec, Tokenizer.load(shards))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    asked = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**asked).logits[:, [1, 0]]  # there: yes, no
    assert torch.allclose(teacher(batch), wanted, atol=1e-5)

    torch.manual_seed(0)
    student = weights.build(ModelConfig(width=32, layers=1, heads=4), spec)
    objective = Following(LossConfig(), spec, teacher, temperature=2.0, task=0.5)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
    for _ in range(60):
        terms = objective(student, batch)
        optimizer.zero_grad()
        loss_of({"label_kl": terms["label_kl"]}, objective.counts(batch)).backward()
        optimizer.step()
    assert objective.counts(batch)["label_kl"] == 4 and terms["label_kl"].sum < 0.01
    assert torch.allclose(student(batch).label_RC.softmax(1), wanted.softmax(1), atol=0.1)


def test_a_classifier_of_other_classes_is_refused(tmp_path: Path):
    folder = folder_of(tmp_path / "bert", head=True)
    tokenizer = (folder / "tokenizer.json").read_text()
    spec, shards = shards_of(tmp_path / "shards", tokenizer, labels=["cat", "dog"])
    with pytest.raises(ConfigError, match="tells no, yes apart; wanted the classes of a task: verdict"):
        SequenceClassifier(folder, spec, Tokenizer.load(shards))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "architectures": ["BertModel"]}))
    with pytest.raises(ConfigError, match="no sequence classifier"):
        SequenceClassifier(folder, spec, Tokenizer.load(shards))


def test_an_answer_is_explained_by_the_words_that_the_encoder_read(tmp_path: Path):
    """Integrated gradients by hand, along transformers' own embedded words, give the same."""
    pytest.importorskip("captum")
    folder = folder_of(tmp_path / "bert")
    spec, shards = shards_of(tmp_path / "shards", (folder / "tokenizer.json").read_text())
    given = TrainConfig.model_validate({"model": {"pretrained": {"folder": str(folder)}}})
    net: Any = pretrained.build(pretrained.settled(given, shards).model, spec, shards).eval()
    net.label.weight.data.mul_(40.0)
    tokenizer = Tokenizer.load(shards)
    answerer = Answerer.__new__(Answerer)
    answerer.__dict__.update(model=net, spec=spec, tokenizer=tokenizer, device=torch.device("cpu"))
    tokens = [BOS, *tokenizer.encode(TEXTS[0]), ANSWER]
    asked = Sample("s", "verdict", np.array(tokens, np.int32), len(tokens) - 1, label="yes")
    found = explain(answerer, asked, label="no")
    assert found.complete and not found.rolled_out
    assert [part.text.strip() for part in found.parts] == TEXTS[0].split()  # type: ignore[union-attr]
    assert found.by_modality == {"text": pytest.approx(found.score - found.start, abs=found.tolerance)}

    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS[0], return_tensors="pt")["input_ids"]
    table = net.encoder.get_input_embeddings()
    real, start = table(ids).detach(), table(ids).detach()
    start[:, 1:-1] = table.weight[0].detach()
    total = torch.zeros_like(real)
    for n in range(400):
        here = (start + (n + 0.5) / 400 * (real - start)).requires_grad_()
        hidden = net.encoder(inputs_embeds=here, attention_mask=torch.ones_like(ids)).last_hidden_state
        net.label(hidden.mean(1)).log_softmax(-1)[0, 0].backward()
        total += (here.grad * (real - start) / 400).detach()  # type: ignore[operator]
    by_hand = total.sum(-1)[0, 1:-1].tolist()
    assert max(map(abs, by_hand)) > 0.05
    assert [part.attribution for part in found.parts] == pytest.approx(by_hand, abs=0.01)
