from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from mmlm.artifacts import Artifact
from mmlm.corpus.records import Part, Record, Target, read_records, read_rows
from mmlm.errors import ConfigError, DataError, LaunchError
from mmlm.features.spec import load as load_spec
from mmlm.features.text import Tokenizer
from mmlm.shards import plan
from mmlm.shards.codec import pack, sample_key, unpack
from mmlm.shards.config import ShardConfig
from mmlm.shards.reaper import TAG, tagged
from mmlm.shards.shard import shard
from tests.shards.conftest import CONFIG, make_records, shas, write_manifest, write_wav


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Artifact, Path]:
    root = tmp_path_factory.mktemp("corpus")
    return write_manifest(root / "manifest", make_records(root / "data")), root / "data"


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory) -> Artifact:
    manifest, data = corpus
    return shard(CONFIG, manifest, data=data, out=tmp_path_factory.mktemp("out") / "shards")


def test_every_record_is_in_a_shard_once(corpus, shards: Artifact) -> None:
    counts = shards.counts
    assert counts["records"] == counts["samples"] == 45
    assert (counts["quarantined"], counts["shards"], counts["workers"]) == (0, 5, 1)
    rows = pq.read_table(shards.path / "manifest.parquet").to_pylist()
    assert [(row["split"], row["samples"]) for row in rows] == [("test", 10), ("test", 5), *[("train", 10)] * 3]
    keys = []
    for row in rows:
        with tarfile.open(shards.path / row["path"]) as tar:
            keys += [name.partition(".")[0] for name in tar.getnames()]
    assert set(keys) == {sample_key(record.id) for record in read_records(corpus[0].path)}
    left = {
        path.name
        for path in shards.path.iterdir()
        if path.suffix != ".tar" and not path.name.endswith(".index.parquet")
    }
    assert left - {".lock"} == {
        "artifact.json", "manifest.parquet", "quarantine.parquet", "feature_spec.json", "tokenizer.json",
            "corpus.html",
    }  # fmt: skip


def test_the_tars_are_plain_and_carry_no_trace_of_their_making(shards: Artifact) -> None:
    for path in shards.path.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        names = [member.name for member in members]
        for member in members:
            assert member.isreg()
            assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
            assert not member.pax_headers
        by_key: dict[str, list[str]] = {}
        for name in names:
            by_key.setdefault(name.partition(".")[0], []).append(name)
        assert all(group == sorted(group) for group in by_key.values())
        assert [name for group in by_key.values() for name in group] == names


def test_the_figures_of_a_shard_are_those_of_its_samples(shards: Artifact) -> None:
    for row in pq.read_table(shards.path / "manifest.parquet").to_pylist():
        stored: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shards.path / row["path"]) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                stored.setdefault(key, {})[ending] = tar.extractfile(member).read()  # type: ignore[union-attr]
        samples = [unpack(one) for one in stored.values()]
        assert row["samples"] == len(samples)
        assert row["images"] == sum(len(sample.images) for sample in samples)
        assert row["sounds"] == sum(len(sample.sounds) for sample in samples)
        assert row["audio_frames"] == sum(len(mel) for sample in samples for mel in sample.sounds)
        assert row["tokens"] == sum(len(sample.tokens) for sample in samples)
        for kind in ("image", "audio"):
            held = sum(len(data) for one in stored.values() for name, data in one.items() if name.startswith(kind))
            assert row[f"{kind}_bytes"] == held
            assert (held > 0) == (row["images" if kind == "image" else "sounds"] > 0)
        assert (shards.path / row["path"]).stat().st_size == row["bytes"]


