"""`generate` of the exported model with its cache, against whole passes and against mmlm's own generation."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from mmlm.config import parse
from mmlm.data.collate import Batch, collate, field_rows
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, EOS, PAD, SPECIAL_TOKENS, FeatureSpec
from mmlm.model.baseline_config import CONFIGS
from mmlm.model.generation import generate
from mmlm.model.layouts import EncoderDecoder
from mmlm.train import weights
from tests.publish.test_exported_kinds import GIVEN, KINDS, ends_somewhere, inputs, kinds, shards
from tests.small import sample

transformers = pytest.importorskip("transformers")
MARKS = [n for n in range(len(SPECIAL_TOKENS)) if n != EOS]
MORE = 10
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.7, "num_return_sequences": 3},
}


class Model(NamedTuple):
    net: Any
    theirs: Any
    """The same as the class that is exported."""
    spec: FeatureSpec
    samples: list[Sample]

    def batch(self, *, left: bool) -> Batch:
        return collate(self.samples, self.spec, pad_left=left, with_answer=False)

    def says(self, given: dict[str, Any], **how: Any) -> Any:
        torch.manual_seed(0)
        ids = {"suppress_tokens": MARKS, "eos_token_id": EOS, "pad_token_id": PAD}
        return self.theirs.generate(**given, **{"max_new_tokens": MORE, **how}, **ids)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    from mmlm.model.huggingface.modeling import MmlmConfig, MmlmForConditionalGeneration  # with transformers

    spec = shards(tmp_path_factory.mktemp("cache") / "shards", False)
    samples, made = [sample(n, given) for n, given in enumerate(GIVEN)], {}
    for name in [parameter.values[0] for parameter in kinds(silent=False)]:
        kind = KINDS[name].get("kind", "transformer")
        sizes = {"width": 32, "layers": 2} | ({"heads": 4} if kind == "transformer" else {})
        torch.manual_seed(3)
        net = weights.build(parse(CONFIGS[kind], {**sizes, **KINDS[name]}, "test"), spec).eval()
        ends_somewhere(net, collate(samples, spec, pad_left=True, with_answer=False))
        settings = {"model": net.config.model_dump(mode="json"), "spec": spec.model_dump(mode="json")}
        rows, words = len(field_rows(spec)), spec.vocab_size
        theirs = MmlmForConditionalGeneration(MmlmConfig(**settings, field_rows=rows, vocab_size=words))
        theirs.net.load_state_dict(net.state_dict())
        made[name] = Model(net, theirs.eval(), spec, samples)
    return made


@pytest.fixture
def model(name: str, models: dict[str, Model]) -> Model:
    return models[name]


def more_ids(model: Model, count: int) -> torch.Tensor:
    return torch.randint(
        len(SPECIAL_TOKENS), model.spec.vocab_size, (len(GIVEN), count), generator=torch.manual_seed(1)
    )


@pytest.mark.parametrize("name", kinds(silent=False))
@pytest.mark.parametrize("left", [True, False])
def test_a_step_with_the_cache_says_what_a_whole_pass_says(model: Model, left: bool):
    given, new = inputs(model.batch(left=left)), more_ids(model, 4)
    mask = given["attention_mask"]
    with torch.no_grad():
        made = model.theirs(**given)
        cache, B = made.past_key_values, len(new)
        assert made.label_logits.shape[0] == B
        for n in range(new.shape[1]):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = model.theirs(new[:, n : n + 1], attention_mask=mask, past_key_values=cache)
            assert step.past_key_values is cache and cache.blocks and step.label_logits is None
            ids = torch.cat([given["input_ids"], new[:, : n + 1]], 1)
            whole = model.theirs(**{**given, "input_ids": ids, "attention_mask": mask}, use_cache=False)
            assert whole.past_key_values is None
            assert torch.allclose(step.logits[:, 0], whole.logits[:, -1], atol=1e-5)
            assert whole.logits[:, -1].std(0).max() > 1e-3  # what is given matters


@pytest.mark.parametrize("name", kinds(silent=False))
def test_the_mark_that_ends_a_question_may_come_as_a_step(model: Model):
    """With it a question is read in both directions, where the model does so; what was kept was not."""
    given = inputs(model.batch(left=True))
    mask, ids = given["attention_mask"], given["input_ids"]
    if isinstance(model.net, EncoderDecoder):
        pytest.skip("it asks for the mark in the prompt")
    with torch.no_grad():
        made = model.theirs(**{**given, "input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]})
        step = model.theirs(ids[:, -1:], attention_mask=mask, past_key_values=made.past_key_values)
        whole = model.theirs(**given, use_cache=False)
    assert torch.allclose(step.logits[:, -1], whole.logits[:, -1], atol=1e-5)


@pytest.mark.parametrize("name", kinds(silent=False))
def test_generate_says_the_same_with_the_cache_on_whichever_side_is_padded(model: Model):
    left, right = (inputs(model.batch(left=side)) for side in (True, False))
    T = left["input_ids"].shape[1]
    for way, how in WAYS.items():
        said = model.says(left, **how)
        assert torch.equal(said, model.says(left, **how, use_cache=False)), way
        assert torch.equal(said[:, T:], model.says(right, **how)[:, T:]), way
        assert torch.equal(said[:, T:], model.says(right, **how, use_cache=False)[:, T:]), way
    mine = generate(model.net, model.batch(left=True), limit=MORE).ids
    likeliest = model.says(left, do_sample=True, top_k=1, num_return_sequences=3)[:, T:].tolist()
    for n, answer in enumerate(likeliest):  # each of a record's three has the record's media
        whole = mine[n // 3] if len(mine[n // 3]) == MORE else [*mine[n // 3], EOS]
        assert answer[: len(whole)] == whole


@pytest.mark.parametrize("name", [name for name in KINDS if name in ("encoder_decoder", "add", "lstm")])
def test_what_is_more_than_a_token_is_read_from_whole_sequences(name: str, model: Model):
    """Several tokens at once, a crop, another order of the sequences, another mask: as if all had been given at once."""
    given, new = inputs(model.batch(left=True)), more_ids(model, 5)
    mask, order = given["attention_mask"], torch.tensor([3, 0, 0, 4, 2])
    sorted_ = collate([model.samples[n] for n in order], model.spec, pad_left=True, with_answer=False)
    assert torch.equal(sorted_.tokens_BT, given["input_ids"][order])

    def whole(batch: dict[str, torch.Tensor], new: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([batch["input_ids"], new], 1)
        wide = torch.nn.functional.pad(batch["attention_mask"], (0, new.shape[1]), value=1)
        return model.theirs(**{**batch, "input_ids": ids, "attention_mask": wide}, use_cache=False).logits

    with torch.no_grad():
        cache = model.theirs(**given).past_key_values
        at_once = model.theirs(new[:, :3], past_key_values=cache)
        assert torch.allclose(at_once.logits, whole(given, new[:, :3])[:, -3:], atol=1e-5)
        cache.crop(-2)
        assert cache.get_seq_length() == mask.shape[1] + 1
        cache.reorder_cache(order)
        step = model.theirs(new[order, 1:2], past_key_values=cache)
        assert torch.allclose(step.logits[:, 0], whole(inputs(sorted_), new[order, :2])[:, -1], atol=1e-5)
        holes = torch.cat([mask[order], torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 1, 1]])], 1)
        masked = model.theirs(new[order, 2:3], attention_mask=holes, past_key_values=cache).logits
        ids = torch.cat([inputs(sorted_)["input_ids"], new[order, :3]], 1)
        wanted = model.theirs(**{**inputs(sorted_), "input_ids": ids, "attention_mask": holes}).logits
        assert torch.allclose(masked[:, 0], wanted[:, -1], atol=1e-5) and not masked[1].any()


@pytest.mark.parametrize("name", ["encoder_decoder", "add"])
def test_other_ways_of_generating_end_in_the_same_words(name: str, model: Model):
    """Candidates that are taken back, a start of the answer that is given, a talk that goes on from its cache."""
    batch = collate(model.samples[:1], model.spec, with_answer=False)
    given = inputs(batch)
    said = model.says(given)
    assert torch.equal(model.says(given, prompt_lookup_num_tokens=3), said)
    assert torch.equal(model.says(given, assistant_model=model.theirs), said)
    begun = {**given, "input_ids": said[:, :-4], "attention_mask": torch.ones_like(said[:, :-4])}
    assert torch.equal(model.says(begun, max_new_tokens=4), said)
    first = model.says(given, max_new_tokens=3, return_dict_in_generate=True)
    again = {**given, "input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    assert torch.equal(model.says(again, max_new_tokens=MORE - 3, past_key_values=first.past_key_values), said)


def test_what_is_no_cache_of_this_model_is_refused(models: dict[str, Model]):
    model = models["add"]
    given = inputs(model.batch(left=True))
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache; wanted what `model"):
        model.says(given, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation 'static'; wanted none"):
        model.says(given, cache_implementation="static")
    with pytest.raises(ValueError, match="prefill_chunk_size; wanted none"):
        model.says(given, prefill_chunk_size=4)
    with torch.no_grad():
        cache = model.theirs(**given).past_key_values
    new = more_ids(model, 1)
    with pytest.raises(ValueError, match="2 sequences go on from a cache of 5; wanted as many"):
        model.theirs(new[:2], past_key_values=cache)
    with pytest.raises(ValueError, match="an attention_mask of 3 positions for "):
        model.theirs(new, attention_mask=torch.ones(5, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="media or labels where a cache goes on"):
        model.theirs(**{**given, "input_ids": new, "attention_mask": None}, past_key_values=cache)
    with pytest.raises(ValueError, match=r"crop\(2\); wanted 0, or a negative number"):
        cache.crop(2)
    with pytest.raises(ValueError, match=r"\d+ rows of patches for \d+ slots; wanted one for each"):
        model.says({**given, "patches": given["patches"][1:]}, num_beams=2)
    cache.reset()
    assert cache.get_seq_length() == 0 and ANSWER in given["input_ids"]


def test_where_there_are_gradients_nothing_is_kept_unless_asked(models: dict[str, Model]):
    given = inputs(models["add"].batch(left=True))
    assert models["add"].theirs(**given).past_key_values is None
    assert models["add"].theirs(**given, use_cache=True).past_key_values is not None
    with torch.no_grad():
        assert models["add"].theirs(**given, labels=given["input_ids"]).past_key_values is None


def test_few_of_the_logits_are_those_of_the_last_positions(models: dict[str, Model]):
    left, right = (inputs(models["add"].batch(left=side)) for side in (True, False))
    with torch.no_grad():
        last = models["add"].theirs(**left).logits[:, -2:]
        for given in (left, right):
            assert torch.allclose(models["add"].theirs(**given, logits_to_keep=2).logits, last, atol=1e-6)
