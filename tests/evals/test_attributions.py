"""Explanations find what decides, add up, and agree with the same thing computed another way."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch.nn import functional as F

from mmlm.config import parse
from mmlm.data.collate import Batch, collate, field_rows
from mmlm.errors import ConfigError, DataError
from mmlm.evals import explain_page, overlays
from mmlm.evals.answer import Answerer
from mmlm.evals.explain import FieldPart, PicturePart, SoundPart, TextPart, explain
from mmlm.evals.rollout import probabilities, roll_out
from mmlm.features.sample import Sample
from mmlm.features.spec import (
    ANSWER,
    AUDIO,
    BOS,
    FIELDS,
    IMAGE,
    AudioSpec,
    FeatureSpec,
    FieldsSpec,
    ImageSpec,
    TaskSpec,
)
from mmlm.features.text import Tokenizer
from mmlm.model.baseline_config import CnnConfig
from mmlm.model.config import ModelConfig
from mmlm.model.generation_config import GenerationConfig
from mmlm.model.transformer import FusedTransformer
from mmlm.train import weights
from mmlm.train.terms.one_label import class_masks, own_classes

CORNERS = [(0, 0), (0, 3), (3, 0), (3, 3)]
TASKS = {
    "corner": ["nw", "ne", "sw", "se", "none"],
    "moment": ["0", "1", "2", "3", "none"],
    "word": ["w0", "w1", "w2", "w3", "none"],
}
SPEC = FeatureSpec(
    vocab_size=48, tokenizer_digest="none", max_len=64,
    image=ImageSpec(size=16, patch=4, channels=1), audio=AudioSpec(max_seconds=0.4, n_mels=8, frames_per_token=4),
    fields=FieldsSpec(numbers={"age": (0.0, 1.0)}, categories={}),
    tasks=[TaskSpec(name=name, labels=labels) for name, labels in TASKS.items()],
)  # fmt: skip


class Letters:
    """Ids 9 and on are letters."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 88 for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i + 88) for i in ids)


def crafted(task: str, right: int, seed: int) -> Sample:
    """A record of which one corner of the picture, one moment of the sound or one of five letters decides; with `right` 4
    none does. A picture always has a bright patch, since standardisation tells the others whether there is one."""
    rng = np.random.default_rng((seed, right))
    picture = rng.integers(0, 60, (16, 16, 1)).astype(np.uint8)
    sound = rng.uniform(-6, -5, (20, 8)).astype(np.float16)
    letters = rng.integers(20, 48, 5)
    row, column = CORNERS[right] if right < 4 else rng.integers(1, 3, 2)
    picture[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 250
    if right < 4:
        sound[4 * right + 1 : 4 * right + 3] = 0
    slots = [IMAGE] if task == "corner" else [AUDIO] if task == "moment" else []
    if task == "word" and right < 4:
        letters[rng.integers(5)] = 9 + right
    tokens = [BOS, 13 + list(TASKS).index(task), *slots, FIELDS, *letters.tolist(), ANSWER]
    return Sample(
        id=f"{task}{seed}", task=task, tokens=np.array(tokens, np.int32), answer_at=len(tokens) - 1,
        images=[picture] if IMAGE in slots else [], sounds=[sound] if AUDIO in slots else [],
        fields={"age": float(rng.normal())}, label=TASKS[task][right],
    )  # fmt: skip


def model(attention: Literal["causal", "prefix"]) -> FusedTransformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 2, "mlp_width": 64, "qk_norm": False}
    return weights.build(ModelConfig(**sizes, attention=attention), SPEC)


@pytest.fixture(scope="module")
def answerer() -> Any:
    """A model that has learnt all three tasks."""
    net = model("prefix")
    steps, masks = 120, class_masks(SPEC)
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    for step in range(steps):
        records = [crafted(task, i % 5, 1000 * step + i) for task in TASKS for i in range(20)]
        batch = collate(records, SPEC)
        logits = own_classes(net(batch).label_RC, batch.task_R, masks)
        F.cross_entropy(logits, batch.label_R).backward()
        optimizer.step()
        optimizer.zero_grad()
    return answering(net)


