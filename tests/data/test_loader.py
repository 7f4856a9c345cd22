"""The loader: the same global batches however they are shared out, and what happens when something is damaged."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.collate import Batch
from mmlm.data.config import DataConfig
from mmlm.data.loader import Loader
from mmlm.data.reader import ShardReader
from mmlm.errors import ArtifactError, ConfigError, DataError
from mmlm.features.encode import opened_length
from mmlm.world import World

PACKED: dict[str, Any] = {
    "batch": 12,
    "pack": {"kind": "best_fit", "window": 3},
    "mixture": {"kind": "weighted", "by": "source", "weights": {"chat": 2, "story": 1, "digit": 1}},
    "modality_dropout": 0.5,
    "augment": {"shift": 2, "time_mask": 0.3},
}
PLAIN: dict[str, Any] = {"batch": 12, "modality_dropout": 0.5}


def loader(shards: Path, config: dict[str, Any], rank: int = 0, ranks: int = 1, seed: int = 5) -> Loader:
    return Loader(shards, parse(DataConfig, config, "test"), seed, World(rank, ranks), steps=50)


def rows(batch: Batch) -> list[tuple[Any, ...]]:
    """Each sequence of a batch as plain values, without its padding."""
    made, ids = [], iter(batch.ids)
    for b in range(len(batch.tokens_BT)):
        valid = batch.valid_BT[b]
        names = tuple(next(ids) for _ in range(int(batch.segment_BT[b].max()) + 1))
        columns = (batch.tokens_BT, batch.target_BT, batch.prompt_BT, batch.segment_BT, batch.position_BT)
        made.append((names, *(tuple(c[b][valid].tolist()) for c in columns)))
    return made


def features(batches: list[Batch]) -> list[torch.Tensor]:
    """What has no row for each sequence: in order of the sequences, whatever the batches."""
    names = ("patches_PD", "patch_at_P", "mels_MD", "mel_at_M", "values_K", "label_R", "task_R")
    return [torch.cat([getattr(b, n) for b in batches]) for n in names]


@pytest.mark.parametrize("config", [PACKED, PLAIN], ids=["packed", "plain"])
def test_the_same_global_batches_on_any_ranks_and_pieces(mixed: Artifact, config: dict[str, Any]):
    if config is PLAIN:
        config = {**config, "pack": {"kind": "best_fit", "length": 512}}
    steps = (0, 1, 7, 1000)
    whole = [loader(mixed.path, config).batch(step) for step in steps]
    for ranks in (1, 2, 3, 4):
        for pieces in (1, 2, 3):
            parts = [loader(mixed.path, config, rank, ranks) for rank in range(ranks)]
            for step, wanted in reversed(list(zip(steps, whole, strict=True))):
                found = [b for part in parts for b in part.batches(step, pieces)]
                assert len(found) == ranks * pieces
                assert [row for b in found for row in rows(b)] == rows(wanted)
                for a, b in zip(features(found), features([wanted]), strict=True):
                    assert torch.equal(a, b)


def test_every_record_is_seen_once_an_epoch(mixed: Artifact):
    one = loader(mixed.path, {"batch": 5, "pack": {"kind": "best_fit", "on_long": "refuse"}})
    assert one.plan
    sequences = len(one.plan.starts) - 1
    whole, rest = divmod(sequences * 5, 5)
    assert not rest
    seen = Counter(i for step in range(whole) for i in one.batch(step).ids)
    assert set(seen.values()) == {5} and len(seen) == one.plan.counts["records"]


def test_state_tells_what_a_batch_follows_from(mixed: Artifact):
    one, other = loader(mixed.path, PACKED), loader(mixed.path, PACKED, 1, 3)
    assert one.state() == other.state()
    assert one.state()["order"] != loader(mixed.path, PACKED, seed=6).state()["order"]
    assert one.state()["pack"] != loader(mixed.path, {**PACKED, "pack": {"kind": "none"}}).state()["pack"]


def test_a_batch_too_small_for_its_pieces(mixed: Artifact):
    with pytest.raises(ConfigError, match="each of 5 micro-batches on each of 3 ranks"):
        loader(mixed.path, PACKED, 0, 3).batches(0, 5)


@pytest.mark.parametrize(
    ("batch", "ranks", "pieces", "said"),
    [
        (1, 2, 1, "data.batch: 1; wanted 2 or more, a sequence for each of 2 ranks; give a larger data.batch or fewer ranks"),
        (1, 2, 3, "wanted 6 or more, a sequence for each of 3 micro-batches on each of 2 ranks; "
                  "give a larger data.batch or fewer ranks and a smaller accumulate"),
        (2, 2, 3, "give a larger data.batch or a smaller accumulate"),
        (3, 4, 3, "give a larger data.batch or fewer ranks"),
        (4, 2, 3, "give a larger data.batch or a smaller accumulate or fewer ranks"),
    ],
)  # fmt: skip
def test_a_batch_too_small_is_refused_with_what_would_be_enough(
    batch: int, ranks: int, pieces: int, said: str, mixed: Artifact
):
    config = parse(DataConfig, {"batch": batch}, "test")
    with pytest.raises(ConfigError) as caught:
        Loader(mixed.path, config, 5, World(0, ranks), pieces=pieces)
    assert said in str(caught.value) and str(caught.value).endswith(said.partition("give ")[2])


def test_what_is_told_before_training(mixed: Artifact, capsys: pytest.CaptureFixture[str]):
    loader(mixed.path, PACKED, 1, 2)
    assert capsys.readouterr().err == ""
    loader(mixed.path, PACKED)
    said = capsys.readouterr().err
    batches = [loader(mixed.path, {**PACKED, "modality_dropout": 0}).batch(step).valid_BT for step in range(50)]
    told = float(said.partition("padding ")[2].partition("%")[0]) / 100
    assert told == pytest.approx(1 - float(torch.cat(batches).float().mean()), abs=0.003)
    batches = [loader(mixed.path, PACKED).batch(step).valid_BT for step in range(50)]
    after = float(said.partition("(about ")[2].partition("% after modality dropout)")[0]) / 100
    assert after > told + 0.02
    assert after == pytest.approx(1 - float(torch.cat(batches).float().mean()), abs=0.01)
    assert "long records split into" in said and "mixture: chat: 50.0% of 50 batches" in said


def damage(folder: Path, number: int, ending: str = "json", split: str = "train") -> str:
    """Overwrite a member of the `number`-th sample of the first shard of `split`; returns its key."""
    row = next(r for r in pq.read_table(folder / "manifest.parquet").to_pylist() if r["split"] == split)
    index = pq.read_table(folder / row["path"].replace(".tar", ".index.parquet")).to_pylist()
    key = list(dict.fromkeys(m["key"] for m in index))[number]
    member = next(m for m in index if m["key"] == key and m["ext"] == ending)
    with (folder / row["path"]).open("r+b") as f:
        f.seek(member["offset"])
        f.write(b"\xff" * member["size"])
    return str(key)


@pytest.mark.parametrize("pack", ["best_fit", "none"])
def test_a_damaged_sample_has_a_stand_in_that_is_the_same_everywhere(
    tmp_path: Path, mixed: Artifact, pack: str, capfd: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(mixed.path, tmp_path / "shards"))
    config = {**PACKED, "pack": {"kind": pack}}
    steps = range(30)
    before = [i for step in steps for i in loader(folder, config).batch(step).ids]
    keys = [damage(folder, n) for n in (2, 3, 9)]
    capfd.readouterr()
    alone = loader(folder, config)
    ids = [alone.batch(step).ids for step in steps]
    pair = [loader(folder, config, rank, 2) for rank in (0, 1)]
    assert [tuple(i for one in pair for i in one.batch(step).ids) for step in steps] == ids
    lost = set(before) - {i for row in ids for i in row}
    assert {i.partition("#")[0] for i in lost} == {f"chat/{n:04d}" for n in (2, 4, 12)}
    assert len([i for row in ids for i in row]) == len(before)
    said = capfd.readouterr().err
    assert all(said.count(f"/{key} is damaged") >= 1 for key in keys)


def test_the_probe_has_stand_ins_too(tmp_path: Path, mixed: Artifact, capfd: pytest.CaptureFixture[str]):
    folder = Path(shutil.copytree(mixed.path, tmp_path / "shards"))
    before, key = loader(folder, PLAIN).probe(8).ids, damage(folder, 2)
    one, other = loader(folder, PLAIN), loader(folder, PLAIN, 1, 2)
    assert one.probe(8).ids == one.probe(8).ids == other.probe(8).ids
    assert [n for n, (old, new) in enumerate(zip(before, one.probe(8).ids, strict=True)) if old != new] == [2]
    assert capfd.readouterr().err.count(f"/{key} is damaged") == 2  # once by each loader


def test_what_stands_in_at_the_second_attempt_is_named(
    tmp_path: Path, mixed: Artifact, capfd: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(mixed.path, tmp_path / "shards"))
    wanted, key = loader(folder, PLAIN).probe(8).ids, damage(folder, 2)
    reader = ShardReader(folder)
    first = loader(folder, PLAIN).maker.record(2).id
    number = next(i for i in range(len(reader)) if i != 2 and reader[i].id == first)
    shard = int(np.searchsorted(reader._starts, number, "right")) - 1
    damage_row(folder, reader._rows.slice(shard, 1).to_pylist()[0], number - int(reader._starts[shard]))
    second = loader(folder, PLAIN).probe(8).ids[2]
    assert second not in (wanted[2], first)
    (told,) = (line for line in capfd.readouterr().err.splitlines() if f"/{key} is damaged" in line)
    assert told.endswith(f"; {second} stands in for it")


def test_a_damaged_shard_stops_with_its_name(tmp_path: Path, mixed: Artifact):
    folder = Path(shutil.copytree(mixed.path, tmp_path / "shards", ignore=shutil.ignore_patterns("packs")))
    shard = sorted(folder.glob("train-*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:-512])
    config = {"batch": 8, "pack": {"kind": "best_fit"}}
    with pytest.raises(ArtifactError, match=f"{shard.name} has .* bytes; wanted"):
        loader(folder, config)
    shard.unlink()
    with pytest.raises(ArtifactError, match=f"{shard.name} cannot be read"):
        loader(folder, config)


def test_shards_that_lie_here_are_mapped_until_they_are_let_go(tmp_path: Path, mixed: Artifact):
    shards = Path(shutil.copytree(mixed.path, tmp_path / "shards"))
    reader = ShardReader(shards)
    tar, maps = str(shards / reader.shard_of(0)), Path("/proc/self/maps")
    assert tar not in maps.read_text()
    assert reader[0].id == ShardReader(mixed.path)[0].id
    assert tar in maps.read_text()
    reader.close()
    assert tar not in maps.read_text()


def read_by_calls() -> int:
    """Bytes that this process has read with system calls, whether they came from a disk or not; what it maps counts nothing."""
    (told,) = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")]
    return int(told.split()[1])


def test_a_sample_is_read_where_it_lies_in_a_mapped_shard(tmp_path: Path, mixed: Artifact):
    shards = Path(shutil.copytree(mixed.path, tmp_path / "shards"))
    reader = ShardReader(shards)
    tar = shards / reader.shard_of(0)
    first = reader.members(0)
    (mapping,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(tar))]
    assert mapping.split()[1].startswith("r-")  # read only
    shard = next(reader.shards())
    before = read_by_calls()
    others = [reader.members(i) for i in shard[1:]]
    assert read_by_calls() - before < 4096 < tar.stat().st_size // 4  # what it takes to ask
    data = tar.read_bytes()
    assert len(others) > 10 and all(value in data for members in (first, *others) for value in members.values())


def test_shards_without_a_sound_sample(tmp_path: Path, keypad_shards: Artifact):
    folder = Path(shutil.copytree(keypad_shards.path, tmp_path / "shards"))
    for row in pq.read_table(folder / "manifest.parquet").to_pylist():
        if row["split"] == "train":
            for n in range(row["samples"]):
                damage_row(folder, row, n)
    with pytest.raises(DataError, match="stand in for it"):
        loader(folder, PLAIN).batch(0)


def damage_row(folder: Path, row: dict[str, Any], number: int) -> None:
    index = pq.read_table(folder / row["path"].replace(".tar", ".index.parquet")).to_pylist()
    members = [m for m in index if m["ext"] == "json"]
    with (folder / row["path"]).open("r+b") as f:
        f.seek(members[number]["offset"])
        f.write(b"\xff" * members[number]["size"])


def test_start_up_at_step_a_million(mixed: Artifact):
    def seconds(step: int) -> float:
        start = time.process_time()
        loader(mixed.path, PACKED).batch(step)
        return time.process_time() - start

    seconds(0)
    near, far = (min(seconds(step) for _ in range(5)) for step in (0, 10**6))
    assert far < 2 * near + 0.02


def test_dataclass_of_a_batch_keeps_its_names(mixed: Artifact):
    batch = loader(mixed.path, PACKED).batch(0)
    assert batch.to("cpu").ids == batch.ids
    assert [f.name for f in dataclasses.fields(batch)][-1] == "ids"
    assert not np.shares_memory(batch.tokens_BT.numpy(), loader(mixed.path, PACKED).batch(0).tokens_BT.numpy())


def test_a_shard_set_of_very_many_shards_is_opened_at_once(tmp_path: Path, mixed: Artifact):
    folder = Path(shutil.copytree(mixed.path, tmp_path / "shards", ignore=shutil.ignore_patterns("*.tar", "packs")))
    table = pq.read_table(folder / "manifest.parquet")
    many = pa.concat_tables([table] * (200_000 // table.num_rows))
    pq.write_table(many, folder / "manifest.parquet")
    tracemalloc.start()
    start = time.process_time()
    reader = ShardReader(folder)
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(reader) > 3_000_000 and len(reader._starts) > 100_000
    assert seconds < 2 and peak < 30_000_000  # a row of the manifest each, and nothing for each sample


@pytest.mark.parametrize("config", [PACKED, PLAIN], ids=["packed", "plain"])
def test_the_probe_holds_no_more_than_sequences(mixed: Artifact, config: dict[str, Any]):
    """These shards keep records of any length, and every rank works on the whole probe at every save."""
    one, other = loader(mixed.path, config), loader(mixed.path, config, 1, 3)
    count, most = len(one.reader), one.reader.spec.max_len
    long = [i for i in range(count) if opened_length(one.reader[i], one.reader.spec) > most]
    probe = one.probe(count)
    assert probe.tokens_BT.shape == (count, most) and len(long) > 10
    assert [n for n, name in enumerate(probe.ids) if "#" in name] == long
    assert rows(probe) == rows(other.probe(count))


def test_the_probe_in_parts_is_the_same_records(mixed: Artifact):
    one = loader(mixed.path, PLAIN)
    whole = one.probe()
    for parts in (1, 4, 5):
        found = one.probes(parts)
        assert len(found) == parts and [row for batch in found for row in rows(batch)] == rows(whole)
    assert [batch.ids for batch in one.probes(4, 3)] == [(name,) for name in whole.ids[:3]]


def test_one_thread_reads_though_another_asks_for_the_probe(mixed: Artifact):
    """With a GPU and no workers, the thread that pins the next batch reads; the probe waits for its turn on it."""

    class Watched(ShardReader):
        def members(self, i: int) -> dict[str, bytes]:
            threads.add(threading.get_ident())
            return super().members(i)

    threads: set[int] = set()
    config = parse(DataConfig, PLAIN, "test")
    pinned, plain = (Loader(mixed.path, config, 5, World(), steps=50, workers=0, pin=pin) for pin in (True, False))
    for each in (pinned, plain):
        each.reader = each.maker.reader = Watched(mixed.path)
    probe = pinned.probe()
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert rows(probe) == rows(plain.probe())
    assert threading.get_ident() in threads
    pinned.close()
