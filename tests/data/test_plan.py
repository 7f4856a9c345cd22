"""The pack plan: what fits together, what is split, and how it is kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm.artifacts import Artifact
from mmlm.config import parse
from mmlm.data.bestfit import BestFit
from mmlm.data.config import DataConfig
from mmlm.data.loader import Loader
from mmlm.data.plan import WHOLE, Plan, find_plan
from mmlm.data.reader import ShardReader
from mmlm.errors import ArtifactError, DataError
from mmlm.features.encode import opened_length
from mmlm.shards.packs import FOLDER, META, content_digest
from mmlm.shards.verify import verify
from mmlm.world import World
from tests.data.conftest import make_shards
from tests.data.test_loader import damage, damage_row, loader


def plan_of(path: Path, by: str | None = None, **pack: object) -> Plan:
    config = parse(DataConfig, {"pack": {"kind": "best_fit", **pack}}, "test")
    return find_plan(ShardReader(path), config.pack, by)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 50), max_size=40), max_size=6), st.integers(50, 80))
def test_best_fit_loses_nothing_and_overfills_nothing(windows: list[list[int]], length: int):
    fit, done, lengths = BestFit(length), [], np.array([n for w in windows for n in w])
    for first, window in zip(np.cumsum([0, *map(len, windows)]), windows, strict=False):
        fit.add(np.arange(first, first + len(window)), np.array(window, int))
        done += fit.take(5)
    done += fit.take()
    assert sorted(n for s in done for n in s) == list(range(len(lengths)))
    filled = [int(lengths[s].sum()) for s in done]
    assert all(f <= length for f in filled)
    if len(windows) == 1:  # two half empty ones would have been one
        assert sum(f <= length / 2 for f in filled) <= 1


def test_sequences_hold_every_record_once_and_every_target_of_a_long_one(mixed: Artifact):
    plan, reader = plan_of(mixed.path), ShardReader(mixed.path)
    seen = dict.fromkeys(range(len(reader)), 0)
    for s in range(len(plan.starts) - 1):
        assert sum(int(plan.opened[row]) for row in plan.rows(s)) <= 64
    pieces: dict[int, list[tuple[int, int]]] = {}
    for row, sample in enumerate(plan.sample.tolist()):
        if plan.last[row] == WHOLE:
            seen[sample] += 1
            assert plan.opened[row] == opened_length(reader[sample], reader.spec)
        else:
            pieces.setdefault(sample, []).append((int(plan.first[row]), int(plan.last[row])))
    for sample, cuts in pieces.items():
        seen[sample] += 1
        tokens, targets = reader[sample].tokens, []
        for first, last in sorted(cuts):
            assert 2 <= last - first <= 64
            targets += tokens[first + 1 : last].tolist()
        assert targets == tokens[1:].tolist()
    assert set(seen.values()) == {1}
    assert plan.counts["split"] == len(pieces) > 5 and plan.counts["pieces"] == sum(map(len, pieces.values()))
    assert plan.counts["refused"] == plan.counts["damaged"] == 0
    assert plan.padding() < 0.03


def test_long_records_are_refused_if_so_wanted_and_counted(mixed: Artifact):
    plan = plan_of(mixed.path, on_long="refuse")
    assert plan.counts["refused"] == plan_of(mixed.path).counts["split"] and plan.counts["pieces"] == 0
    assert plan.counts["records"] + plan.counts["refused"] == len(ShardReader(mixed.path))


def test_streams_do_not_share_sequences(mixed: Artifact):
    plan, reader = plan_of(mixed.path, by="source/task"), ShardReader(mixed.path)
    assert list(plan.streams) == ["chat/chat", "digit/digit", "story/story"]
    first = 0
    for name, size in plan.sizes.items():
        for s in range(first, first + size):
            assert {reader[int(plan.sample[row])].source for row in plan.rows(s)} == {name.split("/")[0]}
        first += size


def test_a_plan_is_made_once_by_one_of_many(tmp_path: Path):
    made = make_shards(tmp_path)
    command = (
        "import sys; from pathlib import Path; from tests.data.test_plan import plan_of;"
        "print(plan_of(Path(sys.argv[1]), window=2).digest)"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", command, str(made.path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert len(set(said)) == 1 and said[0].strip()
    (path,) = (made.path / FOLDER).glob("*.parquet")
    before = path.stat().st_mtime_ns
    plan_of(made.path, window=2)
    assert path.stat().st_mtime_ns == before
    path.unlink()
    time.sleep(0.01)
    assert plan_of(made.path, window=2).digest == said[0].strip()


def test_verify_knows_plans_and_what_makes_shards_anew_sweeps_them(tmp_path: Path):
    made = make_shards(tmp_path)
    plan_of(made.path)
    assert verify(made.path) == []
    (path,) = (made.path / FOLDER).glob("*.parquet")
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    assert verify(made.path) == [line for line in verify(made.path) if path.name in line] != []
    with pytest.raises(ArtifactError, match="remove it"):
        plan_of(made.path)
    path.unlink()
    plan_of(made.path)
    other = shutil.copytree(made.path, tmp_path / "other")
    (other / "artifact.json").write_text((made.path / "artifact.json").read_text().replace(made.digest, "0" * 64))
    assert any("of other shards" in line for line in verify(other))
    from mmlm.shards.commit import Committer

    Committer(other).resume({})
    assert not (other / FOLDER).exists()


def test_no_record_that_fits(keypad_shards: Artifact):
    with pytest.raises(DataError, match="fits into a sequence of 8"):
        plan_of(keypad_shards.path, length=8)


def test_sharding_refuses_long_records_unless_told(tmp_path: Path, mixed: Artifact):
    refusing = make_shards(tmp_path, on_long="refuse", max_len=128)
    assert refusing.counts["quarantined"] > 0 and refusing.counts["quarantine_reasons"].keys() == {"too_long"}
    kept = ShardReader(mixed.path)
    assert max(len(s.tokens) for s in kept) > 256
    answered = ShardReader(mixed.path, ("test",))
    assert max(len(s.tokens) for s in answered) > 64 > max(s.answer_at for s in answered)
    assert mixed.counts["quarantined"] == 0


def test_damaged_records_are_told_counted_and_taken_up_again_once_repaired(
    tmp_path: Path, mixed: Artifact, capfd: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(mixed.path, tmp_path / "shards", ignore=shutil.ignore_patterns(FOLDER)))
    shard = next(r["path"] for r in pq.read_table(folder / "manifest.parquet").to_pylist() if r["split"] == "train")
    sound = (folder / shard).read_bytes()
    keys = [damage(folder, n) for n in (2, 3, 9)]
    config = {"batch": 4, "pack": {"kind": "best_fit"}}
    plan = loader(folder, config).plan
    assert plan and plan.damaged == (2, 3, 9) and plan.counts["damaged"] == 3
    assert not {2, 3, 9} & set(plan.sample.tolist())
    said = capfd.readouterr().err
    assert f"{shard}/{keys[0]} is damaged (a sample of a shard cannot be read" in said
    assert f"and left out; such records of {shard}: 3" in said and "mmlm verify" in said
    loader(folder, config, 1, 2)  # another rank than the first says nothing
    again = loader(folder, config)  # what is kept is told of at every start
    assert again.left_out == 3 and again.state()["pack"] == plan.digest
    assert capfd.readouterr().err.count(f"such records of {shard}: 3") == 1
    (folder / shard).write_bytes(sound)
    whole = loader(folder, config)
    said = capfd.readouterr().err
    assert "can be read again; the plan is made anew" in said and "left out;" not in said
    assert whole.left_out == 0 and whole.plan and whole.plan.counts["records"] == plan.counts["records"] + 3
    assert whole.state()["pack"] == plan_of(mixed.path).digest != plan.digest
    begun = Loader(folder, parse(DataConfig, config, "test"), 5, World(), steps=50, plan=plan.digest)
    assert begun.state()["pack"] == plan.digest and begun.left_out == 3
    assert [begun.batch(n).ids for n in range(9)] == [again.batch(n).ids for n in range(9)]
    said = capfd.readouterr().err
    assert "pack: 3 records were damaged when this training was begun; it goes on without them" in said
    assert "made anew" not in said and "left out;" not in said and verify(folder) == []
    assert loader(folder, config).state() == whole.state()  # one that is begun now has all records


def test_a_plan_of_an_earlier_version_that_does_not_name_what_it_leaves_out_is_made_anew(
    tmp_path: Path, mixed: Artifact, capfd: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(mixed.path, tmp_path / "shards", ignore=shutil.ignore_patterns(FOLDER)))
    damage(folder, 3)
    config = {"batch": 4, "pack": {"kind": "best_fit"}}
    named = loader(folder, config)
    (path,) = (folder / FOLDER).glob("*.parquet")
    table = pq.read_table(path)
    told = json.loads(table.schema.metadata[META])
    del told["damaged"]
    told["digest"] = content_digest(table, {key: value for key, value in told.items() if key != "digest"})
    pq.write_table(table.replace_schema_metadata({META: json.dumps(told)}), path)
    capfd.readouterr()
    anew = loader(folder, config)
    said = capfd.readouterr().err
    assert "an earlier version did not write down which records it left out; the plan is made anew" in said
    assert anew.plan and anew.plan.damaged == (3,) and anew.state() == named.state() and anew.left_out == 1
    assert "and left out; such records of" in said
    begun = Loader(folder, parse(DataConfig, config, "test"), 5, World(), steps=50, plan=told["digest"])
    assert begun.state()["pack"] == told["digest"] != named.state()["pack"] and begun.left_out == 1
    assert begun.batch(3).ids == named.batch(3).ids
    assert not [line for line in verify(folder) if line.startswith(FOLDER)]


def test_a_plan_gives_up_shards_where_a_loader_without_one_does(tmp_path: Path, mixed: Artifact):
    folder = Path(shutil.copytree(mixed.path, tmp_path / "shards", ignore=shutil.ignore_patterns(FOLDER)))
    for row in pq.read_table(folder / "manifest.parquet").to_pylist():
        for n in range(row["samples"] if row["split"] == "train" else 0):
            damage_row(folder, row, n)
    with pytest.raises(DataError, match=r"is damaged .* stand in for it; .* records cannot be read") as raised:
        plan_of(folder)
    assert "mmlm verify" in str(raised.value)
    assert not list((folder / FOLDER).glob("*.parquet"))