def answering(net: FusedTransformer, spec: FeatureSpec = SPEC) -> Any:
    """An Answerer without a folder."""
    found = Answerer.__new__(Answerer)
    parts = SimpleNamespace(model=net.eval(), spec=spec, tokenizer=Letters(), device=torch.device("cpu"))
    found.__dict__.update(parts.__dict__)
    return found


@pytest.mark.parametrize("right", [0, 3])
def test_the_corner_that_decides_is_found(answerer: Any, right: int):
    found = explain(answerer, crafted("corner", right, 7))
    picture = next(part for part in found.parts if isinstance(part, PicturePart))
    assert found.answer == TASKS["corner"][right]
    assert np.unravel_index(picture.patches.argmax(), (4, 4)) == CORNERS[right]
    assert picture.patches.max() > 0.5 * (found.score - found.start)
    assert max(found.by_modality, key=lambda name: found.by_modality[name]) == "image"


def test_what_decides_stands_out_on_the_page(answerer: Any, tmp_path: Path):
    """In the written PNG the deciding corner is orange, and in the page's text the deciding letter, and nothing else is."""
    found = explain(answerer, crafted("corner", 3, 7))
    explain_page.write(found, {"text": "x"}, tmp_path / "corner")
    shown = np.asarray(Image.open(tmp_path / "corner" / "0-picture.png").convert("RGB")).astype(int)
    picture = next(part for part in found.parts if isinstance(part, PicturePart))
    figure = overlays.picture_figure(picture, found.unit)
    figure.savefig(io.BytesIO(), format="png")  # lays it out
    box = figure.axes[1].get_window_extent()
    cell = box.width / 4
    middle = (np.arange(4) + 0.5) * cell
    colours = shown[np.ix_((len(shown) - box.y1 + middle).astype(int), (box.x0 + middle).astype(int))]
    reddish = colours[..., 0] - colours[..., 2]  # 213 of full orange, less than 0 of blue, 0 of grey
    assert np.unravel_index(reddish.argmax(), (4, 4)) == CORNERS[3] and reddish.max() > 180
    assert (np.argsort(reddish.ravel())[-3:] == np.argsort(picture.patches.ravel())[-3:]).all()
    said = explain(answerer, crafted("word", 2, 9))
    page = explain_page.write(said, {"text": "x"}, tmp_path / "word").read_text()
    words = re.findall(r"<span style='background:#([0-9a-f]{6})' title='([-+.\d]+)[^']*'>([^<]*)</span>", page)
    letters = [part for part in said.parts if isinstance(part, TextPart)]
    assert [(word, value) for _, value, word in words] == [(p.text, f"{p.attribution:+.4f}") for p in letters]
    warmest = max(words, key=lambda row: int(row[0][:2], 16) - int(row[0][4:], 16))
    assert warmest[2] == chr(9 + 2 + 88)


@pytest.mark.parametrize("right", [1, 2])
def test_the_moment_that_decides_is_found(answerer: Any, right: int):
    found = explain(answerer, crafted("moment", right, 8))
    sound = next(part for part in found.parts if isinstance(part, SoundPart))
    assert found.answer == str(right)
    assert sound.frames.argmax() in (4 * right + 1, 4 * right + 2)
    assert sound.frames[4 * right + 1 : 4 * right + 3].sum() > 0.5 * (found.score - found.start)


def test_the_word_that_decides_is_found(answerer: Any):
    found = explain(answerer, crafted("word", 2, 9))
    letters = [part for part in found.parts if isinstance(part, TextPart)]
    best = max(letters, key=lambda part: part.attribution)
    assert found.answer == "w2" and best.text == chr(9 + 2 + 88)


@pytest.mark.parametrize("task", list(TASKS))
def test_attributions_add_up_to_the_difference_of_scores(answerer: Any, task: str):
    sample = crafted(task, 1, 5)
    answer = answerer.answer([sample])[0]
    for label in TASKS[task][:3]:
        found = explain(answerer, sample, label=label)
        assert found.complete and abs(found.delta) <= max(0.01, 0.02 * abs(found.score - found.start))
        total = sum(part.attribution for part in found.parts)
        assert total == pytest.approx(found.score - found.start, abs=found.tolerance)
        assert np.exp(found.score) == pytest.approx(answer.label_scores[label], rel=1e-3)


