"""Plans against what is: parameters, what autograd keeps, the resident memory of real ranks, the seconds of real steps."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmlm import plans
from mmlm.artifacts import Artifact
from mmlm.cli import main
from mmlm.config import parse
from mmlm.data.collate import Batch, collate
from mmlm.errors import ConfigError
from mmlm.features.spec import FeatureSpec
from mmlm.launch.local import ranks
from mmlm.model.flops import NOTHING, Shape
from mmlm.model.recompute import MAPS
from mmlm.model.transformer import IGNORE
from mmlm.train import devices, probe, weights
from mmlm.train.activations import activation_bytes
from mmlm.train.config import FreezeConfig, TrainConfig
from mmlm.train.devices import DEVICES, Device
from mmlm.train.objectives import Answering, loss_of
from mmlm.train.planning import Count, between_ranks, count, counted, forecast, over_pcie
from mmlm.train.workload import Corpus, Workload
from mmlm.world import cores
from tests.small import SPEC, sample

CPU = Device("cpu", 1e11, 16e9, 1e10, 1e9, per_node=2)
BIG = {"precision": "bf16", "model": {"width": 512, "layers": 8, "heads": 8}, "data": {"batch": 32}}
"""25 million parameters."""


def config_of(**changes: Any) -> TrainConfig:
    return parse(TrainConfig, changes, "test")


def workload_of(batch: Batch, times: int = 1) -> Workload:
    shape = Shape.of(batch)
    figures = {name: getattr(shape, name) * times for name in ("targets", "answers", "patches", "mels", "read")}
    whole = Shape(shape.lengths * times, prompts=(shape.prompts or ()) * times, **figures)
    rows, length = batch.tokens_BT.shape
    return Workload(whole, rows * times, length, "a test")


def kept_by_autograd(config: TrainConfig, batch: Batch, spec: FeatureSpec = SPEC) -> int:
    """Bytes of all storages that the backward pass needs, parameters left out."""
    model = weights.build(config.model, spec)
    model.set_up(recompute=config.recompute, granularity=config.recompute_granularity)
    model = model.bfloat16() if config.precision == "bf16" else model
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def see(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    objective = Answering(config.loss, spec)
    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        loss = loss_of(objective(model, batch), objective.counts(batch))
    assert loss.requires_grad
    return sum(found.values())


def test_parameters_are_counted_without_memory() -> None:
    config = config_of(model={"width": 64, "layers": 3, "heads": 4})
    assert count(config.model, SPEC) == sum(p.numel() for p in weights.build(config.model, SPEC).parameters())
    huge = config_of(model={"width": 8192, "layers": 80, "heads": 64})
    before = devices.resident()
    assert count(huge.model, SPEC) > 55e9
    assert devices.resident() - before < 200e6


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("layers", "recompute"), [(2, 0), (4, 0), (4, 1)])
def test_activations_are_what_autograd_keeps(precision: str, layers: int, recompute: int) -> None:
    model = {"width": 256, "layers": layers, "heads": 8}
    config = config_of(precision=precision, recompute=recompute, model=model)
    batch = collate([sample(i) for i in range(64)], SPEC)
    planned = activation_bytes(config, config.model, SPEC, Shape.of(batch), on_cpu=True)
    kept = kept_by_autograd(config, batch)
    if recompute:  # and one block at a time, which the hooks do not see
        whole = [config_of(precision=precision, model={**model, "layers": n}) for n in (layers - 1, layers)]
        fewer, more = (activation_bytes(c, c.model, SPEC, Shape.of(batch), on_cpu=True) for c in whole)
        planned -= more - fewer
    assert kept == pytest.approx(planned, rel=0.1)


class Products(TorchDispatchMode):
    """Bytes that matrix maps give."""

    given = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in MAPS:
            self.given += made.nbytes
        return made


@pytest.mark.parametrize("form", [{}, {"mlp": "gelu", "attention_bias": "all"}, {"layout": "encoder_decoder"}])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_selective_recomputation_keeps_what_maps_give(form: dict[str, Any], precision: str) -> None:
    asked = {"precision": precision, "recompute": 1, "model": {"width": 256, "layers": 4, "heads": 8, **form}}
    full, selective = (config_of(**asked, recompute_granularity=g) for g in ("full", "selective"))
    batch = collate([sample(i) for i in range(64)], SPEC)
    shape = Shape.of(batch)
    planned, plain = (activation_bytes(c, c.model, SPEC, shape, on_cpu=True) for c in (selective, full))
    net = weights.build(full.model, SPEC)
    net = net.bfloat16() if precision == "bf16" else net
    with torch.no_grad(), Products() as seen:
        net.trunk(batch, (batch.target_BT != IGNORE)[batch.valid_BT])
    # a block is run again at a time, of which the maps' part is kept already
    stack = seen.given / (8 if form.get("layout") else 4)
    assert planned - plain == pytest.approx(seen.given - stack, rel=0.2)
    assert planned < activation_bytes(config_of(**{**asked, "recompute": 0}), full.model, SPEC, shape, on_cpu=True)


@pytest.mark.parametrize(
    "form",
    [
        {"norm": "layer", "norm_at": "after", "mlp": "relu", "positions": "sinusoidal"}, {"mlp": "gelu"},
        {"layout": "encoder"}, {"layout": "encoder_decoder"},
        {"layout": "encoder_decoder", "encoder_layers": 3, "qk_norm": False}, {"fusion": "add"},
        {"fusion": "cross_attention"}, {"fusion": {"kind": "cross_attention", "every": 2, "layers": 2}},
        {"fusion": "late"}, {"fusion": "adversarial"}, {"layout": "encoder", "fusion": "cross_attention"},
        {"layout": "encoder", "fusion": "late"}, {"layout": "encoder_decoder", "fusion": "add"},
        {"layout": "encoder_decoder", "fusion": "cross_attention"}, {"layout": "encoder_decoder", "fusion": "late"},
    ],
)  # fmt: skip
def test_activations_of_other_forms(form: dict[str, Any]) -> None:
    spec = SPEC.model_copy(update={"tasks": SPEC.tasks[:1]})
    config = config_of(precision="bf16", model={"width": 256, "layers": 4, "heads": 8, **form})
    batch = collate([sample(i) for i in range(64)], spec)
    planned = activation_bytes(config, config.model, spec, Shape.of(batch), on_cpu=True)
    assert kept_by_autograd(config, batch, spec) == pytest.approx(planned, rel=0.15)


def test_stages_spread_what_they_say() -> None:
    work = workload_of(collate([sample(i) for i in range(32)], SPEC), 8)
    rows = {}
    for stage in (0, 1, 2, 3):
        config = config_of(**BIG, zero={"stage": stage})
        rows[stage] = forecast(config, config.model, SPEC, work, DEVICES["h100"], 8)
    P = rows[0].parameters
    assert rows[0].memory["optimizer"] == 16 * P
    assert rows[1].memory["optimizer"] == pytest.approx(2 * P)
    assert rows[1].memory["gradients"] == 2 * P and rows[2].memory["gradients"] == pytest.approx(P / 4)
    assert rows[3].memory["weights"] < rows[2].memory["weights"] + P
    assert rows[0].bytes > rows[1].bytes > rows[2].bytes
    assert 0 < rows[0].mfu < 1 and rows[0].fits
    config = config_of(**BIG, zero={"stage": 2, "offload_optimizer": True})
    away = forecast(config, config.model, SPEC, work, DEVICES["h100"], 8)
    assert away.memory["optimizer"] == 0 and away.host["offloaded"] == pytest.approx(16 * P)


def test_stage_0_in_float32_has_no_second_copy() -> None:
    work = workload_of(collate([sample(i) for i in range(32)], SPEC), 8)
    fp32 = {**BIG, "precision": "fp32"}
    optimizer = {}
    for stage in (0, 1):
        config = config_of(**fp32, zero={"stage": stage})
        row = forecast(config, config.model, SPEC, work, DEVICES["h100"], 1)
        optimizer[stage] = row.memory["optimizer"]
        assert row.memory["gradients"] == 4 * row.parameters
    assert optimizer == {0: 8 * row.parameters, 1: 16 * row.parameters}


def test_one_rank_of_all_holds_the_checkpoint() -> None:
    work = workload_of(collate([sample(i) for i in range(32)], SPEC), 8)
    config = config_of(**BIG, ema={"decay": 0.9})
    many = forecast(config, config.model, SPEC, work, DEVICES["h100"], 8)
    assert many.host["checkpoint"] == 16 * many.parameters
    two = forecast(config, config.model, SPEC, work, CPU, 2)
    assert two.host["ranks"] == pytest.approx(2 * two.held - 16 * two.parameters)


def test_each_rank_holds_its_piece_of_a_sharded_checkpoint() -> None:
    work = workload_of(collate([sample(i) for i in range(32)], SPEC), 8)
    config = config_of(**BIG, checkpoint_format="sharded")
    size = 12 * counted(config, config.model, SPEC).parameters
    for ranks_, held in ((8, 1.0), (16, 0.5)):  # of two nodes the half on each
        many = forecast(config, config.model, SPEC, work, DEVICES["h100"], ranks_)
        assert many.host["checkpoint"] == pytest.approx(held * size)
    two = forecast(config, config.model, SPEC, work, CPU, 2)
    assert two.memory["checkpoint"] == size / 2 and two.host["ranks"] == pytest.approx(2 * two.held)


def test_a_model_must_come_whole_to_its_device() -> None:
    """At every stage, so more GPUs do not help where the float32 weights are larger than one."""
    away = {"stage": 3, "offload_optimizer": True, "offload_parameters": True}
    config = config_of(**{**BIG, "model": {"width": 4096, "layers": 32, "heads": 32}}, zero=away, recompute=1)
    work = workload_of(collate([sample(i) for i in range(32)], SPEC), 8)
    small, large = (forecast(config, config.model, SPEC, work, DEVICES[name], 8) for name in ("l4", "a100-80"))
    assert small.held < DEVICES["l4"].memory / 2 and small.bytes == small.start > 4 * small.parameters > 23e9
    assert not small.fits and large.fits
    assert small.host_bytes >= small.host_start > 8 * 4 * small.parameters


def test_offloading_takes_time() -> None:
    work = workload_of(collate([sample(i) for i in range(32)], SPEC), 8)
    times = []
    for zero in ({}, {"offload_optimizer": True}, {"offload_optimizer": True, "offload_parameters": True}):
        config = config_of(**BIG, zero={"stage": 3, **zero})
        times.append(forecast(config, config.model, SPEC, work, DEVICES["h100"], 8).seconds)
    assert times[0]["host_link"] == 0 and times[1]["update"] > times[0]["update"]
    assert over_pcie(config, DEVICES["t4"], 8, LARGE) == pytest.approx(2 * (2 + 2) * 1e9 / 8 / (16e9 * 0.8))
    assert 0 < times[1]["host_link"] < times[2]["host_link"]


def test_ranks_on_one_machine_cost_one_machine() -> None:
    work = workload_of(collate([sample(i) for i in range(32)], SPEC), 8)
    config = config_of(**BIG)
    one, two = (forecast(config, config.model, SPEC, work, CPU, n) for n in (1, 2))
    assert two.row(3.0)["cost"] == pytest.approx(3 * two.hours)
    quicker = replace(two, seconds={"all": 0.9 * one.step})
    assert plans.best([one, quicker]) == quicker
    gpus = [replace(row, device="h100") for row in (one, quicker)]
    assert plans.best(gpus) == gpus[0] and gpus[1].row(3.0)["cost"] == pytest.approx(6 * gpus[1].hours)


LARGE = Count(10**9, 10**9, 100, NOTHING)


def test_what_is_sent_between_ranks() -> None:
    h100 = DEVICES["h100"]
    times = {}
    for stage in (1, 2, 3):
        config = config_of(**{**BIG, "data": {"batch": 64}}, zero={"stage": stage}, accumulate=4)
        times[stage] = between_ranks(config, h100, 8, LARGE)
    assert times[1] == pytest.approx(2 * 2e9 * 7 / 8 / h100.link)
    assert times[1] < times[2] < times[3]
    assert between_ranks(config, h100, 1, LARGE) == 0
    assert between_ranks(config, h100, 16, LARGE) > 5 * times[3]  # over the network


def test_what_is_not_trained_takes_no_gradient_and_no_state() -> None:
    work = workload_of(collate([sample(i) for i in range(32)], SPEC), 8)
    config = config_of(**BIG, zero={"stage": 2})
    whole = forecast(config, config.model, SPEC, work, DEVICES["h100"], 8)
    rests = config.model_copy(update={"freeze": [FreezeConfig(modules=["blocks"])]})
    part = forecast(rests, config.model, SPEC, work, DEVICES["h100"], 8)
    trained = counted(rests, config.model, SPEC).trained
    assert part.parameters == whole.parameters and 0 < trained < 0.5 * whole.parameters
    assert part.memory["optimizer"] == pytest.approx(16 * trained / 8) and part.memory["weights"] == 2 * part.parameters
    assert part.memory["gradients"] == pytest.approx(2 * trained / 8)
    assert 0.66 * whole.flops < part.flops < whole.flops and part.step < whole.step


def test_a_share_is_a_part_of_the_whole() -> None:
    work = workload_of(collate([sample(i) for i in range(64)], SPEC))
    part = work.share(4)
    assert part.rows == 16
    assert part.shape.tokens == pytest.approx(work.shape.tokens / 4, rel=0.02)
    assert part.shape.targets == -(-work.shape.targets // 4)


def test_the_table_of_a_story_without_shards(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["plan", "demo", "--out", str(tmp_path), "--gpu", "a100-40", "--gpus", "1,16", "--price", "2", "--json"]
    assert main([*command, "--zero", "1,3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(r["ranks"], r["stage"]) for r in told["rows"]] == [(1, 1), (1, 3), (16, 1), (16, 3)]
    one, many = told["rows"][0], told["rows"][3]
    assert one["cost"] == pytest.approx(2 * one["hours"]) and many["cost"] == pytest.approx(32 * many["hours"])
    assert any("no shards yet" in line for line in told["assumptions"])
    assert main(command[:-1]) == 0
    assert "least device time" in capsys.readouterr().out
    assert main(["plan", "demo", "--gpu", "h1000"]) == 2
    assert "one of cpu, b200" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100"), ("NVIDIA H100 PCIe", 79.2, "h100-pcie"), ("NVIDIA H200", 140, "h200"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"), ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40"), ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA L4", 22, "l4"), ("Tesla V100-SXM2-16GB", 15.8, "v100-16"), ("Tesla V100-SXM2-32GB", 31.7, "v100-32"),
        ("Tesla T4", 14.6, "t4"), ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"), ("AMD Instinct MI300X", 192, "mi300x"),
        ("NVIDIA L40", 44.4, None), ("NVIDIA GeForce GTX 1080", 8, None),
    ],
)  # fmt: skip
def test_a_device_by_the_name_that_its_driver_gives(said: str, gib: float, name: str | None) -> None:
    found = devices.named(said, gib * 2**30)
    assert found is (DEVICES[name] if name else None)


def test_a_lone_train_yaml_is_planned(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("steps: 7\nmodel: {width: 64, heads: 2}\n")
    what = plans.subject(str(tmp_path / "train.yaml"), ["train.steps=9"], tmp_path / "out")
    assert what.config.steps == 9 and what.config.model.width == 64 and what.shards is None
    with pytest.raises(ConfigError, match="numbers such as"):
        plans.numbers("a,b", "--gpus")
    with pytest.raises(ConfigError, match="at least 1"):
        plans.numbers("0,1", "--gpus", least=1)
    assert main(["plan", "demo", "--gpu", "h100", "--gpus", "0"]) == 2


def test_views_are_planned_before_there_are_shards(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("model: {width: 64, layers: 2, heads: 2, embedding: 16}\ndata: {batch: 8}\n")
    (tmp_path / "shard.yaml").write_text("features: {max_len: 256, image: {size: 32, patch: 8, channels: 1}}\n")
    of = {}
    for between in ("", "[[image, context]]", "[[image, audio]]"):
        loss = [f"train.loss.contrastive={{between: {between}}}"] if between else []
        what = plans.subject(str(tmp_path / "train.yaml"), loss, tmp_path / "out")
        work = plans.work_of(what)
        of[between] = (forecast(what.config, what.config.model, what.spec, work, CPU, 1), work.views)
    (plain, none), (both, views), (picture, alone) = of.values()
    assert none is None and views and alone
    assert sorted(alone.lengths) == [18] * 8  # 16 patches, <bos> and <answer>; there is no sound
    assert sorted(views.lengths) == [18] * 8 + [256 - 16 + 2] * 8 and views.patches == alone.patches == 8 * 16
    assert plain.tokens == both.tokens == picture.tokens == 8 * 256
    assert plain.flops < picture.flops < both.flops < 2 * plain.flops


def test_what_a_rank_keeps_of_its_samples() -> None:
    corpus = Corpus(samples=1000, a_step=20, decoded=1e6, mapped=5e8, cache=5e8)
    assert corpus.seen(1, 2) == pytest.approx(0.01, rel=0.01) and corpus.seen(10_000, 2) == pytest.approx(1)
    assert corpus.cached(1, 2) == pytest.approx(1e7, rel=0.01) and corpus.cached(10_000, 2) == 5e8
    assert corpus.read_anew(1, 2) > 0.99  # nothing comes twice
    assert corpus.read_anew(10_000, 2) == pytest.approx(0.505, rel=0.01)  # half of them fit
    roomy = replace(corpus, cache=2e9)
    assert roomy.read_anew(1000, 2) == pytest.approx(0.1, rel=0.01)  # each of 1,000 is read once in 10,000 draws


def test_a_story_is_planned_with_its_distillation(
    keypad_shards: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(keypad_shards.path, tmp_path / "shards")
    sets = [f"{verb}.{what}" for verb in ("train", "distill") for what in ("model.width=32", "data.batch=8")]
    command = ["plan", "demo", "--out", str(tmp_path), "--gpu", "cpu", "--gpus", "1", "--zero", "2", "--json"]
    assert main([*command, *(word for change in sets for word in ("--set", change))]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    (taught,), (alone,) = told["distill"]["rows"], told["rows"]
    assert (
        told["verb"] == "train" and told["distill"]["verb"] == "distill" and told["distill"]["steps"] != told["steps"]
    )
    assert taught["memory"]["teacher"] == 2 * alone["parameters"] and taught["seconds"]["forward_backward"] > 0
    assert alone["memory"]["cache"] > 0 and alone["memory"]["mapped"] <= keypad_shards.counts["bytes"]
    assert "pack:" not in said.err


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (0, "fp32"), (2, "fp32")]
)
def test_memory_of_real_ranks_is_as_planned(stage: int, precision: str, tmp_path: Path) -> None:
    settings = {**BIG, "precision": precision, "zero": {"stage": stage}}
    ranks(2)("tests.train.test_planning:train_a_little", {"settings": settings, "out": str(tmp_path)}, log=tmp_path)
    config = config_of(**settings)
    planned = forecast(config, config.model, SPEC, workload_of(_batch(0), 2), CPU, 2)
    # these ranks have fewer libraries and kernels than a training: what they held before the model stands for the plan's share
    parts = planned.held - planned.memory["checkpoint"] - planned.memory["process"]
    for rank in (0, 1):
        before, peak = (float((tmp_path / f"{when}-{rank}").read_text()) for when in ("before", "peak"))
        assert peak == pytest.approx(before + parts, rel=0.15)
    # of a step while the checkpoint is written, some of it in pages that were free; the others only help to gather it
    first, other = (float((tmp_path / f"saved-{rank}").read_text()) for rank in (0, 1))
    assert 0.6 < (first - other) / planned.memory["checkpoint"] < 1.25
    assert other - float((tmp_path / "peak-1").read_text()) < 0.1 * planned.memory["checkpoint"]


def _batch(step: int) -> Batch:
    return collate([sample(100 * step + i) for i in range(16)], SPEC)


def train_a_little(settings: dict[str, Any], out: str) -> None:
    """On each rank: three steps, and one beside a checkpoint in memory; the most that was resident is written down."""
    from mmlm import world as worlds
    from mmlm.train import engine

    config, world = config_of(**settings), worlds.from_environment()
    engine.start(world)
    Path(out, f"before-{world.rank}").write_text(str(devices.resident()))
    trainer = engine.DeepSpeedEngine(weights.build(config.model, SPEC), config, world)
    objective = Answering(config.loss, SPEC)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here: building the model is left out
    for step in range(4):
        if step == 3:
            Path(out, f"peak-{world.rank}").write_text(str(_peak()))
            state = trainer.state()  # which a thread writes while training goes on
            Path("/proc/self/clear_refs").write_text("5")
        batch = _batch(step)
        counts = {name: value * world.size for name, value in objective.counts(batch).items()}
        trainer.backward(loss_of(objective(trainer.model, batch), counts))
        trainer.update(1e-3)
    Path(out, f"saved-{world.rank}").write_text(str(_peak()))
    assert bool(state) == world.is_main


def _peak() -> int:
    """The most bytes that were resident."""
    peak = re.search(r"^VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)
    assert peak
    return int(peak[1]) * 1024


def test_a_finished_training_says_what_was_planned(keypad_shards: Artifact, tmp_path: Path) -> None:
    from mmlm.train import expected
    from mmlm.world import World

    config = config_of(model={"width": 32, "layers": 1, "heads": 2}, data={"batch": 16})
    expected.write(config, config.model, _spec(keypad_shards), keypad_shards.path, tmp_path, World(0, 2))
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert planned["step_seconds"] > 0 and planned["memory_bytes"] > 2 * 400e6
    written = (tmp_path / "plan.json").stat().st_mtime_ns
    expected.write(config, config.model, _spec(keypad_shards), keypad_shards.path, tmp_path, World(0, 2))
    assert (tmp_path / "plan.json").stat().st_mtime_ns == written  # an attempt on as many ranks keeps it
    expected.write(config, config.model, _spec(keypad_shards), keypad_shards.path, tmp_path, World(0, 1))
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert planned["ranks"] == 1
    rows = [
        {"step": n, "time": planned["since"] + n, "metrics": {"step_seconds": s, "memory_rss_bytes": 2e9}}
        for n, s in ((-1, 7.0), (-2, 7.0), (1, 9.0), (2, 0.1), (3, 0.3))  # those before the plan ran in another way
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = expected.compared(tmp_path, planned["parameters"])
    assert told["measured"] == {"parameters": planned["parameters"], "step_seconds": 0.2, "memory_bytes": 2e9}
    assert told["predicted"]["step_seconds"] == planned["step_seconds"]
    assert "as planned" in told["plan"] and "200.0 ms a step" in told["plan"]
    assert expected.compared(tmp_path / "nowhere", 1) == {}


def test_every_way_to_run_has_a_plan_of_its_own(keypad_shards: Artifact, tmp_path: Path) -> None:
    from mmlm.train import expected
    from mmlm.world import World

    small = {"model": {"width": 32, "layers": 2, "heads": 2}, "data": {"batch": 16}}
    ways: list[dict[str, Any]] = [{}, {"zero": {"stage": 3}}, {"accumulate": 8}, {"recompute": 1}, {}]
    plans = []
    for way in ways:
        config = config_of(**small, **way)
        expected.write(config, config.model, _spec(keypad_shards), keypad_shards.path, tmp_path, World(0, 2))
        plans.append(json.loads((tmp_path / "plan.json").read_text()))
    assert [plan["how"]["zero"]["stage"] for plan in plans] == [2, 3, 2, 2, 2]
    assert len({json.dumps(plan["memory"]) for plan in plans[:3]}) == 3
    assert all(one["since"] < other["since"] for one, other in itertools.pairwise(plans))
    kept = (tmp_path / "plan.json").stat().st_mtime_ns
    config = config_of(**small, save_every=1, keep=9, log_every=1)  # neither the time nor the memory of a step
    expected.write(config, config.model, _spec(keypad_shards), keypad_shards.path, tmp_path, World(0, 2))
    assert (tmp_path / "plan.json").stat().st_mtime_ns == kept

    gone = config_of(**small, zero={"stage": 1})
    expected.write(gone, gone.model, _spec(keypad_shards), tmp_path / "no-shards", tmp_path, World(0, 2))
    assert not (tmp_path / "plan.json").exists()  # else stage 1 would be compared with what stage 2 takes


def _spec(shards: Artifact) -> Any:
    from mmlm.features import spec as feature_spec

    return feature_spec.load(shards.path)


def test_a_rank_is_tried_out_with_the_threads_that_it_will_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # as torchrun sets 1; ranks that we start keep it, too
    assert probe.threads(1) == probe.threads(2) == 3
    for none in ("", "0", "dynamic"):
        monkeypatch.setenv("OMP_NUM_THREADS", none)
        assert probe.threads(1) == cores() and probe.threads(10**6) == 1