def test_the_stock_reader_reads_them(shards: Artifact) -> None:
    tars = [str(path) for path in sorted(shards.path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len(samples) == len({sample["__key__"] for sample in samples}) == 45
    spec, tokenizer = load_spec(shards.path), Tokenizer.load(shards.path)
    for stored in samples:
        sample = unpack({name: content for name, content in stored.items() if not name.startswith("__")})
        assert stored["__key__"] == sample_key(sample.id)
        assert tokenizer.decode(sample.tokens[sample.answer_at :]) == sample.label
        assert spec.image and spec.audio
        assert all(image.shape == (16, 16, 1) for image in sample.images)
        assert all(sound.shape[1] == 40 and len(sound) <= spec.audio.max_frames for sound in sample.sounds)


def test_pack_and_unpack_are_inverse(shards: Artifact) -> None:
    from mmlm.data.reader import ShardReader

    for codec in ("png", "webp"):
        for sample in ShardReader(shards.path, ("train", "test")):
            sample.images = [np.repeat(image, 3, axis=2) if codec == "webp" else image for image in sample.images]
            again = unpack(pack(sample, codec))  # type: ignore[arg-type]
            np.testing.assert_array_equal(again.tokens, sample.tokens)
            for one, other in zip([*again.images, *again.sounds], [*sample.images, *sample.sounds], strict=True):
                np.testing.assert_array_equal(one, other)
            assert (again.id, again.context_spans, again.label) == (sample.id, sample.context_spans, sample.label)


def test_a_sample_is_never_unpickled(shards: Artifact) -> None:
    import io

    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError):
        unpack({"json": b"{}", "tokens.npy": out.getvalue()})


def test_a_second_call_does_nothing(corpus, shards: Artifact) -> None:
    before = {path: path.stat().st_mtime_ns for path in shards.path.iterdir()}
    again = shard(CONFIG, corpus[0], data=corpus[1], out=shards.path)
    assert again.digest == shards.digest
    assert {path: path.stat().st_mtime_ns for path in shards.path.iterdir()} == before


def test_the_same_corpus_elsewhere_gives_the_same_shards(shards: Artifact, tmp_path: Path) -> None:
    records = make_records(tmp_path / "moved/deeper")
    manifest = write_manifest(tmp_path / "manifest", records)
    other = shard(CONFIG, manifest, data=tmp_path / "moved/deeper", out=tmp_path / "shards")
    assert shas(other.path) == shas(shards.path)
    assert other.digest == shards.digest


def test_ids_of_units_follow_records_and_recipe(corpus, shards: Artifact) -> None:
    spec = load_spec(shards.path)

    def ids(config: ShardConfig) -> list[str]:
        return [slot.unit_id for slot in plan.plan(corpus[0].path, config, spec)]

    webp = CONFIG.model_copy(update={"image_codec": "webp"})
    assert ids(CONFIG) == ids(CONFIG)
    assert not set(ids(CONFIG)) & set(ids(webp))
    assert len(ids(CONFIG.model_copy(update={"shard_records": 4}))) == 4 + 8
    small = CONFIG.model_copy(update={"shard_bytes": 1 << 16})
    assert len(ids(small)) > len(ids(CONFIG))
    slots = plan.plan(corpus[0].path, small, spec)
    units = list(plan.read_units(corpus[0].path, slots))
    assert sorted(row["id"] for unit in units for row in unit.rows()) == sorted(
        row["id"] for row in read_rows(corpus[0].path)
    )
    assert [len(list(unit.rows())) for unit in units] == [unit.slot.records for unit in units]


def test_failing_samples_go_to_quarantine_with_a_reason(tmp_path: Path) -> None:
    data = tmp_path / "data"
    records = make_records(data, 40)
    (data / "broken.png").write_bytes(b"\x89PNG broken")
    whole = (data / "0.png").read_bytes()
    (data / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (9000, 9000)).save(data / "bomb.png")
    write_wav(data / "none.wav", np.zeros(0))

    def bad(name: str, *parts: Part) -> Record:
        return Record(
            name, (Part("text", text="?"), *parts), "digit", Target(label="1"), split="train", source="keypad.jsonl"
        )

    records += [
        bad("x1", Part("image", uri="broken.png")), bad("x2", Part("image", uri="half.png")),
        bad("x3", Part("image", uri="bomb.png")), bad("x4", Part("audio", uri="none.wav")),
        bad("x5", Part("image", uri="gone.png")), bad("x6", Part("text", "context", "word " * 200)),
        bad("x7", Part("image", uri="../secret.png")),
    ]  # fmt: skip
    made = shard(CONFIG, write_manifest(tmp_path / "manifest", records), data=data, out=tmp_path / "shards")
    rows = {row["id"]: row for row in pq.read_table(made.path / "quarantine.parquet").to_pylist()}
    assert {name: row["reason"] for name, row in rows.items()} == {
        "x1": "unreadable_image", "x2": "unreadable_image", "x3": "bomb", "x4": "empty_sound",
        "x5": "missing_file", "x6": "too_long", "x7": "missing_file",
    }  # fmt: skip
    assert rows["x1"]["source"] == "broken.png"
    assert rows["x6"]["source"] == "keypad.jsonl"
    assert made.counts["records"] == 47 == made.counts["samples"] + made.counts["quarantined"]
    assert made.counts["quarantine_reasons"]["unreadable_image"] == 2


def test_too_many_failures_stop_the_run_and_are_tried_again(tmp_path: Path) -> None:
    data = tmp_path / "data"
    records = make_records(data, 30)
    pictures = sorted(data.glob("*.png"))
    kept = {path: path.read_bytes() for path in pictures}
    for path in pictures:
        path.write_bytes(b"ruined")
    manifest = write_manifest(tmp_path / "manifest", records)
    with pytest.raises(DataError, match=r"unreadable_image.*\.png.*20\.0%") as caught:
        shard(CONFIG, manifest, data=data, out=tmp_path / "shards")
    assert caught.value.exit_code == 2
    assert pq.read_table(tmp_path / "shards/quarantine.parquet").num_rows > 6
    assert not (tmp_path / "shards/artifact.json").exists()
    for path, content in kept.items():
        path.write_bytes(content)
    assert shard(CONFIG, manifest, data=data, out=tmp_path / "shards").counts["quarantined"] == 0


def test_a_unit_without_samples_gives_no_tar(tmp_path: Path) -> None:
    data = tmp_path / "data"
    records = make_records(data, 30)
    records += [
        Record(f"z{i}", (Part("image", uri="gone.png"),), "digit", Target(label="1"), split="val") for i in range(3)
    ]
    made = shard(CONFIG, write_manifest(tmp_path / "manifest", records), data=data, out=tmp_path / "shards")
    rows = pq.read_table(made.path / "manifest.parquet").to_pylist()
    assert [(row["path"], row["quarantined"]) for row in rows if row["split"] == "val"] == [("", 3)]
    assert made.counts["shards"] == len(list(made.path.glob("*.tar"))) == 3


def test_spec_follows_config_and_manifest(corpus, shards: Artifact, tmp_path: Path) -> None:
    spec = load_spec(shards.path)
    assert spec.vocab_size == Tokenizer.load(shards.path).vocab_size <= 300
    assert spec.tokenizer_digest == Tokenizer.load(shards.path).digest
    assert [task.name for task in spec.tasks] == ["digit"]
    assert (spec.image, spec.audio, spec.fields) == (CONFIG.features.image, CONFIG.features.audio, None)
    rows = [
        Record(
            f"f{i}", (Part("fields", fields={"age": float(i), "sex": "f"}),), "ill", Target(label="no"), split="train"
        )
        for i in range(5)
    ]
    fields = {"numbers": {"age": [2.0, 1.5]}, "categories": {"sex": ["f"]}}
    manifest = write_manifest(tmp_path / "manifest", rows, [{"name": "ill", "labels": ["no"]}], fields)
    spec = load_spec(shard(CONFIG, manifest, data=tmp_path, out=tmp_path / "shards").path)
    assert (spec.image, spec.audio) == (None, None)
    assert spec.fields and spec.fields.names == ["age", "sex"]
    assert spec.fields.numbers["age"] == (2.0, 1.5)


def test_a_given_tokenizer_is_used(corpus, shards: Artifact, tmp_path: Path) -> None:
    given = CONFIG.features.tokenizer.model_copy(
        update={"file": str(shards.path / "tokenizer.json"), "vocab_size": 999}
    )
    config = CONFIG.model_copy(update={"features": CONFIG.features.model_copy(update={"tokenizer": given})})
    made = shard(config, corpus[0], data=corpus[1], out=tmp_path / "shards")
    assert Tokenizer.load(made.path).digest == Tokenizer.load(shards.path).digest
    gone = given.model_copy(update={"file": str(tmp_path / "gone.json")})
    config = CONFIG.model_copy(update={"features": CONFIG.features.model_copy(update={"tokenizer": gone})})
    with pytest.raises(ConfigError, match=r"gone\.json"):
        shard(config, corpus[0], data=corpus[1], out=tmp_path / "other")


DRIVER = """
import sys, time
from pathlib import Path
from mmlm import artifacts
from mmlm.shards import commit, shard as verb
from tests.shards.conftest import CONFIG

manifest, data, out, ray = sys.argv[1:5]
if __name__ == "__main__":
    print("ready", flush=True)
    publish = commit._publish
    def slow(*given):  # so that kills fall between the steps of a commit, too
        publish(*given)
        time.sleep(0.1)
    commit._publish = slow
    config = CONFIG.model_copy(update={"shard_records": 3, "ray_from": 0 if ray == "ray" else 10**6})
    verb.shard(config, artifacts.read(manifest), data=data, out=Path(out), workers=1)
"""


def start_driver(manifest: Path, data: Path, out: Path, mode: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(manifest), str(data), str(out), mode],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def test_killed_anywhere_the_rerun_gives_the_same_bytes(corpus, tmp_path: Path) -> None:
    manifest, data = corpus
    config = CONFIG.model_copy(update={"shard_records": 3})
    whole = shard(config, manifest, data=data, out=tmp_path / "whole")
    out, seen = tmp_path / "killed", []
    for delay in (0.05, 0.17, 0.26, 0.38):
        process = start_driver(manifest.path, data, out, "here")
        deadline = time.time() + 20
        before = len(list(out.glob("*.tar")))
        while len(list(out.glob("*.tar"))) <= before and process.poll() is None and time.time() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        seen.append(len(list(out.glob("*.tar"))))
    assert not (out / "artifact.json").exists()
    assert 0 < seen[0] < len(list(whole.path.glob("*.tar")))
    assert seen == sorted(seen)  # nothing that was published is made again
    with (out / ".journal.jsonl").open("ab") as journal:
        journal.write(b'{"unit_id": "torn')
    (out / "train-00099-deadbeef.tar").write_bytes(b"an orphan")
    done = shard(config, manifest, data=data, out=out)
    assert shas(done.path) == shas(whole.path)
    assert done.digest == whole.digest
    assert done.counts == whole.counts


def test_a_shard_that_was_cut_is_made_again(corpus, tmp_path: Path) -> None:
    manifest, data = corpus
    whole = shard(CONFIG, manifest, data=data, out=tmp_path / "whole")
    out = tmp_path / "cut"
    process = start_driver(manifest.path, data, out, "here")
    while len(list(out.glob("*.tar"))) < 3 and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = json.loads((out / ".journal.jsonl").read_text().splitlines()[0])["name"]
    (out / f"{first}.tar").write_bytes(b"short")
    config = CONFIG.model_copy(update={"shard_records": 3})
    done = shard(config, manifest, data=data, out=out)
    assert done.counts["samples"] == whole.counts["samples"]
    from mmlm.shards.verify import verify

    assert verify(done.path) == []


def test_ray_gives_the_same_bytes_and_leaves_nothing(corpus, shards: Artifact, tmp_path: Path) -> None:
    manifest, data = corpus
    on_ray = CONFIG.model_copy(update={"ray_from": 0})
    for workers in (1, 2, 4):
        made = shard(on_ray, manifest, data=data, out=tmp_path / f"{workers}", workers=workers)
        assert made.counts["workers"] == workers
        assert shas(made.path) == shas(shards.path)
    assert not list(Path("/tmp").glob(f"mmlm-ray-{os.getpid()}-*"))
    assert TAG not in os.environ


def test_a_killed_driver_leaves_no_ray_process(corpus, shards: Artifact, tmp_path: Path) -> None:
    manifest, data = corpus
    process = start_driver(manifest.path, data, tmp_path / "shards", "ray")
    deadline = time.time() + 60
    while not list((tmp_path / "shards").glob("*.tar")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    tags = {
        line.partition(b"=")[2].decode()
        for line in environment_of_children(process.pid)
        if line.startswith(TAG.encode())
    }
    assert len(tags) == 1
    tag = tags.pop()
    assert tagged(tag)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.time() + 20
    while tagged(tag) and time.time() < deadline:
        time.sleep(0.1)
    assert tagged(tag) == []
    config = CONFIG.model_copy(update={"shard_records": 3, "ray_from": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmlm.shards.shard.write_on_ray", lambda units, writer, *_: map(writer.write, units))
        done = shard(config, manifest, data=data, out=tmp_path / "shards")
    assert done.counts["samples"] == 45


def environment_of_children(parent: int) -> list[bytes]:
    found: list[bytes] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found += (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
    return found


def test_an_address_where_nothing_listens(corpus, tmp_path: Path) -> None:
    start = time.time()
    with pytest.raises(LaunchError, match=r"127\.0\.0\.1:9"):
        shard(CONFIG, corpus[0], data=corpus[1], out=tmp_path / "shards", ray_address="127.0.0.1:9")
    assert time.time() - start < 30
