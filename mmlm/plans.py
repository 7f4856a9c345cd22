"""`mmlm plan`: what a story's training would take, on one device or many, before anything starts.

The shard set of `--out` gives the real lengths; without one, every sequence is taken to be full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from mmlm import artifacts
from mmlm import story as stories
from mmlm.compress.config import DistillConfig
from mmlm.config import DECIDED_BY_PRESET, apply_override, parse, read_yaml, split_override
from mmlm.errors import ConfigError
from mmlm.features import spec as feature_spec
from mmlm.features.spec import FeatureSpec
from mmlm.model.config import ModelConfig
from mmlm.model.presets import PRESETS
from mmlm.shards.config import ShardConfig
from mmlm.train.config import TrainConfig, ZeroConfig
from mmlm.train.devices import HOST_BANDWIDTH, NODE_LINK, PCIE_REACHED, Device
from mmlm.train.planning import Forecast, Measured, forecast
from mmlm.train.probe import Teaching
from mmlm.train.workload import Workload


@dataclass(frozen=True)
class Subject:
    """What is planned: the settings, and what is known of the data."""

    name: str
    config: TrainConfig | DistillConfig
    spec: FeatureSpec
    shards: Path | None
    """The finished shard set, if there is one."""
    verb: str = "train"
    teacher: Teaching | None = None
    """Of distillation."""
    after: DistillConfig | None = None
    """The distillation of the story, which is planned beside its training."""

    @property
    def student(self) -> Subject | None:
        """What is planned of the story's distillation."""
        if self.after is None:
            return None
        taught = Teaching(self.config.model, self.after.temperature, self.after.task)
        return replace(self, config=self.after, verb="distill", teacher=taught, after=None)


