"""Raw corpora to shards, against the tools people use today: `python -m benchmarks.sharding --json FILE`.

Parts: pictures, workers, sound, text, dedup (`--only NAME`, several times). Everything is made on the spot and cached
below ~/.cache/mmlm-bench ($MMLM_BENCH). See docs/benchmarks.md for what is measured and how.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import inputs
from benchmarks.harness.command import run_parts
from benchmarks.harness.environments import home
from benchmarks.harness.measure import Contestant, Log, Running, contest, row

SIZE, QUALITY, PER_SHARD = 224, 90, 1000
PER_TASK = 300
"""Pictures of a shard where two workers share them: as many shards for the one as for the other, as for the processes."""
SHRINK = {"size": SIZE, "quality": QUALITY, "per_shard": PER_SHARD}
OURS = "mmlm"


@dataclass(frozen=True)
class Amounts:
    """How much there is of everything, and how often it is run."""

    runs: int
    pictures: int
    copies: int
    """How often each picture is there for the two workers, by hard link."""
    clips: int
    texts: int
    copied: int
    clock: str = "cpu"
    """What the ratios go by: `cpu` or `wall`; two workers always go by the wall clock."""


FULL = Amounts(runs=3, pictures=600, copies=6, clips=400, texts=3000, copied=3000)
QUICK = Amounts(runs=1, pictures=60, copies=4, clips=60, texts=300, copied=300)
WARM = Amounts(runs=1, pictures=16, copies=1, clips=16, texts=50, copied=50)


def pictures(amounts: Amounts, log: Log) -> list[dict[str, Any]]:
    """1024 px JPEG → 224 px JPEG of quality 90 in shards."""
    ours = Contestant(OURS, "pictures", SHRINK)
    peers = [
        Contestant("img2dataset Resizer + writer", "img2dataset_resizer", SHRINK, "img2dataset"),
        Contestant("Ray Data write_webdataset", "ray_write_webdataset", SHRINK, "raydata"),
        Contestant("LitData optimize", "litdata_optimize", SHRINK, "litdata"),
        Contestant("MosaicML MDSWriter", "mosaic_mdswriter", SHRINK, "streaming"),
        Contestant("Pillow thumbnail + ShardWriter", "pillow_shardwriter", {**SHRINK, "way": "thumbnail"}, "pillow"),
    ]
    rough = Contestant("Pillow draft + ShardWriter", "pillow_shardwriter", {**SHRINK, "way": "draft"}, "pillow")
    bare = [
        Contestant("simplejpeg + OpenCV, decoded at 224 px or more", "bare", {**SHRINK, "scale": 1}),
        Contestant("simplejpeg + OpenCV, decoded at 448 px or more", "bare", {**SHRINK, "scale": 2}),
        Contestant("simplejpeg + OpenCV as ours", "bare", {**SHRINK, "scale": 2, "kept": True}),
        Contestant("Pillow draft", "bare_pillow", {**SHRINK, "way": "draft"}, "pillow"),
        Contestant("pyvips", "bare_pyvips", SHRINK, "pyvips"),
    ]
    source, warm = inputs.photographs(amounts.pictures), inputs.photographs(WARM.pictures)
    found = contest([ours, *peers, rough, *bare], source, warm, amounts.runs, log)
    mine, all_peers = found[OURS], [found[peer.name] for peer in peers]
    unit, clock = "pictures/s a core", amounts.clock
    rows = [
        row("pictures", unit, mine, all_peers, clock=clock, goal=2.0),
        row("pictures, scan and shard", unit, mine, all_peers, clock=clock, laps=("scan", "work")),
        *(
            row(f"pictures: {peer.contestant.name}", unit, mine, [peer], clock=clock)
            for peer in (*all_peers, found[rough.name])
        ),
        row("pictures: share of the ceiling", unit, mine, [found[b.name] for b in bare], clock=clock, goal=0.8),
        *(
            row(f"pictures: bare {b.name}, against the best peer", unit, found[b.name], all_peers, clock=clock)
            for b in (bare[0], bare[2])
        ),
        *(row(f"pictures: share of bare {b.name}", unit, mine, [found[b.name]], clock=clock) for b in bare),
    ]
    for made in rows:
        name = made["peer_name"]
        if name in found and found[name].contestant.script not in ("bare", "bare_pillow", "bare_pyvips"):
            made["bytes_a_picture"] = {
                "ours": _bytes(mine.runs),
                "peer": _bytes(found[name].runs),
            }  # the manifest of ours included
    return rows


def _bytes(runs: list[Any]) -> int:
    return round(statistics.median(run.result["bytes"] / run.result["items"] for run in runs))


def workers(amounts: Amounts, log: Log) -> list[dict[str, Any]]:
    """The verb with two Ray workers against two processes that run it on half the pictures each: on few and on many."""
    few = _two(amounts, amounts.copies, log, ("two workers", "two workers, the start of Ray included"))
    return few + _two(amounts, 4 * amounts.copies, log, ("two workers, four times the pictures",))


def _two(amounts: Amounts, copies: int, log: Log, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each of `names`: with Ray started before the clock and, for the second of them, inside it."""
    cores = sorted(os.sched_getaffinity(0))[-2:]
    alone = Contestant("two bare processes", "pictures", SHRINK)
    ray = Contestant(OURS, "pictures", {**SHRINK, "workers": 2, "warm_ray": True, "per_shard": PER_TASK})
    cold = replace(ray, options={**ray.options, "warm_ray": False})
    home().mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="two-", dir=home()))
    try:
        warm, photographs = inputs.photographs(WARM.pictures), inputs.photographs(amounts.pictures)
        whole = inputs.several(photographs, copies, folder / "whole")
        halves = [
            inputs.several(photographs, copies // 2, folder / "half0"),
            inputs.several(photographs, copies - copies // 2, folder / "half1"),
        ]
        count = amounts.pictures * copies
        rates: dict[str, list[float]] = {"bare": [], "ray": [], "cold": []}
        cpu: dict[str, list[float]] = {name: [] for name in rates}

        def bare_pair() -> None:
            pair = [Running(alone, half, warm, cores=cores, gate=True) for half in halves]
            for one in pair:
                one.wait_until_ready()
            for one in pair:
                one.go()
            laps = [one.finish().result["laps"]["work"] for one in pair]
            rates["bare"].append(count / (max(lap["end"] for lap in laps) - min(lap["start"] for lap in laps)))
            cpu["bare"].append(count / sum(lap["cpu"] for lap in laps))

        def on_ray(contestant: Contestant, name: str) -> None:
            measured = Running(contestant, whole, warm, cores=cores).finish()
            rates[name].append(measured.result["items"] / measured.seconds(["work"], "wall"))
            cpu[name].append(measured.result["items"] / measured.seconds(["work"], "cpu"))

        turns: list[Callable[[], None]] = [bare_pair, lambda: on_ray(ray, "ray"), lambda: on_ray(cold, "cold")]
        turns = turns[: 1 + len(names)]
        for number in range(amounts.runs):
            for turn in turns if number % 2 == 0 else turns[::-1]:
                turn()
            log.note(names[0], rates=rates, cpu=cpu)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    made = []
    for name, key, goal in zip(names, ("ray", "cold"), (0.95, None), strict=False):
        pairs = list(zip(rates[key], rates["bare"], strict=True))
        mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = round(statistics.median(a / b for a, b in pairs), 3)  # of each round: the machine's speed changes
        made.append(
            {
                "name": name, "unit": "pictures/s", "ours": round(mine, 1), "peer": round(theirs, 1),
                "peer_name": "two bare processes", "ratio": ratio, "goal": goal,
                "runs": amounts.runs, "clock": "wall", "pictures": count,
                "wall": {"ours": rates[key], "peer": rates["bare"], "ratio": ratio},
            }
        )  # fmt: skip
        if key == "ray":  # of a session that has ended, nobody knows the CPU time any more
            share = statistics.median(a / b for a, b in zip(cpu[key], cpu["bare"], strict=True))
            made[-1]["cpu"] = {"ours": cpu[key], "peer": cpu["bare"], "ratio": round(share, 3)}
    return made


def sound(amounts: Amounts, log: Log) -> list[dict[str, Any]]:
    """Clips of 1 to 5 s → 80 log-mel bins, 25 ms windows every 10 ms, in shards."""
    rows = []
    for ending in ("wav", "ogg"):
        options = {"ending": ending, "per_shard": PER_SHARD}
        ours = Contestant(OURS, "sound", options)
        peers = [
            Contestant(f"lhotse {extractor}, {storage}", "lhotse_features",
                       {**options, "extractor": extractor, "storage": storage}, "lhotse")
            for extractor, storage in (("Fbank", "lilcom_chunky"), ("Fbank", "shar"), ("WhisperFbank", "lilcom_chunky"))
        ]  # fmt: skip
        source, warm = inputs.clips(amounts.clips, ending), inputs.clips(WARM.clips, ending)
        whisper = Contestant("ours, Whisper's scale", "sound", {**options, "scale": "whisper"})
        bare = Contestant("bare soundfile + our log-mel", "bare_sound", options)
        found = contest([ours, *peers, whisper, bare], source, warm, amounts.runs, log)
        unit, mine, theirs = "audio s/s a core", found[OURS], [found[peer.name] for peer in peers]
        rows += [
            row(f"sound, {ending.upper()}", unit, mine, theirs, clock=amounts.clock, of="audio_seconds"),
            row(f"sound, {ending.upper()}, scan and shard", unit, mine, theirs, laps=("scan", "work"),
                clock=amounts.clock, of="audio_seconds"),
            row(f"sound, {ending.upper()}: share of the ceiling", unit, mine, [found[bare.name]],
                clock=amounts.clock, of="audio_seconds"),
            row(f"sound, {ending.upper()}: {bare.name}, against the best peer", unit, found[bare.name], theirs,
                clock=amounts.clock, of="audio_seconds"),
            row(f"sound, {ending.upper()}, Whisper's scale", unit, found[whisper.name], theirs[-1:],
                goal=2.0, clock=amounts.clock, of="audio_seconds"),
            *(row(f"sound, {ending.upper()}: {peer.contestant.name}", unit, mine, [peer],
                  clock=amounts.clock, of="audio_seconds") for peer in theirs),
        ]  # fmt: skip
    return rows


def text(amounts: Amounts, log: Log) -> list[dict[str, Any]]:
    """Texts of about 2,000 characters → tokens of a given tokenizer.json, written down."""
    ours = Contestant(OURS, "text", {"per_shard": PER_SHARD})
    peer = Contestant("datatrove DocumentTokenizer", "datatrove_tokenizer", {}, "datatrove")
    source, warm = inputs.texts(amounts.texts), inputs.texts(WARM.texts)
    found = contest([ours, peer], source, warm, amounts.runs, log)
    mine, theirs = found[OURS], [found[peer.name]]
    unit = "MB of text/s a core"
    return [
        row("text", unit, mine, theirs, goal=1.5, clock=amounts.clock, of="megabytes", tokens=_told(found, "tokens")),
        row("text, scan and shard", unit, mine, theirs, laps=("scan", "work"), clock=amounts.clock, of="megabytes"),
    ]


def dedup(amounts: Amounts, log: Log) -> list[dict[str, Any]]:
    """JSON lines in, the texts without near-duplicates out: 5-grams, 14 buckets of 8 hashes."""
    options = {"ngram": 5, "buckets": 14, "rows": 8}
    ours = Contestant(OURS, "dedup", options)
    peer = Contestant("datatrove MinHash, four stages", "datatrove_minhash", options, "datatrove")
    source, warm = inputs.copied_texts(amounts.copied), inputs.copied_texts(WARM.copied)
    found = contest([ours, peer], source, warm, amounts.runs, log)
    mine, theirs = found[OURS], [found[peer.name]]
    told: dict[str, Any] = {"dropped": _told(found, "dropped")}
    if theirs[0].runs:
        a, b = (set(standing.runs[0].result["kept_hashes"]) for standing in (mine, theirs[0]))
        told["kept_by"] = {"ours": len(a), "peer": len(b), "both": len(a & b)}
    return [
        row("near-dedup", "MB of text/s a core", mine, theirs, goal=1.5, clock=amounts.clock, of="megabytes", **told),
        row(
            "near-dedup, the step alone",
            "MB of text/s a core",
            mine,
            theirs,
            laps=("step",),
            clock=amounts.clock,
            of="megabytes",
        ),
    ]


def _told(found: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: standing.runs[0].result[key] for name, standing in found.items() if standing.runs}


PARTS = {"pictures": pictures, "workers": workers, "sound": sound, "text": text, "dedup": dedup}


def main() -> int:
    return run_parts("sharding", __doc__, PARTS, FULL, QUICK)


if __name__ == "__main__":
    sys.exit(main())
