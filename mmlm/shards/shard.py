"""shard: Manifest → ShardSet. Plan, fan out, commit; every record ends in a shard or in quarantine, exactly once."""

from __future__ import annotations

import collections
import contextlib
from pathlib import Path
from typing import Any

from mmlm import artifacts, world
from mmlm.artifacts import Artifact
from mmlm.errors import DataError
from mmlm.features import spec as feature_spec
from mmlm.features.text import FILE as TOKENIZER
from mmlm.progress import Progress
from mmlm.shards.commit import MANIFEST, QUARANTINE, Committer
from mmlm.shards.config import ShardConfig
from mmlm.shards.fanout import write_on_ray
from mmlm.shards.plan import RECIPE, codec_versions, plan_units
from mmlm.shards.spec import find_tokenizer, make_spec
from mmlm.shards.write import UnitWriter, absolute


def shard(
    config: ShardConfig,
    manifest: Artifact,
    *,
    data: Path | str,
    out: Path,
    workers: int | None = None,
    tracker: Any = None,
    ray_address: str | None = None,
) -> Artifact:
    """Turn the records of `manifest` into feature shards in folder `out`.

    `data` is the folder that relative media URIs stand in; `workers` Ray workers (default: one per core) share the
    work from `config.ray_from` records on. A killed run is taken up where it stopped and gives the same bytes.
    Raises DataError when more samples fail than `config.error_budget` allows.
    """
    work = artifacts.begin(
        Path(out),
        "shards",
        recipe=RECIPE,
        config=config,
        parents={"manifest": manifest},
        extra={"codecs": codec_versions()},
    )
    if work.artifact:
        return work.artifact
    try:
        with tracker.run("shard", config, work) if tracker else contextlib.nullcontext() as run:
            tokenizer = find_tokenizer(manifest, config.features, work.path)
            spec = make_spec(manifest, config.features, tokenizer)
            tokenizer.save(work.path)
            feature_spec.save(spec, work.path)
            writer = UnitWriter(spec, tokenizer, config, absolute(data), work.path)
            counts = _make_shards(config, manifest.path, writer, work.path, workers or world.cores(), ray_address)
            if run is not None:
                _report(run, counts, work.path)
            made = work.finish(counts=counts, digest_of=[MANIFEST, feature_spec.FILE, TOKENIZER])
            Committer(work.path).clear()
            return made
    finally:
        work.release()


def _make_shards(
    config: ShardConfig, manifest: Path, writer: UnitWriter, out: Path, workers: int, address: str | None
) -> dict[str, Any]:
    """Write and publish every unit that is not there yet; returns the stage's counts."""
    planned: dict[str, str] = {}
    total = 0
    for unit in plan_units(manifest, config, writer.spec):
        planned[unit.unit_id] = unit.name
        total += len(unit.rows)
    committer = Committer(out)
    committer.resume(planned)
    on_ray = address is not None or total >= config.ray_from
    workers = workers if on_ray else 1
    missing = (unit for unit in plan_units(manifest, config, writer.spec) if unit.unit_id not in committer.done)
    failed = sum(len(row["quarantine"]) for row in committer.done.values())
    with Progress("shard", total, "records") as progress:
        progress.resume_at(sum(row["records"] for row in committer.done.values()))
        if len(committer.done) < len(planned):
            for written in write_on_ray(missing, writer, workers, address) if on_ray else map(writer.write, missing):
                committer.commit(written)
                progress.add(written.records)
                failed += len(written.quarantine)
                if failed > config.error_budget * total:
                    _stop_over_budget(committer, failed, total, config.error_budget)
    committer.close()
    return _count(committer, workers, total)


def _reasons(committer: Committer) -> collections.Counter[str]:
    return collections.Counter(q["reason"] for row in committer.rows() for q in row["quarantine"])


def _stop_over_budget(committer: Committer, failed: int, total: int, budget: float) -> None:
    """Leave the quarantine table for reading and raise. The next run tries the failed units again."""
    committer.write_quarantine()
    reason, count = _reasons(committer).most_common(1)[0]
    first = next(q for row in committer.rows() for q in row["quarantine"] if q["reason"] == reason)
    committer.forget_failures()
    raise DataError(
        f"{failed:,} of {total:,} records failed so far, most often as `{reason}` ({count:,}), "
        f"such as {first['source'] or first['id']}: {first['detail']}",
        wanted=f"at most {budget:.1%} (shard.error_budget)",
        cure=f"see {committer.out / QUARANTINE}; mend or remove those files and scan again, or raise the budget",
    )


def _count(committer: Committer, workers: int, total: int) -> dict[str, Any]:
    rows = committer.rows()
    sums = {key: sum(row[key] for row in rows) for key in ("records", "samples", "bytes", "images", "sounds", "tokens")}
    quarantined = sum(len(row["quarantine"]) for row in rows)
    if not sums["records"] == total == sums["samples"] + quarantined:
        raise RuntimeError(f"{total} records, but {sums} and {quarantined} quarantined: a record was lost or doubled")
    if not sums["samples"]:
        raise DataError("no record became a sample", cure=f"see {committer.out / QUARANTINE}")
    return {
        **sums,
        "quarantined": quarantined,
        "quarantine_reasons": dict(sorted(_reasons(committer).items())),
        "shards": sum(bool(row["samples"]) for row in rows),
        "cut_sounds": sum(row["cut_sounds"] for row in rows),
        "workers": workers,
    }


def _report(run: Any, counts: dict[str, Any], path: Path) -> None:
    run.metrics({name: value for name, value in counts.items() if isinstance(value, int | float)})
    for name in (feature_spec.FILE, QUARANTINE):
        run.artifact(path / name)