FORMS = [{"fusion": kind} for kind in ("concat", "add", "cross_attention", "adversarial", "late")]
FORMS += [{**form, "layout": layout} for layout in ("encoder", "encoder_decoder") for form in FORMS]
FORMS += [{"image_stem": "conv"}, {"image_stem": "hog"}]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(map(str, form.values())))
@pytest.mark.parametrize("of", ["label", "text"])
def test_attributions_add_up_however_modalities_meet(form: dict[str, str], of: str):
    if of == "text" and form.get("layout") == "encoder":
        return  # it writes none
    net = parse(ModelConfig, {"width": 32, "layers": 1, "heads": 2, **form}, "test")
    torch.manual_seed(1)
    other = answering(weights.build(net, SPEC))
    sample = crafted("corner", 1, 5)
    sample.tokens = np.insert(sample.tokens, 3, AUDIO)
    sample.answer_at, sample.sounds = sample.answer_at + 1, crafted("moment", 1, 5).sounds
    label: dict[str, Any] = {"label": "ne"}
    text: dict[str, Any] = {"text": "ab"}
    found = explain(other, sample, **(label if of == "label" else text))
    assert found.complete and set(found.by_modality) == {"text", "image", "audio", "fields"}
    assert all(value for value in found.by_modality.values())
    one_sequence = form.get("fusion", "concat") in ("concat", "adversarial")
    assert found.rolled_out == (one_sequence and form.get("layout") != "encoder_decoder")
    if of == "label":
        assert np.exp(found.score) == pytest.approx(other.answer([sample])[0].label_scores["ne"], rel=1e-3)


def test_on_a_fixed_scale_a_picture_says_nothing_in_its_mean_colour():
    assert SPEC.image is not None
    spec = SPEC.model_copy(update={"image": SPEC.image.model_copy(update={"scale": "fixed"})})
    torch.manual_seed(1)
    other = answering(weights.build(ModelConfig(width=32, layers=1, heads=2), spec), spec)
    sample, plain = crafted("corner", 1, 5), crafted("corner", 1, 5)
    plain.images = [np.full_like(sample.images[0], 60)]
    found = explain(other, sample, label="ne")
    assert found.complete and found.by_modality["image"]
    nothing = explain(other, plain, label="ne")  # of one colour: the way is a point
    assert nothing.complete and nothing.by_modality["image"] == pytest.approx(0, abs=1e-6)


def test_too_few_steps_are_made_more(answerer: Any):
    found = explain(answerer, crafted("corner", 1, 6), steps=2)
    assert found.complete and found.steps > 2


def test_pixels_sum_to_what_the_embedded_patches_get_by_hand(answerer: Any):
    """The same integral over the embedded patches, without Captum, on 64 points of our own."""
    sample = crafted("corner", 3, 4)
    found = explain(answerer, sample)
    picture = next(part for part in found.parts if isinstance(part, PicturePart))
    net, batch = answerer.model, collate([sample], SPEC)
    tokens = batch.tokens_BT[0]
    letters = (tokens >= 9) & batch.prompt_BT[0]
    ends: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.no_grad():
        own = net.tokens(tokens)
        ends["tokens"] = (torch.where(letters[:, None], net.tokens.weight[0], own), own)
        zero = torch.zeros_like(batch.patches_PD)
        ends["image"] = (net.image(zero, batch.patch_at_P), net.image(batch.patches_PD, batch.patch_at_P))
        rows = field_rows(SPEC)
        missing = net.fields(torch.ones(1, 1), torch.tensor([rows[("age", "missing")]]))
        ends["fields"] = (missing, net.fields(batch.values_K[:, None], batch.value_at_K))
    points, shares = np.polynomial.legendre.leggauss(64)
    sums = torch.zeros_like(ends["image"][0])
    for point, share in zip((points + 1) / 2, shares / 2, strict=True):
        here = {name: (a + float(point) * (b - a)).requires_grad_() for name, (a, b) in ends.items()}
        handles = [
            getattr(net, name).register_forward_hook(lambda _, __, made, x=x: torch.cat([x, made[len(x) :]]))
            for name, x in here.items()
        ]
        score = net(batch).label_RC[0, :5].log_softmax(-1)[3]
        for handle in handles:
            handle.remove()
        sums += float(share) * torch.autograd.grad(score, here["image"])[0]
    by_hand = (sums * (ends["image"][1] - ends["image"][0])).sum(-1).view(4, 4)
    assert np.allclose(picture.patches, by_hand.numpy(), atol=2e-3)
    assert picture.pixels_HW is not None
    assert np.allclose(picture.pixels_HW.reshape(4, 4, 4, 4).sum((1, 3)), picture.patches, atol=1e-6)


