"""Models as folders that transformers reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

from mmlm.cli import main
from mmlm.data.collate import collate, field_rows
from mmlm.errors import ArtifactError
from mmlm.features import spec as feature_spec
from mmlm.features.sample import Sample
from mmlm.features.spec import ANSWER, BOS, IMAGE, FeatureSpec, ImageSpec
from mmlm.features.text import Tokenizer
from mmlm.model.config import ModelConfig
from mmlm.publish import exported_tokenizer
from mmlm.publish.export import export
from mmlm.train import weights
from tests.model.texts import logits_of
from tests.publish.conftest import QUESTIONS, World
from tests.small import SPEC, sample

transformers = pytest.importorskip("transformers")


def checkpoint(world: World, folder: Path, config: ModelConfig) -> Path:
    folder.mkdir()
    torch.manual_seed(3)
    model = weights.build(config, feature_spec.load(world.shards.path))
    weights.save_model(folder, model.state_dict(), config, world.shards.path)
    return folder


@pytest.mark.parametrize("max_file", [1 << 30, 20_000])
def test_the_exported_trunk_answers_in_transformers_as_it_does_here(world: World, tmp_path: Path, max_file: int):
    config = ModelConfig(width=32, layers=2, heads=4, kv_heads=2, qk_norm=True, tied=True)
    source = checkpoint(world, tmp_path / "model", config)
    made = export(str(source), tmp_path / "hf", "llama", max_file=max_file)
    assert made.words().endswith("left out: audio, image, label") and made.architecture == "Qwen3ForCausalLM"
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) == 1 if max_file > 1e6 else len(files) > 2
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    spec = feature_spec.load(source)
    asked = [{"role": "user", "content": QUESTIONS[1]}]
    ids = tokenizer.apply_chat_template(asked, return_tensors="pt", return_dict=True)["input_ids"]
    assert ids[0].tolist() == [BOS, *Tokenizer.load(source).encode(QUESTIONS[1]), ANSWER]
    here = weights.load_model(source, spec).eval()
    with torch.no_grad():
        assert torch.allclose(net(ids).logits[0], logits_of(here, ids[0], spec), atol=1e-5)
        said = net.generate(ids, max_new_tokens=4)[0]
        for end in range(ids.shape[1], len(said)):
            assert said[end] == logits_of(here, said[:end], spec)[-1].argmax()


def test_the_command_writes_all_forms_and_says_what_is_wrong(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = str(checkpoint(world, tmp_path / "model", ModelConfig(width=16, layers=1, heads=2, attention="prefix")))
    assert (
        main(["export", source, "--to", str(tmp_path / "all"), "--format", "safetensors", "--dtype", "bfloat16"]) == 0
    )
    assert "FusedTransformer" in capsys.readouterr().out
    spec = feature_spec.load(tmp_path / "all")
    assert weights.load_model(tmp_path / "all", spec).config.attention == "prefix"
    assert json.loads((tmp_path / "all" / "config.json").read_text())["width"] == 16
    assert main(["export", source, "--to", str(tmp_path / "no"), "--format", "llama"]) == 2
    assert "attend in both directions" in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if p.name not in ("model", "all")]
    with pytest.raises(ArtifactError, match="is there already; wanted a new folder"):
        export(source, tmp_path / "all", "safetensors")


CODE = """
import json, sys, torch, transformers
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
sys.modules["mmlm"] = None  # as where it is not installed
net = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
media = {key: torch.tensor(value) for key, value in json.loads(sys.argv[3]).items()}
with torch.no_grad():
    made = net(ids, attention_mask=(ids != 0), **media)
    said = net.generate(ids[1:], attention_mask=(ids != 0)[1:], max_new_tokens=3)
transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
found = [made.logits.tolist(), made.label_logits.tolist(), said.tolist()]
open("found.json", "w").write(json.dumps(found))
"""


def test_the_whole_model_comes_with_its_code(world: World, tmp_path: Path):
    """In a process that does not know mmlm: logits and classes with a picture, and without, padded."""
    source = checkpoint(world, tmp_path / "model", ModelConfig(width=32, layers=2, heads=4, attention="prefix"))
    assert export(str(source), tmp_path / "hf", "hf").architecture == "MmlmForConditionalGeneration"
    spec = feature_spec.load(source)
    net = weights.load_model(source, spec).eval()
    samples = [sample_of(spec, picture=True), sample_of(spec, picture=False)]
    batch = collate(samples, spec, pad_left=True, with_answer=False)
    with torch.no_grad():
        x_XD = net.trunk(batch)
        logits, label = net.answer(x_XD), net(batch).label_RC
    media = {"patches": batch.patches_PD.tolist(), "patch_at": batch.patch_at_P.tolist()}
    arguments = [str(tmp_path / "hf"), json.dumps(batch.tokens_BT.tolist()), json.dumps(media)]
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    code = tmp_path / "code.py"
    code.write_text(CODE)
    done = subprocess.run(
        [sys.executable, str(code), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, classes, said = (torch.tensor(part) for part in json.loads((tmp_path / "found.json").read_text()))
    assert torch.allclose(theirs[batch.valid_BT], logits, atol=1e-5) and torch.allclose(classes, label, atol=1e-5)
    assert not theirs[~batch.valid_BT].any() and said.shape[1] > batch.tokens_BT.shape[1]


@pytest.mark.parametrize("scale", ["relative", "fixed"])
@pytest.mark.parametrize("padding", ["keep", "drop"])
def test_the_exported_model_makes_of_a_picture_what_it_was_trained_on(scale: str, padding: str):
    from mmlm.model.huggingface.modeling import MmlmConfig, MmlmForConditionalGeneration  # with transformers alone

    image = ImageSpec.model_validate({"size": 16, "patch": 4, "channels": 3, "scale": scale, "padding": padding})
    spec = SPEC.model_copy(update={"image": image})
    settings = {"model": ModelConfig(width=32, heads=2, layers=1).model_dump(), "spec": spec.model_dump(mode="json")}
    net = MmlmForConditionalGeneration(MmlmConfig(**settings, field_rows=len(field_rows(spec))))
    picture = np.full((16, 16, 3), 200, np.uint8)
    picture[4:12] = np.random.default_rng(0).integers(0, 256, (8, 16, 3))
    asked = sample(1, ("image",))
    asked.images = [picture]
    wanted = collate([asked], spec)
    patches, at = net.picture_patches(torch.from_numpy(picture))
    assert torch.equal(at, wanted.patch_at_P) and len(at) == (16 if padding == "keep" else 8)
    assert torch.allclose(patches, wanted.patches_PD, atol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(8, 8, 3\); wanted \(16, 16, 3\)"):
        net.picture_patches(torch.zeros(8, 8, 3, dtype=torch.uint8))


def sample_of(spec: FeatureSpec, *, picture: bool) -> Sample:
    tokens = [BOS, *([IMAGE] if picture else []), 20, 21, 22, ANSWER]
    images = [np.full((spec.image.size, spec.image.size, 1), 77, np.uint8)] if picture and spec.image else []
    return Sample("s", "digit", np.array(tokens, np.int32), len(tokens) - 1, images=images)


def test_a_given_tokenizer_says_the_same_ids_in_the_exported_folder(tmp_path: Path):
    inner = HFTokenizer(models.Unigram([("<unk>", 0.0), ("\u2581a", -1.0), ("b", -2.0), ("ab", -3.0)], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    for given in (inner.to_str(), WORDS):
        tokenizer = Tokenizer(given)
        spec = FeatureSpec(vocab_size=tokenizer.vocab_size, tokenizer_digest="", max_len=9, tasks=[])
        for last in (False, True):
            exported_tokenizer.write(tokenizer, spec, tmp_path, marks_last=last)
            read = transformers.AutoTokenizer.from_pretrained(tmp_path)
            ids = read("a bab b", add_special_tokens=False)["input_ids"]
            assert [i + (9 if last else 0) for i in ids] == tokenizer.encode("a bab b")
            assert read.convert_tokens_to_ids("<|mmlm_answer|>") == ANSWER + (spec.vocab_size - 9 if last else 0)
            assert len(read) == spec.vocab_size


WORDS = json.dumps(
    {
        "version": "1.0", "added_tokens": [{"id": 0, "content": "[UNK]", "single_word": False, "lstrip": False,
        "rstrip": False, "normalized": False, "special": True}], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1, "b": 2}, "unk_token": "[UNK]"},
    }
)  # fmt: skip
