"""scan: raw corpora → Manifest.

Everything found is either kept (a row of `records-*.parquet`, sorted by id), refused (a row of `refused.parquet` with
a typed reason) or dropped by curation (a row of `curation.parquet`): found = kept + refused + dropped, always. The
manifest does not depend on the order in which files or lines are listed. Memory: sorted runs go to disk; what grows
with the corpus is one small entry per group (about 200 bytes), 16 bytes per use of a picture, sound or video, 8 bytes per
record and, for tables without ids, one entry per row.

A corpus that grew is scanned as a whole, and each record that stands in the earlier manifest as it does now keeps its
generation there; the others are a new generation. So what comes out is what one scan of everything would give, and
shards know what is new.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from html import escape
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmlm import artifacts, remote
from mmlm.artifacts import Artifact, Work
from mmlm.config import blank_credentials, resolved
from mmlm.corpus.config import (
    ChatSource,
    FolderSource,
    HfSource,
    KeypadSource,
    ScanConfig,
    SidecarSource,
    TableSource,
    WebDatasetSource,
)
from mmlm.corpus.counts import Sizes, Tally
from mmlm.corpus.curation.curator import CURATED, Curator, libraries, told_key
from mmlm.corpus.drafts import Draft, Outcomes, Refusal, refused_row
from mmlm.corpus.generations import Generations
from mmlm.corpus.keypad import write_keypad
from mmlm.corpus.media import Looked, MediaReader
from mmlm.corpus.readers.sources import files_of, read_source, wordings
from mmlm.corpus.records import REFUSED, SCHEMA, to_row
from mmlm.corpus.sorting import Sorter
from mmlm.corpus.splits import Splitter
from mmlm.errors import DataError
from mmlm.progress import Progress, tell
from mmlm.storage import atomic_write, is_remote, resolve, sha256_json, split_fragment
from mmlm.world import cores

RECIPE = 8
"""Bumped by hand when the manifest made of the same corpus changes."""
REFUSED_FILE = "refused.parquet"
DROPPED_FILE = "dropped.parquet"
CURATED_FILE = "curation.parquet"
ROWS_PER_FILE = 2_000_000
"""Records in one Parquet file of the manifest."""
_ROW_GROUP, _GROUP_BYTES = 16_384, 16 << 20
"""Rows of a row group, and bytes of text and inline media in it, at most."""
UNLABELLED = {
    "no_label": "records are marked as having no label; they are left out",
    "no_split": "files lie beside the folders of the splits, in one that is none; they are left out",
}
"""Reasons that are no fault of what is refused, and do not count towards `error_budget`."""
_ASKED_AT_ONCE = 10_000
"""Objects elsewhere that are asked about together."""
_SPOOL = SCHEMA.append(pa.field("where", pa.string()))


def scan(
    config: ScanConfig, *, data: Path | str, out: Path, tracker: Any = None, earlier: Artifact | None = None
) -> Artifact:
    """Read the corpora below `data`, a folder or an address (s3://, gs://), into a manifest in folder `out`.

    `earlier` is the manifest of the corpus before it grew, if there is one. Raises DataError when a source is not
    there, nothing (or nothing to train on) is kept, or more is refused than the error budget allows; `refused.parquet`
    is then in `out` all the same.
    """
    data = str(data) if is_remote(str(data)) else Path(data)
    for source in config.sources:
        if isinstance(data, str):
            break
        if isinstance(source, KeypadSource):
            write_keypad(source, config.split, data)
        if isinstance(source, FolderSource | SidecarSource) and not is_remote(source.path):
            _require_outside(Path(out), data / source.path)
    made_of: dict[str, Any] = {"sources": listing(config, data)}
    made_of |= {"libraries": found} if (found := libraries(config.curate)) else {}
    work = artifacts.begin(out, "manifest", recipe=RECIPE, config=config, extra=made_of)
    if work.artifact:
        return work.artifact
    try:
        run = tracker.run("scan", config, work) if tracker else contextlib.nullcontext()
        with run as tracked:
            artifact = _make(config, data, work, earlier)
            if tracked:
                _track(tracked, config, artifact)
            return artifact
    finally:
        work.release()


def _require_outside(out: Path, data: Path) -> None:
    """Raise DataError when what is made would be found among the class folders by the next run."""
    if out.resolve().is_relative_to(data.resolve()):
        raise DataError(
            f"{out} lies inside the data folder {data}", cure="give --out elsewhere, such as --out ../runs/NAME"
        )


def _make(config: ScanConfig, data: Path | str, work: Work, earlier: Artifact | None) -> Artifact:
    spool = Sorter(work.path / ".spool", _SPOOL, _record_key)
    refused = Sorter(work.path / ".refused", REFUSED, _refused_key)
    dropped = Sorter(work.path / ".dropped", REFUSED, _refused_key)
    told = Sorter(work.path / ".curation", CURATED, told_key)
    curation = Curator(config.curate, told, wordings(config.sources))
    sizes, splitter, cut = Sizes(), Splitter(config.split), Counter[str]()
    try:
        with Progress("scan", None, "records") as progress:
            for outcome in _outcomes(config, data, curation, cut):
                if isinstance(outcome, Refusal):
                    refused.add(refused_row(outcome))
                else:
                    spool.add({**to_row(outcome.record), "where": outcome.where})
                    splitter.note(outcome.record.group, outcome.record.split, outcome.media)
                    for header in outcome.headers:
                        sizes.add(header)
                    for part in outcome.dropped:
                        dropped.add(refused_row(part))
                progress.add(1, f"{refused.count} refused" if refused.count else "")
        splitter.decide()
        curation.compare(lambda: _settled(spool, splitter), data, work.path / ".curating")
        tally, generations = Tally(), Generations(earlier if earlier and earlier.recipe == RECIPE else None)
        settled = _settled(spool, splitter, lambda row: refused.add(_doubled_row(row)))
        records = _write_records(work.path, generations.of(tally.of(curation.left(settled))))
        reasons: Counter[str] = Counter()
        _write(work.path / REFUSED_FILE, REFUSED, _counted(refused, reasons))
        if config.on_bad_part == "drop_part":
            _write(work.path / DROPPED_FILE, REFUSED, dropped.rows())
        if curation.on:
            _write(work.path / CURATED_FILE, CURATED, curation.told.rows())
        # a doubled id is counted once as found and lies in both sorters
        found = spool.count + refused.count - reasons["duplicate_id"] + curation.dropped_early
        counts = {"found": found, "kept": sum(tally.splits.values()), "refused": refused.count, **tally.counts()}
        counts["refused_reasons"] = dict(sorted(reasons.items()))
        if curation.on:
            counts |= {"dropped": curation.dropped, "curation": curation.totals()}
        if config.on_bad_part == "drop_part":
            counts["dropped_parts"] = dropped.count
        if earlier:
            counts |= {"unchanged": generations.kept, "added": counts["kept"] - generations.kept}
            counts["removed"] = generations.removed
        if splitter.torn:
            counts["groups_in_two_splits"] = len(splitter.torn)
        counts |= {"groups_joined_by_media": splitter.joined} if splitter.joined else {}
        counts |= {"groups_not_joined_by_media": splitter.apart} if splitter.apart else {}
        counts |= {"media_in_two_splits": splitter.across} if splitter.across else {}
        counts |= {"train_copies_of_held_out": copies} if (copies := tally.copies()) else {}
        counts |= {name: n for name, n in cut.items() if n}
        _require_useful(config, counts, work.path)
        _warn(config, counts)
    finally:
        for sorter in (spool, refused, dropped, curation.told):
            sorter.close()
    extra: dict[str, Any] = {"tasks": tally.tasks(), "fields": tally.fields(), "media": sizes.summary()}
    extra["generation"] = generations.newest
    if unseen := tally.unseen_labels():
        extra["unseen_labels"] = unseen
    if curation.on:
        extra["curation"] = curation.by_source()
    if earlier:
        extra["history"] = [*earlier.extra.get("history", []), earlier.digest]
    return work.finish(counts=counts, digest_of=records, extra=extra)


def _outcomes(config: ScanConfig, data: Path | str, curation: Curator, cut: Counter[str]) -> Iterator[Looked | Refusal]:
    reader = MediaReader(
        data, drop=config.on_bad_part == "drop_part", allow_remote=config.allow_remote, threads=min(8, 2 * cores()),
        video=config.allow_video,
    )  # fmt: skip
    repeats: dict[int, int] = {}

    def counted(outcomes: Outcomes) -> Outcomes:
        for outcome in outcomes:
            cut["chats_cut"] += isinstance(outcome, Draft) and outcome.cut
            yield outcome

    for source in config.sources:
        yield from reader.look(curation.each(counted(read_source(source, data, repeats))))


def _settled(
    spool: Sorter, splitter: Splitter, doubled: Callable[[dict[str, Any]], None] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows in order of id, with their final split; of several with one id the first by content.

    The others are given to `doubled`.
    """
    last = None
    for row in spool.rows():
        if row["id"] == last:
            if doubled:
                doubled(row)
            continue
        last = row["id"]
        settled = {k: v for k, v in row.items() if k != "where"}
        settled["split"] = splitter.split_of(row["group"], row["split"])
        yield settled


def _doubled_row(row: dict[str, Any]) -> dict[str, Any]:
    return refused_row(Refusal(row["where"], row["id"], "duplicate_id", "another record has this id"))


def _write_records(folder: Path, rows: Iterator[dict[str, Any]]) -> list[str]:
    """`rows` as `records-00000.parquet` and so on; returns the names of the files."""
    for old in folder.glob("records-*.parquet"):  # of a run that was killed
        old.unlink()
    names: list[str] = []
    first = next(rows, None)
    while first is not None or not names:
        names.append(f"records-{len(names):05d}.parquet")
        some = chain([first] if first is not None else [], islice(rows, ROWS_PER_FILE - 1))
        _write(folder / names[-1], SCHEMA, some)
        first = next(rows, None)
    return names


def _write(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> None:
    """`rows` as one Parquet file, whole or not at all."""
    with atomic_write(path) as f, pq.ParquetWriter(f, schema, compression="zstd") as writer:
        held: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            held.append(row)
            size += row.get("text_bytes", 0) + row.get("inline_bytes", 0)
            if len(held) == _ROW_GROUP or size >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(held, schema=schema))
                held, size = [], 0
        if held:
            writer.write_table(pa.Table.from_pylist(held, schema=schema))


def _counted(refused: Sorter, reasons: Counter[str]) -> Iterator[dict[str, Any]]:
    for row in refused.rows():
        reasons[row["reason"]] += 1
        yield row


def _record_key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[k] for k in ("id", "content_hash", "task", "split", "group", "lang", "source", "license", "where"))


