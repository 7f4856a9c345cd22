"""Every kind of model as a folder with its own code, in a process that does not know mmlm, against itself in this one."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from mmlm.config import parse
from mmlm.data.collate import Batch, collate, field_rows
from mmlm.data.modalities import alone
from mmlm.features import spec as feature_spec
from mmlm.features.config import TokenizerConfig
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, BOS, EOS, IMAGE, PAD, FeatureSpec, TaskSpec
from mmlm.features.text import Tokenizer, train_tokenizer
from mmlm.model.baseline_config import CONFIGS
from mmlm.model.config import ModelConfig
from mmlm.model.generation import generate
from mmlm.publish.answering import Responder
from mmlm.publish.export import export
from mmlm.train import pretrained, weights
from mmlm.train.config import TrainConfig
from tests.model.test_fusion import FUSIONS
from tests.model.test_layouts import CLASSIC
from tests.publish.conftest import QUESTIONS
from tests.shards.test_encoders import save_whisper
from tests.small import SPEC, sample
from tests.train import test_pretrained_stems as stems
from tests.train.test_text_encoders import folder_of as bert_folder
from tests.train.test_text_encoders import shards_of as bert_shards

transformers = pytest.importorskip("transformers")

YARN = {"kind": "yarn", "factor": 2.0, "trained_length": 16}
KINDS: dict[str, dict[str, Any]] = {
    "encoder": {"layout": "encoder", "embedding": 6},
    "encoder_decoder": {"layout": "encoder_decoder", "embedding": 6},
    "classic": {"layout": "encoder_decoder", "encoder_layers": 3, "tied": True, **CLASSIC},
    **{f"encoder, {f}": {"layout": "encoder", "fusion": f, "embedding": 6} for f in FUSIONS if f != "concat"},
    **{f"encoder_decoder, {f}": {"layout": "encoder_decoder", "fusion": f} for f in FUSIONS if f != "concat"},
    "concat": {"embedding": 6, "attention": "prefix", "image_stem": "conv", "rope_scaling": YARN},
    "add": {"fusion": "add", "embedding": 6, "image_stem": "hog", "image_places": "grid"},
    "cross_attention": {"fusion": "cross_attention", "embedding": 6, "positions": "learned"},
    "adversarial": {"fusion": "adversarial", "embedding": 6, "audio_stem": "conv"},
    "late": {"fusion": "late", "embedding": 6},
    "lstm": {"kind": "lstm", "embedding": 6},
    "gru": {"kind": "gru", "layers": 1},
    "cnn": {"kind": "cnn", "channels": [4, 8], "width": 16, "embedding": 6},
}
FEW = {"encoder", "encoder_decoder", "add"}
"""Tried in every run."""
SILENT = ("encoder", "cnn", "bert", *(f"encoder, {f}" for f in FUSIONS))
LIMIT = 6
GIVEN: list[tuple[str, ...]] = [
    ("image", "audio"),
    ("fields", "context"),
    ("image",),
    (),
    ("audio", "fields", "context"),
]


class Here(NamedTuple):
    """A model in this process, and what it is asked."""

    net: Any
    spec: FeatureSpec
    samples: list[Sample]
    prompts: Batch
    things: Batch
    """What vectors are made of: media and texts without a question."""


Known = tuple[dict[str, Here], dict[str, Any], dict[str, list[float]]]
CODE = """
import sys, torch, transformers
sys.modules["mmlm"] = None  # as where it is not installed
found = {}
for name, asked in torch.load("asked.pt").items():
    auto = getattr(transformers, asked.get("by", "AutoModel"))
    net = auto.from_pretrained(name, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        made = net(**asked["inputs"])
        found[name] = {"class": type(net).__name__, "names": net.config.id2label, **made}
        found[name]["cache"] = type(found[name].pop("past_key_values", None)).__name__
        if made.embeddings is not None:
            found[name]["vectors"] = net.get_embeddings(**asked["things"])
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            text = tokenizer(["<bos><context>a red bird<answer>"], return_tensors="pt")
            found[name]["bird"] = net.get_embeddings(**text)[0]
        if hasattr(net, "generate"):
            found[name]["said"] = net.generate(**asked["inputs"], max_new_tokens=6)
            found[name]["slowly"] = net.generate(**asked["inputs"], max_new_tokens=6, use_cache=False)
            beams = {**asked["inputs"], "max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
            found[name]["beams"] = [net.generate(**beams, use_cache=cached) for cached in (True, False)]
torch.save(found, "found.pt")
"""


def test_what_an_export_cannot_say_it_refuses() -> None:
    modeling = importlib.import_module("mmlm.model.huggingface.modeling")  # with transformers

    def of(kind: Any, layout: str) -> Any:
        spec = SPEC.model_copy(update={"tasks": SPEC.tasks[:1]})
        model = parse(ModelConfig, {"layout": layout, "width": 32, "layers": 1, "heads": 2}, "test").model_dump(
            mode="json"
        )
        return kind(modeling.MmlmConfig(model=model, spec=spec.model_dump(mode="json"), field_rows=3))

    ids = torch.tensor([[1, 20, 21, ANSWER], [1, 20, 21, 22]])
    classes = of(modeling.MmlmForSequenceClassification, "encoder")
    with pytest.raises(ValueError, match="labels were given; wanted none"):
        classes(ids[:1], labels=torch.tensor([0]))
    writer = of(modeling.MmlmForConditionalGeneration, "encoder_decoder")
    assert writer(ids[:1]).label_logits.shape == (1, 3)
    for net in (classes, writer):  # it would be read at another record's place
        with pytest.raises(ValueError, match="1 sequences have no <answer>"):
            net(ids)


def in_another_process(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What the exported models in `folder` make of the inputs, by name."""
    torch.save(asked, folder / "asked.pt")
    (folder / "code.py").write_text(CODE)
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "code.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = torch.load(folder / "found.pt")
    return found


def inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """As the exported code takes them."""
    media = {"patches": batch.patches_PD, "patch_at": batch.patch_at_P, "mels": batch.mels_MD, "mel_at": batch.mel_at_M}
    given = {key: rows for key, rows in media.items() if len(rows)}
    if len(batch.values_K):
        given |= {"values": batch.values_K, "value_at": batch.value_at_K}
    return {"input_ids": batch.tokens_BT, "attention_mask": batch.valid_BT.long(), **given}


def shards(folder: Path, silent: bool) -> FeatureSpec:
    """A tokenizer, and a spec with all media; with tasks of classes and of a number alone for models without words."""
    folder.mkdir()
    tokenizer = train_tokenizer(QUESTIONS, TokenizerConfig(vocab_size=270))
    tokenizer.save(folder)
    spec = SPEC.model_copy(update={"vocab_size": tokenizer.vocab_size, "tokenizer_digest": tokenizer.digest})
    if silent:
        tasks = [TaskSpec(name="kind", labels=["a", "b", "c"]), TaskSpec(name="age", number=(50.0, 10.0))]
        spec = spec.model_copy(update={"tasks": tasks})
    feature_spec.save(spec, folder)
    return spec


def ends_somewhere(net: Any, prompts: Batch) -> None:
    """Let what one answer says late end it, so that answers are of several lengths, and a mark be more probable still."""
    with torch.no_grad():
        net.answer.weight[EOS] = 0
        late = generate(net, prompts, limit=LIMIT).ids[1][3]
        net.answer.weight[EOS], net.answer.weight[IMAGE] = 1.1 * net.answer.weight[late], 1.2 * net.answer.weight[late]


def exported(root: Path, names: Iterable[str]) -> Known:
    specs = {silent: shards(root / f"shards-{silent}", silent) for silent in (True, False)}
    samples = [sample(n, given) for n, given in enumerate(GIVEN)]
    asked, here, birds = {}, {}, {}
    for name in names:
        silent, kind = name in SILENT, KINDS[name].get("kind", "transformer")
        spec = specs[silent]
        sizes = {} if kind == "cnn" else {"width": 32, "layers": 2} | ({"heads": 4} if kind == "transformer" else {})
        config = parse(CONFIGS[kind], {**sizes, **KINDS[name]}, "test")
        torch.manual_seed(3)
        net = weights.build(config, spec).eval()
        prompts = collate(samples, spec, pad_left=True, with_answer=False)
        things = collate([alone(s, frozenset(s.modalities)) for s in samples], spec, with_answer=False)
        if net.generates:
            ends_somewhere(net, prompts)
        folder = root / f"checkpoint-{name}"
        folder.mkdir()
        weights.save_model(folder, net.state_dict(), config, root / f"shards-{silent}")
        export(str(folder), root / name, "hf")
        asked[name] = {"inputs": inputs(prompts), "things": inputs(things)}
        here[name] = Here(net, spec, samples, prompts, things)
        if name in FEW:
            birds[name] = Responder(folder).embed([{"text": "a red bird"}])[0]["embedding"]
    found = in_another_process(root, asked)
    return here, found, birds


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return exported(tmp_path_factory.mktemp("few"), FEW)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return exported(tmp_path_factory.mktemp("others"), KINDS.keys() - FEW)


@pytest.fixture
def known(name: str, request: pytest.FixtureRequest) -> tuple[Here, dict[str, Any]]:
    """What a kind says here, and what it says there."""
    here, there, _ = request.getfixturevalue("few" if name in FEW else "others")
    return here[name], there[name]


def kinds(*, silent: bool = True) -> list[Any]:
    return [
        pytest.param(name, marks=() if name in FEW else pytest.mark.slow)
        for name in KINDS
        if silent or name not in SILENT
    ]


@pytest.mark.parametrize("name", kinds())
def test_classes_and_vectors_are_those_of_the_model(name: str, known: Any):
    (net, _, _, prompts, things), found = known
    with torch.no_grad():
        mine, vectors = net(prompts), net(things).embedding_RE
    assert torch.allclose(found["label_logits"], mine.label_RC, atol=1e-5)
    assert mine.label_RC.std(0).min() > 1e-3  # what is given matters
    assert ("vectors" in found) == bool(net.config.embedding)
    if net.config.embedding:
        assert torch.allclose(found["embeddings"], mine.embedding_RE, atol=1e-5)
        assert torch.allclose(found["vectors"], vectors, atol=1e-5)
        assert found["vectors"][0].norm().item() == pytest.approx(1)
    if name in SILENT:
        assert found["class"] == "MmlmForSequenceClassification" and "said" not in found
        assert found["cache"] == "NoneType"
        assert torch.equal(found["logits"], found["label_logits"])
        assert found["names"] == {0: "kind: a", 1: "kind: b", 2: "kind: c", 3: "age"}


def test_a_text_becomes_the_vector_that_mmlm_embed_gives(few: Known):
    """By the call that the guide shows; as `birds`, what the command gives."""
    _, found, birds = few
    for name in FEW:
        assert found[name]["bird"].tolist() == pytest.approx(birds[name], abs=1e-5)


@pytest.mark.parametrize("name", kinds(silent=False))
def test_words_are_those_of_the_model_token_by_token(name: str, known: Any):
    (net, _, _, prompts, _), found = known
    ids = generate(net, prompts, limit=LIMIT).ids
    assert len({len(answer) for answer in ids}) > 1
    assert found["cache"] == "MmlmCache" and torch.equal(found["said"], found["slowly"])
    assert torch.equal(*found["beams"]) and len(found["beams"][0]) == 2 * len(ids)
    said = found["said"][:, prompts.tokens_BT.shape[1] :].tolist()
    for answer, theirs in zip(ids, said, strict=True):
        whole = answer if len(answer) == LIMIT else [*answer, EOS]
        assert theirs[: len(whole)] == whole and set(theirs[len(whole) :]) <= {PAD}
    with torch.no_grad():  # the question's last position, which says the first word
        first = net.answer(net.trunk(prompts))[prompts.valid_BT.sum(1).cumsum(0) - 1]
    assert torch.allclose(found["logits"][:, -1], first, atol=1e-5)


@pytest.mark.parametrize("name", kinds(silent=False))
def test_logits_of_whole_records_are_those_of_the_model(name: str, known: Any):
    """In this process, padded on the right, with answers: what training reads is what the exported class says."""
    from mmlm.model.huggingface.modeling import MmlmConfig, MmlmForConditionalGeneration  # with transformers alone

    net, spec, samples, _, _ = known[0]
    batch = collate(samples, spec)
    settings = {"model": net.config.model_dump(mode="json"), "spec": spec.model_dump(mode="json")}
    theirs = MmlmForConditionalGeneration(MmlmConfig(**settings, field_rows=len(field_rows(spec))))
    theirs.net.load_state_dict(net.state_dict())
    theirs.eval()
    labels = batch.tokens_BT.masked_fill(batch.prompt_BT | ~batch.valid_BT, -100)
    with torch.no_grad():
        made, mine = theirs(**inputs(batch), labels=labels), net(batch)
        assert torch.allclose(made.logits[batch.target_BT != -100], mine.answer_AV, atol=1e-5)
        wanted = torch.nn.functional.cross_entropy(mine.answer_AV, batch.target_BT[batch.target_BT != -100])
    assert made.loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert torch.allclose(made.label_logits, mine.label_RC, atol=1e-5)


@pytest.mark.slow
def test_a_bert_style_encoder_is_exported_too(tmp_path: Path):
    bert, folder = bert_folder(tmp_path / "source"), tmp_path / "checkpoint"
    spec, where = bert_shards(tmp_path / "shards", (bert / "tokenizer.json").read_text())
    given = TrainConfig.model_validate({"model": {"pretrained": {"folder": str(bert)}}})
    config = pretrained.settled(given, where).model
    net = pretrained.build(config, spec, where).eval()
    folder.mkdir()
    weights.save_model(folder, net.state_dict(), net.config, where)
    made = export(str(folder), tmp_path / "bert", "hf")
    assert made.architecture == "MmlmForSequenceClassification"
    text = Tokenizer.load(where).encode("the film is very good")
    samples = [
        Sample("s", "verdict", np.array([BOS, *ids, ANSWER], np.int32), len(ids) + 1) for ids in (text, text[:2])
    ]
    prompts = collate(samples, spec, pad_left=True, with_answer=False)
    made_for = "AutoModelForSequenceClassification"
    found = in_another_process(tmp_path, {"bert": {"inputs": inputs(prompts), "by": made_for}})["bert"]
    with torch.no_grad():
        assert torch.allclose(found["logits"], net(prompts).label_RC, atol=1e-5)
    assert found["names"] == {0: "no", 1: "yes"}


@pytest.mark.slow
def test_pretrained_stems_are_exported_with_the_model(tmp_path: Path):
    """Also what they compute once and keep beside their weights, such as the numbers of their positions."""
    where = tmp_path / "shards"
    whole = shards(where, False)
    known = {"vocab_size": whole.vocab_size, "tokenizer_digest": whole.tokenizer_digest}
    feature_spec.save(spec := stems.spec_of(**known), where)
    batch = collate([stems.sample(n) for n in range(3)], spec, pad_left=True, with_answer=False)
    sounds = {"folder": str(save_whisper(tmp_path / "whisper"))}
    asked, here = {}, {}
    for kind in ("ViT", "CLIPVision", "SiglipVision", "DINOv3ViT"):
        pictures = {"folder": str(stems.vision_folder(tmp_path / f"vision-{kind}", kind))}
        here[kind] = stems.built(where, image_encoder=pictures, audio_encoder=sounds).eval()
        folder = tmp_path / f"checkpoint-{kind}"
        folder.mkdir()
        weights.save_model(folder, here[kind].state_dict(), here[kind].config, where)
        export(str(folder), tmp_path / kind, "hf")
        asked[kind] = {"inputs": inputs(batch)}
    found = in_another_process(tmp_path, asked)
    for kind, net in here.items():
        with torch.no_grad():
            assert torch.allclose(found[kind]["label_logits"], net(batch).label_RC, atol=1e-5), kind
            assert torch.allclose(found[kind]["logits"][batch.valid_BT], net.answer(net.trunk(batch)), atol=1e-5), kind


def test_what_has_no_vectors_or_no_answer_says_so(tmp_path: Path):
    from mmlm.model.huggingface.modeling import MmlmConfig, MmlmForSequenceClassification

    spec = shards(tmp_path / "shards", True)
    model = parse(CONFIGS["transformer"], {"width": 16, "layers": 1, "heads": 2, "layout": "encoder"}, "test")
    settings = {"model": model.model_dump(mode="json"), "spec": spec.model_dump(mode="json")}
    net = MmlmForSequenceClassification(MmlmConfig(**settings, field_rows=len(field_rows(spec))))
    with pytest.raises(ValueError, match=r"no embedding head; wanted one that was trained with model\.embedding"):
        net.get_embeddings(torch.tensor([[BOS, ANSWER]]))
    with pytest.raises(ValueError, match="1 sequences have no <answer>; wanted one where each question ends"):
        net(torch.tensor([[BOS, 20, ANSWER], [BOS, 20, 21]]))
