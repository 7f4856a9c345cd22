"""shard: Manifest → ShardSet. Plan, fan out, commit; every record ends in a shard or in quarantine, exactly once."""

from __future__ import annotations

import collections
import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmlm import artifacts, world
from mmlm.artifacts import Artifact, Work
from mmlm.config import identity, parse
from mmlm.corpus.manifest_files import require_whole
from mmlm.corpus.records import read_records
from mmlm.errors import ArtifactError, ConfigError, DataError
from mmlm.features import spec as feature_spec
from mmlm.features.report import token_report
from mmlm.features.text import FILE as TOKENIZER
from mmlm.progress import Progress
from mmlm.shards import page
from mmlm.shards.commit import JOURNAL, MANIFEST, QUARANTINE, Committer, read_published, reopen
from mmlm.shards.config import ShardConfig
from mmlm.shards.draw import drawn_for_report
from mmlm.shards.encoders import digests
from mmlm.shards.fanout import write_on_ray
from mmlm.shards.plan import RECIPE, Boundaries, Slot, borders, codec_versions, dropped, plan, read_units
from mmlm.shards.spec import find_tokenizer, make_spec
from mmlm.shards.write import TEMPORARY, UnitWriter, absolute

PAGE = "corpus.html"
"""The report for people; no part of the digest."""
REPORTED, OF_EACH_LANG = 500, 50
"""Records whose tokens are counted for the report of tokens per word, drawn over all; at least so many of each language."""


@dataclass(frozen=True)
class Places:
    """Where the work is done. None of it changes what comes out."""

    data: Path | str
    """The folder that relative media URIs stand in."""
    workers: int | None = None
    """Ray workers; default: one per core."""
    ray_address: str | None = None
    earlier: Artifact | None = None
    """A finished shard set whose tokenizer and shards are taken over where they fit."""
    borders: Boundaries = field(default_factory=dict)
    """Where the shards of an earlier plan end, so that their records stay together."""


def shard(
    config: ShardConfig,
    manifest: Artifact,
    *,
    data: Path | str,
    out: Path,
    workers: int | None = None,
    tracker: Any = None,
    ray_address: str | None = None,
    earlier: Artifact | None = None,
    retry: str | None = None,
) -> Artifact:
    """Turn the records of `manifest` into feature shards in folder `out`.

    `data` is the folder that relative media URIs stand in; `workers` Ray workers (default: one per core) share the
    work from `config.ray_from` records on. A killed run is taken up where it stopped and gives the same bytes.
    `earlier`: the shard set of the corpus before it grew; its tokenizer stays, and its shards are taken over.
    `retry`: in a finished shard set, make the shards again that lost samples for this reason (or `all`).
    Raises DataError when more samples fail than `config.error_budget` allows, or none was lost to `retry`; ArtifactError
    when files of `manifest` are missing or broken.
    """
    work = artifacts.begin(
        Path(out),
        "shards",
        recipe=RECIPE,
        config=config,
        parents={"manifest": manifest},
        extra={
            "codecs": codec_versions(video="video" in manifest.counts.get("modalities", {})),
            **digests(config.features),
            **dropped(config.features),
        },
    )
    if retry:
        kept = _reopen(work, retry, manifest)
        earlier = None  # it lost the same samples
    elif work.artifact:
        _finish_closing(work, manifest)
        return work.artifact
    else:
        earlier = earlier if earlier and earlier.recipe == RECIPE else None
        kept = _kept_borders(config, manifest, earlier)
    places = Places(data, workers, ray_address, earlier, kept)
    try:
        with tracker.run("shard", config, work) if tracker else contextlib.nullcontext() as run:
            made = _make(config, manifest, work, places)
            if run is not None:
                _report(run, made.counts, work.path)
            return made
    finally:
        work.release()


def _reopen(work: Work, reason: str, manifest: Artifact) -> Boundaries:
    """Take the units that lost samples to `reason` out of the finished set; returns where its shards end."""
    if not work.artifact:
        work.release()
        raise ArtifactError(
            f"{work.path} is not finished",
            wanted="a finished shard set to retry samples of",
            cure="run shard without --retry",
        )
    work.lock()
    try:
        require_whole(manifest.path, manifest.counts.get("kept"))  # while the finished set is still one
        kept = borders(read_published(work.path))
        reopen(work.path, reason)
        work.reopen()
    except BaseException:
        work.release()
        raise
    return kept


def _same(found: dict[str, Any], config: ShardConfig) -> bool:
    """Whether `found`, of a version that may be older, asks for what `config` does."""
    try:
        return identity(parse(ShardConfig, found, "an earlier shard set")) == identity(config)
    except ConfigError:
        return False


def _kept_borders(config: ShardConfig, manifest: Artifact, earlier: Artifact | None) -> Boundaries:
    """Where the shards of `earlier` end, if it has the same settings and was made of a manifest that this grew from."""
    if not earlier or not _same(earlier.config, config):
        return {}
    grown = earlier.parents["manifest"] in manifest.extra.get("history", [])
    return borders(read_published(earlier.path)) if grown else {}