def subject(name: str, overrides: list[str], out: Path | None) -> Subject:
    """A story by name or folder, or a lone train.yaml (with the shard.yaml beside it)."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        raw = {"train": read_yaml(path) or {}, "shard": {}}
        beside = path.with_name("shard.yaml")
        if beside.is_file():
            raw["shard"] = read_yaml(beside) or {}
        for override in overrides:
            key, value = split_override(override)
            apply_override(raw, key, value, {"train": TrainConfig, "shard": ShardConfig})
        shard, train = parse(ShardConfig, raw["shard"], str(beside)), parse(TrainConfig, raw["train"], name)
        title, distill = path.parent.resolve().name, None
    else:
        story = stories.load(name, overrides)
        shard, train, title, distill = story.shard, story.train, story.name, story.distill
    shards = (out or Path("runs") / title) / stories.NOUNS["shard"]
    if (shards / artifacts.NAME).is_file():
        return _settled(Subject(title, train, feature_spec.load(shards), shards, after=distill))
    features = shard.features
    size = features.tokenizer.vocab_size
    if features.tokenizer.file:
        from mmlm.features.text import Tokenizer

        size = Tokenizer.load(Path(features.tokenizer.file).parent).vocab_size
    spec = FeatureSpec(
        vocab_size=size, tokenizer_digest="planned", max_len=features.max_len, image=features.image,
        audio=features.audio, tasks=[],
    )  # fmt: skip
    return _settled(Subject(title, train, spec, None, after=distill))


def _settled(what: Subject) -> Subject:
    """With the shapes of what was trained elsewhere, of which the settings tell the folder alone."""
    from mmlm.train import pretrained

    after = what.after and pretrained.settled(what.after, what.shards, what.spec)
    return replace(what, config=pretrained.settled(what.config, what.shards, what.spec), after=after)


def work_of(what: Subject) -> Workload:
    """The mean of the first real batches, or full sequences of which every text position is a target."""
    from mmlm.data.loader import Loader
    from mmlm.train import probe
    from mmlm.world import World

    config = what.config
    if what.shards:
        with contextlib.closing(
            Loader(what.shards, config.data, config.seed, World(), config.steps, quiet=True)
        ) as loader:
            return probe.workload(loader, config)
    return _assumed(what)


def _assumed(what: Subject) -> Workload:
    """Full sequences, each a record that gives all that the spec has."""
    from mmlm.model.flops import Shape

    config = what.config
    rows, length = config.data.batch, getattr(config.data.pack, "length", None) or what.spec.max_len
    patches = what.spec.image_positions(1)
    audio = what.spec.audio
    mels = -(-audio.max_frames // audio.frames_per_token) if audio else 0
    targets = max(1, length - patches - mels)
    shape = Shape((length,) * rows, rows * targets, rows, rows * patches, rows * mels)
    source = f"no shards yet: every sequence holds {length} positions, all text answered"
    if not config.loss.contrastive:
        return Workload(shape, rows, length, source)
    names = {name for pair in config.loss.contrastive.between for name in pair}
    held = {"image": patches, "audio": mels, "context": targets}  # a view takes up as much at most
    views = tuple(held[name] + 2 for name in sorted(names & held.keys()) if held[name]) * rows
    seen, heard = (rows * held[name] * (name in names) for name in ("image", "audio"))
    beside = Shape(views, 0, len(views), seen, heard, read=len(views))
    whole = Shape(
        shape.lengths + views, shape.targets, rows + len(views), shape.patches + seen, shape.mels + heard,
        read=shape.targets + len(views),
    )  # fmt: skip
    return Workload(whole, rows, length, f"{source}; every record has all views", None, beside)


def table(
    what: Subject, work: Workload, device: Device, counts: Sequence[int], stages: Sequence[int]
) -> list[Forecast]:
    """One forecast for each ZeRO stage and number of devices. Raises ConfigError when the batch is too small for all."""
    measured: dict[int, Measured | None] = {}
    rows = []
    for ranks in counts:
        if what.config.data.batch < ranks * what.config.accumulate:
            continue
        if device.is_cpu and what.shards:
            from mmlm.train import probe

            measured[ranks] = probe.measure(
                what.config, what.config.model, what.spec, what.shards, ranks, teacher=what.teacher
            )
        for stage in stages:
            zero = what.config.zero.model_copy(update=_possible(stage))
            config = what.config.model_copy(update={"zero": zero})
            rows.append(
                forecast(
                    config, config.model, what.spec, work, device, ranks, measured.get(ranks),
                    what.teacher.model if what.teacher else None,
                )
            )  # fmt: skip
    if not rows:
        raise ConfigError(
            f"a batch of {what.config.data.batch} on {min(counts)} devices, in {what.config.accumulate} pieces each",
            wanted="at least one sequence for each",
        )
    return rows


def presets(what: Subject, device: Device) -> list[dict[str, Any]]:
    """What a training of this story would take on one device with each preset that it can have."""
    work, rows = work_of(what), []
    given = what.config.model if isinstance(what.config.model, ModelConfig) else ModelConfig()
    for name in PRESETS:
        model = sized(given, name)
        try:
            row = forecast(what.config, model, what.spec, work, device, 1)
        except ConfigError:  # an encoder for tasks of words
            continue
        rows.append(
            {
                "preset": name, "width": model.width, "layers": model.layers, "heads": model.heads,
                "kv_heads": model.key_value_heads, "parameters": row.parameters, "flops_per_step": row.flops,
                "bytes": row.bytes, "fits": row.fits, "step_seconds": row.step, "hours": row.hours,
            }
        )  # fmt: skip
    return rows


def sized(model: ModelConfig, name: str) -> ModelConfig:
    """The same model in the sizes of a preset, as `--set train.model.preset=NAME` makes it."""
    kept = {key: value for key, value in model.model_dump(mode="json").items() if key not in DECIDED_BY_PRESET}
    return parse(ModelConfig, {**kept, "preset": name}, "model")


def words_of_presets(what: Subject, device: Device, rows: Sequence[dict[str, Any]]) -> str:
    """The table, for a terminal."""
    head = ["preset", "width", "layers", "heads", "parameters", "FLOPs a step", "memory", "a step", "hours"]
    body = [
        [
            row["preset"], str(row["width"]), str(row["layers"]), f"{row['heads']}/{row['kv_heads']}", f"{row['parameters']:,}",
            f"{row['flops_per_step']:.2e}", size(row["bytes"]) + ("" if row["fits"] else "!"), duration(row["step_seconds"]),
            f"{row['hours']:.3g}",
        ]
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(n) for cell, n in zip(line, widths, strict=True)) for line in [head, *body]]
    told = (
        f"{what.name} in every size, on one {device.name}, at ZeRO stage {what.config.zero.stage} "
        "(!: does not fit; by its data sheet, nothing was tried)"
    )
    return "\n".join([told, *lines, "choose one by --set train.model.preset=NAME; other keys beside it override it"])


def _possible(stage: int) -> dict[str, Any]:
    """The settings of a stage; what it cannot offload stays."""
    return (
        {"stage": stage}
        | ({"offload_optimizer": False} if stage == 0 else {})
        | ({"offload_parameters": False} if stage < 3 else {})
    )


def stages_of(given: str | None) -> list[int]:
    """`0,2,3` → numbers; by default every stage that the engine has."""
    known = [int(n) for n in get_args(ZeroConfig.model_fields["stage"].annotation)]
    wanted = numbers(given, "--zero") if given else known
    if unknown := set(wanted) - set(known):
        raise ConfigError(f"--zero {min(unknown)}", wanted=f"one of {known}")
    return wanted


def numbers(text: str, flag: str, least: int = 0) -> list[int]:
    """`1,2,4` → numbers. Raises ConfigError for what is none, or below `least`."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < least:
        raise ConfigError(f"{flag} {text}", wanted=f"numbers such as 1,2,4, at least {least}")
    return found