def one(task: str = "word") -> Batch:
    return collate([crafted(task, 0, 3)], SPEC)


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@torch.no_grad()
def test_recorded_probabilities_are_those_of_the_formula(attention: Literal["causal", "prefix"]):
    """softmax(QKᵀ/√d) with the mask written out, from the queries and keys that the layer really makes."""
    net, batch = model(attention).eval(), one()
    recorded = probabilities(net, batch)
    layer: Any = net.blocks[0].attention  # type: ignore[union-attr]
    seen: list[torch.Tensor] = []
    handle = layer.qkv.register_forward_hook(lambda _, __, made: seen.append(made))
    net(batch)
    handle.remove()
    L = len(seen[0])
    q, k, _ = seen[0].view(L, 3, 2, 16).unbind(1)
    angle = torch.arange(L)[:, None, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)

    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    scores = torch.einsum("inh,jnh->inj", turned(q), turned(k)) / 4
    hidden = ~torch.ones(L, L, dtype=torch.bool).tril()
    if net.config.attention == "prefix":
        hidden &= ~(batch.prompt_BT[0][:, None] & batch.prompt_BT[0][None])
    wanted = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    assert torch.allclose(recorded[0], wanted, atol=1e-5)
    assert len(recorded) == 2


@torch.no_grad()
def test_roll_out_is_the_product_of_the_layers(answerer: Any):
    batch = one()
    first, second = (p.mean(1) for p in probabilities(answerer.model, batch))
    eye = torch.eye(len(first))
    rolled = roll_out(answerer.model, batch)
    assert rolled is not None
    assert torch.allclose(rolled, (second + eye) / 2 @ ((first + eye) / 2), atol=1e-6)
    assert torch.allclose(rolled.sum(1), torch.ones(len(first)), atol=1e-5)


def test_explaining_leaves_the_model_as_it_was(answerer: Any):
    batch = one("corner")
    before = answerer.model(batch).label_RC
    explain(answerer, crafted("corner", 0, 2))
    assert torch.equal(before, answerer.model(batch).label_RC)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in answerer.model.modules())


def test_a_text_is_explained_by_the_probability_of_its_tokens(answerer: Any):
    found = explain(answerer, crafted("word", 1, 2), text="abc")
    assert found.of == "text" and found.complete and found.score < 0
    assert [part.text for part in found.parts if isinstance(part, TextPart)][-1:] != ["c"], "the answer is no question"


TOKENIZERS: dict[str, tuple[Any, Any, Any, list[str]]] = {
    "WordPiece": (
        models.WordPiece({w: i for i, w in enumerate(["[UNK]", "a", "bad", "film", "##ly", "."])}, unk_token="[UNK]"),
        pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), ["a", " bad", "ly", " film", "."],
    ),
    "Metaspace": (
        models.Unigram([("<unk>", 0.0), *((w, -1.0) for w in ("▁a", "▁bad", "ly", "▁film", "."))], unk_id=0),
        pre_tokenizers.Metaspace(), decoders.Metaspace(), ["a", " bad", "ly", " film", "."],
    ),
    "bytes": (
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []),
        pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), list("a badly film."),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_words_of_an_explanation_read_as_the_text_does(kind: str):
    inner, cut, decoder, parts = TOKENIZERS[kind]
    made = HFTokenizer(inner)
    made.pre_tokenizer, made.decoder = cut, decoder
    tokenizer = Tokenizer(made.to_str())
    spec = SPEC.model_copy(update={"vocab_size": tokenizer.vocab_size, "tokenizer_digest": tokenizer.digest})
    torch.manual_seed(0)
    other = answering(weights.build(ModelConfig(width=32, layers=1, heads=2), spec), spec)
    other.tokenizer = tokenizer

    def said(text: str) -> list[TextPart]:
        tokens = [BOS, *tokenizer.encode(text), ANSWER]
        found = explain(other, Sample("t", "word", np.array(tokens, np.int32), len(tokens) - 1), label="w0")
        return [part for part in found.parts if isinstance(part, TextPart)]

    assert [part.text for part in said("a badly film.")] == parts
    if kind == "bytes":
        assert [(part.text, part.tokens) for part in said("好 é")] == [("好", 3), (" ", 1), ("é", 2)]