def _refused_key(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["source"], row["id"], row["reason"], row["detail"])


def _require_useful(config: ScanConfig, counts: dict[str, Any], folder: Path) -> None:
    """Raise DataError when nothing can be trained on what was found."""
    reasons = counts["refused_reasons"]
    worst = max(reasons, key=lambda r: reasons[r]) if reasons else ""
    told = f", most of them `{worst}` ({reasons[worst]})" if worst else ""
    table = folder / REFUSED_FILE
    if counts["found"] == 0:
        raise DataError("the corpus is empty: no record was found", cure="check --data and the `sources` in scan.yaml")
    if counts["kept"] == 0 and counts.get("dropped"):
        raise DataError(
            f"curation dropped {counts['dropped']:,} of {counts['found']:,} records and left none{told}",
            cure=f"see {folder / CURATED_FILE}, and loosen `curate` in scan.yaml",
        )
    if counts["kept"] == 0:
        raise DataError(
            f"all {counts['found']:,} records were refused{told}", cure=f"{table} names each; mend them or the mapping"
        )
    refused = counts["refused"] - sum(reasons.get(reason, 0) for reason in UNLABELLED)
    if refused > config.error_budget * counts["found"]:
        worst = max(reasons.keys() - UNLABELLED, key=lambda r: (reasons[r], r))
        share = 100 * refused / counts["found"]
        budget = min(1.0, share / 100 + 0.01)
        cure = f"{table} names each; mend them, or allow more: --set scan.error_budget={budget:.2f}"
        if worst == "duplicate_id" and any(isinstance(source, ChatSource) for source in config.sources):
            cure = (
                "if its ids name pictures or talks, say `id: hash` in the chat source: they are groups then; or " + cure
            )
        raise DataError(
            f"{refused:,} of {counts['found']:,} records ({share:.1f} %) were refused,"
            f" most of them `{worst}` ({reasons[worst]})",
            wanted=f"at most {100 * config.error_budget:g} %",
            cure=cure,
        )
    if counts["train"] == 0:
        raise DataError(
            f"none of the {counts['kept']:,} records is in the training split",
            cure="check the split column, or `split` in scan.yaml",
        )