def _finish_closing(work: Work, manifest: Artifact) -> None:
    """What comes after `artifact.json`, when a kill or a full disk kept the run that wrote it from doing so."""
    left = [work.path / name for name in (JOURNAL, TEMPORARY, artifacts.WORK)]
    if not any(path.exists() for path in left) and (work.path / PAGE).exists():
        return
    try:
        lock = artifacts.hold(work.path)
    except ArtifactError:  # the one that is making it is still here
        return
    with lock:
        if (work.path / artifacts.NAME).exists():  # nobody has reopened it since we looked
            Committer(work.path).clear()
            (work.path / artifacts.WORK).unlink(missing_ok=True)
            page.write_page(work.path, manifest.path, work.path / PAGE)


def _make(config: ShardConfig, manifest: Artifact, work: Work, places: Places) -> Artifact:
    require_whole(manifest.path, manifest.counts.get("kept"))
    tokenizer = find_tokenizer(manifest, config.features, work.path, places.earlier)
    spec = make_spec(manifest, config.features, tokenizer)
    tokenizer.save(work.path)
    feature_spec.save(spec, work.path)
    writer = UnitWriter(spec, tokenizer, config, absolute(places.data), work.path)
    counts, extra = _make_shards(config, manifest.path, writer, work.path, places)
    drawn = drawn_for_report(manifest.path, REPORTED, OF_EACH_LANG)
    sample = read_records(manifest.path, media=False, keep=drawn.__contains__)
    extra["tokens"] = token_report(sample, tokenizer, limit=len(drawn))
    made = work.finish(counts=counts, digest_of=[MANIFEST, feature_spec.FILE, TOKENIZER], extra=extra)
    Committer(work.path).clear()
    page.write_page(work.path, manifest.path, work.path / PAGE)
    return made


def _make_shards(
    config: ShardConfig, manifest: Path, writer: UnitWriter, out: Path, places: Places
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write and publish every unit that is not there yet; returns the stage's counts and what else is to be told."""
    slots = plan(manifest, config, writer.spec, places.borders)
    total = sum(slot.records for slot in slots)
    planned = {slot.unit_id: slot.name for slot in slots}
    committer = Committer(out)
    committer.resume(planned)
    # once: what is missing later on was taken out on purpose (--retry), or is being made
    adopted = committer.adopt(places.earlier.path, planned) if places.earlier and not committer.done else 0
    missing = [slot for slot in slots if slot.unit_id not in committer.done]
    on_ray = places.ray_address is not None or sum(slot.records for slot in missing) >= max(1, config.ray_from)
    workers = (places.workers or world.cores()) if on_ray else 1
    failed = sum(len(row["quarantine"]) for row in committer.done.values())
    with Progress("shard", total, "records") as progress:
        progress.resume_at(sum(row["records"] for row in committer.done.values()))
        for written in _written(missing, manifest, writer, workers, on_ray, places.ray_address):
            committer.commit(written)
            progress.add(written.records)
            failed += len(written.quarantine)
            if failed > config.error_budget * total:
                _stop_over_budget(committer, failed, total, config.error_budget)
    committer.close()
    return _count(committer, workers, total, adopted), {"stragglers": stragglers(committer.rows())}


def _written(
    slots: list[Slot], manifest: Path, writer: UnitWriter, workers: int, on_ray: bool, address: str | None
) -> Iterator[Any]:
    units = read_units(manifest, slots)
    if slots:
        yield from write_on_ray(units, writer, workers, address) if on_ray else map(writer.write, units)


def stragglers(rows: list[dict[str, Any]], most: int = 5) -> dict[str, Any]:
    """Which units took long, of those written in this run: seconds per record, their median and the slowest.

    A unit is a straggler when it took more than twice the median per record, and at least a second.
    """
    timed = [row for row in rows if row.get("seconds")]
    if not timed:
        return {}
    each = {row["name"]: row["seconds"] / row["records"] for row in timed}
    median = statistics.median(each.values())
    slow = [row for row in timed if each[row["name"]] > 2 * median and row["seconds"] >= 1]
    by_worker: collections.Counter[str] = collections.Counter()
    for row in timed:
        by_worker[row["worker"]] += row["seconds"]
    return {
        "units": len(timed),
        "median_seconds": round(statistics.median(row["seconds"] for row in timed), 3),
        "median_milliseconds_a_record": round(1000 * median, 3),
        "seconds_by_worker": {name: round(seconds, 3) for name, seconds in sorted(by_worker.items())},
        "slow": [
            {
                "shard": row["name"], "seconds": row["seconds"], "times_median": round(each[row["name"]] / median, 1),
                "worker": row["worker"], "records": row["records"], "bytes": row["bytes"],
            }
            for row in sorted(slow, key=lambda row: -each[row["name"]])[:most]
        ],
    }  # fmt: skip


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


def _count(committer: Committer, workers: int, total: int, adopted: int) -> dict[str, Any]:
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
        "left_out": sum(row["left_out"] for row in rows),
        "workers": workers,
        **({"taken_over": adopted} if adopted else {}),
    }


def _report(run: Any, counts: dict[str, Any], path: Path) -> None:
    run.metrics({name: value for name, value in counts.items() if isinstance(value, int | float)})
    for name in (feature_spec.FILE, QUARANTINE, PAGE):
        if (path / name).exists():
            run.artifact(path / name)