def test_every_figure_is_in_the_json_and_every_part_in_the_words(answerer: Any):
    found = explain(answerer, crafted("corner", 2, 1))
    data = explain_page.as_json(found)
    assert data["completeness"]["complete"] and set(data["by_modality"]) == {"text", "image", "fields"}
    kinds = [part["kind"] for part in data["parts"]]
    assert kinds == ["text", "image", "fields", *["text"] * 5]
    assert np.array(data["parts"][1]["patches"]).shape == (4, 4)
    shares = [np.sum(part["rollout"]) for part in data["parts"]]
    assert 0.5 < sum(shares) <= 1  # the rest is at the marks
    said = explain_page.words(found).plain
    assert "row 4, column 1" in said and "age = " in said
    assert any(isinstance(part, FieldPart) for part in found.parts)


def test_a_question_of_which_nothing_is_read_is_refused():
    """A cnn reads no text."""
    torch.manual_seed(0)
    net = weights.build(CnnConfig(channels=(8,), width=16), SPEC).eval()
    words = Sample("w", "word", np.array([BOS, 9, 10, ANSWER], np.int32), 3, label="w0")
    with pytest.raises(DataError, match=r"reads nothing of this question.*CnnModel"):
        explain(answering(net), words, label="w0")


@pytest.mark.parametrize("has_text", [False, True])
def test_an_encoder_has_its_classes_explained_and_no_text(has_text: bool):
    """Its head decides as well where a task has texts beside its classes."""
    tasks = [TaskSpec(name="corner", labels=TASKS["corner"], has_text=has_text)]
    spec, sample = SPEC.model_copy(update={"tasks": tasks}), crafted("corner", 0, 1)
    torch.manual_seed(0)
    other = answering(weights.build(ModelConfig(width=32, layers=1, heads=2, layout="encoder"), spec), spec)
    with pytest.raises(ConfigError, match=r"writes nothing.*wanted a class of the task corner: nw, ne.*--label"):
        explain(other, sample, text="abc")
    found = explain(other, sample)
    assert found.of == "label" and found.complete and found.answer == other.answer([sample])[0].label


def test_a_set_of_classes_is_explained_by_its_probability_whatever_they_are_called():
    """As printed, "fast, cheap" looks like two classes."""
    tasks = [TaskSpec(name="corner", labels=["cheap", "fast, cheap", "good"], multiple=True)]
    spec, sample = SPEC.model_copy(update={"tasks": tasks}), crafted("corner", 0, 1)
    torch.manual_seed(0)
    other = answering(weights.build(ModelConfig(width=32, layers=1, heads=2), spec), spec)
    with torch.no_grad():
        other.model.label.bias.copy_(torch.tensor([-4.0, 4.0, 4.0]))
    answer = other.answer([sample])[0]
    found = explain(other, sample)
    assert (found.of, found.answer, answer.labels) == ("labels", "fast, cheap, good", ["fast, cheap", "good"])
    assert found.complete and np.exp(found.score) == pytest.approx(answer.score, rel=1e-3)


def test_a_text_of_a_cnn_is_not_explained():
    net = weights.build(CnnConfig(channels=(8,), width=16), SPEC)
    with pytest.raises(ConfigError, match=r"writes nothing \(CnnModel\).*--label"):
        explain(answering(net), crafted("corner", 0, 1), text="abc")


def test_a_model_without_words_is_given_no_choices():
    net = weights.build(CnnConfig(channels=(8,), width=16), SPEC)
    with pytest.raises(ConfigError, match=r"writes nothing \(CnnModel\)"):
        answering(net).answer([crafted("corner", 0, 1)], generation=GenerationConfig(choices=("nw", "se")))


def test_what_cannot_be_explained_is_said(answerer: Any, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="no class 'x'"):
        explain(answerer, crafted("corner", 2, 1), label="x")
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    with pytest.raises(ConfigError, match=r"mmlm-workflows\[explain\]"):
        explain(answerer, crafted("corner", 2, 1))