def _warn(config: ScanConfig, counts: dict[str, Any]) -> None:
    """Tell what of the val and test records is in the training split too: what is measured on them would be too good."""
    given = "since a split that the data give wins"
    known = "scan.curate.contamination drops training records that know"
    told = {
        "groups_in_two_splits": f"groups are in two splits, {given}; {known} a held-out one",
        "media_in_two_splits": f"pictures, sounds or videos are in two splits, {given}; {known} a held-out one",
        "train_copies_of_held_out": "training records are a val or test record once more; scan.curate.exact drops them",
    }
    if n := counts.get("chats_cut"):
        tell(f"scan: chats_cut: {n:,} chats go on after the assistant's last message; that is left out")
    for reason, what in UNLABELLED.items():
        if n := counts["refused_reasons"].get(reason):
            tell(f"scan: {reason}: {n:,} {what}")
    for name, what in told.items():
        if counts.get(name) and (name == "train_copies_of_held_out" or not config.curate.contamination):
            tell(f"scan: {name}: {counts[name]:,} {what}")


def listing(config: ScanConfig, data: Path | str) -> str:
    """Hash of (path, size, time of change) of every file that the sources name, pictures and sounds of tables included.

    A sum of hashes, so that order does not matter and memory stays small. Of an object elsewhere its version counts
    instead of the time. So it does of media that are named by their whole addresses, where these are fetched at all: one
    listing for a folder of many, else a question for each.
    """
    total = 0
    if isinstance(data, str) and remote.scheme_of(data) != "http":
        remote.below(data.rstrip("/") + "/")  # one listing instead of a question for each of its files

    def note(name: str, path: str | Path) -> None:
        nonlocal total
        value: list[Any]
        try:
            if is_remote(str(path)):
                told = remote.known(str(path))
                value = [name, told.size, told.version]
            else:
                stat = os.stat(path)
                value = [name, stat.st_size, stat.st_mtime_ns]
        except (OSError, ValueError, DataError):
            value = [name, -1, -1]
        total = (total + int(sha256_json(value), 16)) % (1 << 256)

    elsewhere: list[str] = []

    def note_elsewhere() -> None:
        wanted = list(dict.fromkeys(elsewhere))
        remote.ask(wanted)
        for uri in elsewhere:
            note(ascii(blank_credentials(uri)), uri)
        elsewhere.clear()

    for source in config.sources:
        if isinstance(source, KeypadSource):
            continue  # made from its config alone
        for name, path in files_of(source, data):
            where = resolve(name, data) if isinstance(data, str) else name
            note(ascii(name), where if is_remote(where) else path)
        if not isinstance(source, ChatSource | TableSource | HfSource | WebDatasetSource):
            continue  # only these name files that are not among their own
        named = isinstance(source, ChatSource) or source.map.image or source.map.audio or source.map.video
        if isinstance(source, HfSource | WebDatasetSource) and not named:
            continue  # their media lie in them
        for outcome in read_source(source, data):
            for part in outcome.record.parts if isinstance(outcome, Draft) else ():
                if not part.uri:
                    continue
                uri = split_fragment(part.uri)[0]
                if not is_remote(uri):
                    note(ascii(part.uri), resolve(uri, data))
                elif config.allow_remote or uri.startswith(outcome.trusted):  # type: ignore[union-attr]
                    elsewhere.append(uri)
                    if len(elsewhere) == _ASKED_AT_ONCE:
                        note_elsewhere()
        note_elsewhere()
    return f"{total:064x}"


def _track(run: Any, config: ScanConfig, artifact: Artifact) -> None:
    run.params(resolved(config))
    counts = artifact.counts
    run.metrics({k: v for k, v in counts.items() if isinstance(v, int)})
    run.text("counts.json", json.dumps(counts, indent=1, ensure_ascii=False))
    run.text("counts.html", counts_table(counts))
    run.artifact(artifact.path / REFUSED_FILE)


def counts_table(counts: dict[str, Any]) -> str:
    """Counts as a small HTML table."""
    rows = list(_leaves("", counts))
    cells = "".join(f"<tr><td>{escape(str(k))}</td><td align=right>{v:,}</td></tr>" for k, v in rows)
    return f"<!doctype html><meta charset=utf-8><title>scan</title><table border=1 cellpadding=4>{cells}</table>"


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(name, number) of every number in nested counts."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(f"{name}: {key or 'unknown'}" if name else str(key), inner)
