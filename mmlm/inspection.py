"""What is in a noun, for people and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmlm import artifacts
from mmlm.errors import ArtifactError


def look(path: Path) -> dict[str, Any]:
    """The facts of the noun in folder `path`, or of every noun of a run. Raises ArtifactError when there is none."""
    if not (path / artifacts.NAME).exists() and path.is_dir():
        nouns = sorted(p.parent.name for p in path.glob(f"*/{artifacts.NAME}"))
        if nouns:
            return {"kind": "run", "path": str(path), "nouns": {name: look(path / name) for name in nouns}}
    found = artifacts.read(path)
    facts: dict[str, Any] = {
        "kind": found.kind, "path": str(path), "fingerprint": found.fingerprint, "digest": found.digest,
        "parents": found.parents, "created": found.created, "seconds": found.seconds, "code_version": found.code_version,
        "run_id": found.run_id, "counts": found.counts, "config": found.config,
    }  # fmt: skip
    for name in ("feature_spec.json", "registered.json"):
        if (path / name).exists():
            facts[name.removesuffix(".json")] = json.loads((path / name).read_text(encoding="utf-8"))
    for key in ("stragglers", "curation", "tokens"):
        if found.extra.get(key):
            facts[key] = found.extra[key]
    if (path / "corpus.html").exists():
        facts["page"] = str(path / "corpus.html")
    if found.kind == "report":
        facts["scores"] = json.loads((path / "scores.json").read_text(encoding="utf-8"))
    for table in ("refused", "quarantine"):
        if (path / f"{table}.parquet").exists():
            facts[table] = _reasons(path / f"{table}.parquet")
    return facts


def _reasons(path: Path) -> dict[str, int]:
    """How many rows of a refused or quarantine table have which reason."""
    import collections

    import pyarrow.parquet as pq

    try:
        return dict(collections.Counter(pq.read_table(path, columns=["reason"]).column("reason").to_pylist()))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error})", cure="make the noun again") from None


def words(found: dict[str, Any]) -> str:
    """`look`'s facts on a few lines."""
    if found["kind"] == "run":
        return "\n\n".join(words(noun) for noun in found["nouns"].values())
    lines = [
        f"{found['kind']}  {found['path']}",
        f"  made {found['created']} in {found['seconds']:.1f} s by mmlm {found['code_version']}",
    ]
    lines.append(f"  fingerprint {found['fingerprint'][:16]}  digest {found['digest'][:16]}")
    for name, digest in found["parents"].items():
        lines.append(f"  from {name} {digest[:16]}")
    for name, value in found["counts"].items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"  {name}: {text}")
    for table in ("refused", "quarantine"):
        if found.get(table):
            lines.append(f"  {table}: " + ", ".join(f"{reason} {n}" for reason, n in found[table].items()))
    if times := found.get("stragglers"):
        each = f"{times['median_milliseconds_a_record']} ms a record (median)"
        slow = ", ".join(f"{s['shard']} {s['times_median']}x on {s['worker']}" for s in times["slow"])
        lines.append(f"  {times['units']} shards written, {each}; slow: {slow or 'none'}")
    if page := found.get("page"):
        lines.append(f"  to look at: {page}")
    if spec := found.get("feature_spec"):
        lines.append(
            f"  vocabulary {spec['vocab_size']}, longest sequence {spec['max_len']}, image {spec['image']}, audio {spec['audio']}"
        )
        for task in spec["tasks"]:
            lines.append(
                f"  task {task['name']}: {len(task['labels'])} classes, languages {', '.join(task['langs']) or 'any'}"
            )
    for row in found.get("scores", []):
        if row["lang"] == "all" and row["metric"] in ("accuracy", "exact_match", "chrf"):
            lines.append(
                f"  {row['model']:<16} {row['task']:<10} {row['metric']:<12} {row['modalities']:<24} "
                f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] n {row['n']}"
            )
    if registered := found.get("registered"):
        lines.append(f"  {registered.get('model_uri')}: {registered.get('reason')}")
    return "\n".join(lines)