def assumptions(what: Subject, device: Device, work: Workload, measured: bool) -> list[str]:
    """What the figures rest on, for people."""
    lines = [f"a step: {work.rows:,} sequences of {work.length:,} positions, {work.tokens:,} real ones; {work.source}"]
    if work.views:
        lines.append(f"beside them {len(work.views.lengths):,} views of records with {work.views.tokens:,} positions")
    if device.is_cpu:
        lines.append(f"this machine: {device.measured}")
        lines.append(
            "seconds: the real model was tried on a real micro-batch"
            if measured
            else f"seconds: products at {device.efficiency:.0%} of that rate; shards, once made, let the real model be tried"
        )
        return lines
    lines.append(
        f"{device.name}: {device.peak / 1e12:,.0f} TFLOP/s bf16, {device.memory / 1e9:.0f} GB at "
        f"{device.bandwidth / 1e12:.2f} TB/s, {device.link / 1e9:.0f} GB/s to a neighbour, {NODE_LINK / 1e9:.0f} GB/s "
        f"between nodes of {device.per_node} (data sheets)"
    )
    lines.append(
        f"products reach {device.efficiency:.0%} of the peak, nothing overlaps, kernels start in "
        f"{device.launch * 1e6:.0f} µs, fused attention (assumed: no such device was at hand)"
    )
    lines.append(
        "every rank begins with the whole model in float32, in the host's memory and on its device, at every stage: a rank and "
        "a host show that where it is more than what the steps take"
    )
    if what.config.zero.offload_optimizer or what.config.zero.offload_parameters:
        lines.append(
            f"offloading: {device.pcie / 1e9:.0f} GB/s of PCIe to the host for each device, {PCIE_REACHED:.0%} of it reached; "
            f"{HOST_BANDWIDTH / 1e9:.0f} GB/s of the host's memory for all ranks of a node (assumed)"
        )
    return lines


def best(rows: Sequence[Forecast]) -> Forecast | None:
    """Of those that fit, the fewest hours of devices that are paid for; of equals, the lower stage."""
    fitting = [row for row in rows if row.fits]
    return min(fitting, key=lambda r: (round(r.hours * r.machines, 6), r.stage, r.ranks)) if fitting else None


def plan(
    what: Subject, device: Device, counts: Sequence[int], stages: Sequence[int], price: float | None
) -> dict[str, Any]:
    """The plan of the story's training, and below `distill` that of its distillation, if it has one."""
    work = work_of(what)
    told = found(what, work, device, table(what, work, device, counts, stages), price)
    return told | ({"distill": plan(what.student, device, counts, stages, price)} if what.student else {})


def found(
    what: Subject, work: Workload, device: Device, rows: Sequence[Forecast], price: float | None
) -> dict[str, Any]:
    """All of it, for JSON."""
    chosen = best(rows)
    measured = device.is_cpu and what.shards is not None
    return {
        "story": what.name,
        "verb": what.verb,
        "device": device.name,
        "parameters": rows[0].parameters,
        "steps": rows[0].steps,
        "tokens_per_step": rows[0].tokens,
        "flops_per_step": rows[0].flops,
        "assumptions": assumptions(what, device, work, measured),
        "rows": [row.row(price) for row in rows],
        "best": [chosen.ranks, chosen.stage] if chosen else None,
    }


def words(told: dict[str, Any]) -> str:
    """The table, for a terminal."""
    lines = [
        f"{told['verb']} {told['story']}: {told['parameters']:,} parameters, {told['steps']:,} steps of "
        f"{told['tokens_per_step']:,} tokens"
    ]
    head = [
        "devices",
        "zero",
        "a rank",
        "of it states",
        "activations",
        "host",
        "a step",
        "tokens/s",
        "MFU",
        "hours",
        "cost",
    ]
    body = []
    for row in told["rows"]:
        memory = row["memory"]
        states = sum(memory.get(k, 0.0) for k in ("weights", "gradients", "buffers", "optimizer", "average", "teacher"))
        mark = "" if row["fits"] else "  does not fit"
        if told["best"] == [row["ranks"], row["stage"]]:
            mark = "  least device time"
        body.append([
            str(row["ranks"]), str(row["stage"]), size(row["bytes"]), size(states), size(memory["activations"]),
            size(row["host_bytes"]), duration(row["step_seconds"]), f"{row['tokens_per_second']:,.0f}",
            f"{row['mfu']:.1%}", f"{row['hours']:.3g}", "-" if row["cost"] is None else f"{row['cost']:,.2f}{mark}",
        ])  # fmt: skip
        if row["cost"] is None:
            body[-1][-1] = f"-{mark}"
    widths = [max(len(line[i].partition("  ")[0]) for line in [head, *body]) for i in range(len(head))]
    for line in [head, *body]:
        cells = [cell.rjust(width) if "  " not in cell else cell for cell, width in zip(line, widths, strict=True)]
        cells[-1] = line[-1].partition("  ")[0].rjust(widths[-1]) + "".join(line[-1].partition("  ")[1:])
        lines.append("  " + "  ".join(cells))
    after = ["", words(told["distill"])] if "distill" in told else []
    return "\n".join([*lines, *told["assumptions"], *after])


def size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
