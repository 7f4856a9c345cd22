"""`mmlm advise`: facts, rules and forecasts on one page, as JSON, or as a train.yaml."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mmlm import plans
from mmlm.advise import facts as known
from mmlm.advise.facts import Facts
from mmlm.advise.rules import SIZES, Advice, Reason, advise
from mmlm.config import parse
from mmlm.errors import ConfigError
from mmlm.storage import write_bytes
from mmlm.train import planning, weights
from mmlm.train.config import TrainConfig
from mmlm.train.devices import Device, find

HOURS = 8.0
"""A training may take so long: a night."""


def compose(given: str, out: Path | None = None, hours: float = HOURS) -> dict[str, Any]:
    """The whole page as plain values. Raises ArtifactError or ConfigError when nothing is known of `given`."""
    facts, here = known.look(given, out), known.machine()
    if not facts.train:
        raise ConfigError(f"{given} has no record to learn from", cure="look into its refused or quarantine table")
    device = find(None)
    ranks = [n for n in (1, 2, 4, 8) if n <= (len(here.gpus) or min(2, here.cores))]
    advice = advise(facts, here, hours, _cost(facts, device, ranks[-1]))
    chosen = _subject(facts, advice.model, advice.settings)
    work = plans.work_of(chosen)
    forecasts = plans.table(chosen, work, device, ranks, plans.stages_of(None))
    best = plans.best(forecasts) or forecasts[-1]
    advice.settings["zero"] = {"stage": best.stage}
    if not best.fits:
        advice.warnings.append("this does not fit into this machine's memory: see `mmlm plan --gpu` for others")
    advice.reasons.append(
        Reason(f"zero.stage: {best.stage}, ranks: {best.ranks}",
               f"of {len(forecasts)} choices the one with the least device time that fits ({plans.size(best.bytes)} a rank)",
               "Rajbhandari et al. 2020; `mmlm plan` shows all")
    )  # fmt: skip
    data, machine = known.as_json(facts, here)
    measured = device.is_cpu and facts.shards is not None
    return {
        "data": data,
        "machine": {**machine, "device": device.name},
        "recommended": {
            "kind": advice.model.get("kind", "transformer"), "preset": advice.preset, "parameters": best.parameters,
            "ranks": best.ranks, "train": {**advice.settings, "model": advice.model},
        },
        "forecast": {
            "step_seconds": best.step, "hours": best.hours, "bytes_a_rank": best.bytes, "fits": best.fits,
            "tokens_a_step": best.tokens, "measured": measured,
        },
        "reasons": [dataclasses.asdict(reason) for reason in advice.reasons],
        "warnings": advice.warnings,
        "alternatives": _alternatives(facts, advice, device, ranks[-1]),
        "assumptions": plans.assumptions(chosen, device, work, measured),
    }  # fmt: skip


def _subject(facts: Facts, model: dict[str, Any], settings: dict[str, Any]) -> plans.Subject:
    config = parse(TrainConfig, {**settings, "model": model}, "advise")
    return plans.Subject(facts.name, config, facts.spec, facts.shards)


def _cost(facts: Facts, device: Device, ranks: int) -> Callable[..., tuple[int, float, bool]]:
    """Parameters, hours and whether it fits, by the planner alone: nothing is tried out."""
    works: dict[int, planning.Workload] = {}

    def cost(model: dict[str, Any], settings: dict[str, Any]) -> tuple[int, float, bool]:
        subject = _subject(facts, model, {"optimizer": {"lr": 1e-3}, **settings})
        batch = subject.config.data.batch
        if batch not in works:
            works[batch] = plans.work_of(subject)
        rows = [
            planning.forecast(
                subject.config.model_copy(update={"zero": subject.config.zero.model_copy(update={"stage": stage})}),
                subject.config.model, facts.spec, works[batch], device, ranks,
            )
            for stage in (2, 3)
        ]  # fmt: skip
        row = next((row for row in rows if row.fits), rows[-1])
        return row.parameters, row.hours, row.fits

    return cost


def _alternatives(facts: Facts, advice: Advice, device: Device, ranks: int) -> list[dict[str, Any]]:
    """The other kinds that could do it, with the same steps and batch."""
    cost, taken = _cost(facts, device, ranks), advice.model.get("kind", "transformer")
    models: dict[str, dict[str, Any]] = {
        "transformer": {"preset": SIZES[0]},
        "cnn": {"kind": "cnn"},
        "gru": {"kind": "gru"},
        "lstm": {"kind": "lstm"},
    }
    found = []
    for kind, model in models.items():
        if kind == taken:
            continue
        settings = {k: v for k, v in advice.settings.items() if k not in ("optimizer", "zero")}
        with contextlib.suppress(ConfigError):
            weights.check(_subject(facts, model, settings).config.model, facts.spec)
            parameters, hours, _ = cost(model, settings)
            found.append({"kind": kind, "model": model, "parameters": parameters, "hours": hours})
    return found


def words(found: dict[str, Any]) -> str:
    """The page for a terminal."""
    data, machine, chosen, forecast = (found[k] for k in ("data", "machine", "recommended", "forecast"))
    tasks = ", ".join(f"{t['name']} ({_task(t)})" for t in data["tasks"]) or "none"
    where = ", ".join(machine["gpus"]) or "no GPU"
    lines = [
        f"{data['name']}: {data['train']:,} records to learn from, {data['val']:,} to validate, {data['test']:,} to test; "
        f"{', '.join(data['modalities'])}; about {data['text_tokens']:,} tokens of text"
        + (f" and {data['media_tokens']:,} of pictures and sounds" if data["media_tokens"] else ""),
        f"  tasks: {tasks}",
        f"this machine: {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, {where}",
        "",
        f"recommended: {chosen['kind']} `{chosen['preset']}`, {chosen['parameters']:,} parameters, {chosen['ranks']} "
        f"rank{'s' if chosen['ranks'] > 1 else ''}",
        f"  about {time_of(forecast['hours'])} ({plans.duration(forecast['step_seconds'])} a step, "
        f"{plans.size(forecast['bytes_a_rank'])} a rank; {'the model was tried' if forecast['measured'] else 'planned'})",
        "",
        "why",
    ]
    for reason in found["reasons"]:
        source = f"  [{reason['source']}]" if reason["source"] else ""
        lines.append(f"  {reason['choice']}: {reason['why']}{source}")
    if found["warnings"]:
        lines += ["", "beware", *(f"  {warning}" for warning in found["warnings"])]
    if found["alternatives"]:
        lines += ["", "instead, with the same steps"]
        lines += [
            f"  {other['kind']}: {other['parameters']:,} parameters, about {time_of(other['hours'])}"
            for other in found["alternatives"]
        ]
    lines += ["", *found["assumptions"], "", "train.yaml (write it with --write FILE)"]
    lines += [f"  {line}" for line in _yaml(chosen["train"]).splitlines()]
    return "\n".join(lines)


def _task(task: dict[str, Any]) -> str:
    kinds = [f"{task['classes']} classes"] if task["classes"] else []
    kinds += ["a number"] if task["number"] else []
    kinds += ["text"] if task["text"] or not kinds else []
    return " and ".join(kinds)


def time_of(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.0f} days"
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.0f} minutes" if hours * 60 >= 1.5 else f"{max(1, hours * 3600):.0f} seconds"


def require_new(file: Path) -> None:
    """Raise ConfigError when there is such a file: it may be somebody's work."""
    if file.exists():
        raise ConfigError(f"{file} is there already", cure="give another --write, or move it away")


def write(found: dict[str, Any], file: Path) -> None:
    """The recommended train.yaml, as a new file."""
    require_new(file)
    head = [
        f"Advised by `mmlm advise` for {found['data']['name']}: about {time_of(found['forecast']['hours'])} on this machine.",
        *(f"{r['choice']}: {r['why']}" + (f" [{r['source']}]" if r["source"] else "") for r in found["reasons"]),
    ]
    comment = "".join(f"# {line}\n" for line in head)
    write_bytes(file, (comment + _yaml(found["recommended"]["train"])).encode())


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=110, allow_unicode=True)
