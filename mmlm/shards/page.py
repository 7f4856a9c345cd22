"""The corpus report: what a ShardSet holds, what it looks like, and what was dropped on the way and why.

One HTML file without a script and without anything from elsewhere. All that comes from the data is hostile: names are
escaped, invisible and direction-changing characters are shown by their numbers, and the page forbids itself to load
anything. Memory: the tables are read column by column in batches; what is held grows with the number of distinct
names, which is capped, and with the number of shards.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.errors import DataError
from mmlm.features import spec as feature_spec
from mmlm.features.sample import Sample
from mmlm.features.spec import AUDIO, FIELDS, IMAGE, SPECIAL_TOKENS, FeatureSpec
from mmlm.features.text import Tokenizer
from mmlm.shards.codec import unpack
from mmlm.shards.commit import MANIFEST, QUARANTINE
from mmlm.storage import write_bytes

TEMPLATE = Path(__file__).with_name("page.html")
MOST_NAMES = 20_000
"""Distinct names counted per column; later ones are counted together as "other"."""
LISTED = 12
"""Names shown per column, the commonest."""
EXAMPLES = 12
"""Samples shown."""
CASES = 8
"""Dropped records shown per reason."""
THUMBNAIL = 192
"""Longest side of a shown picture, pixels."""
_COLUMNS = {"split": "Split", "task": "Task", "label": "Label", "lang": "Language", "source": "Source",
            "license": "Licence"}  # fmt: skip
_NPY_HEADER = 128
"""Bytes before the values of every array that `codec.pack` writes (numpy's format 1.0, padded to 64)."""
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
_MAGMA = np.array(
    [(0, 0, 4), (40, 17, 89), (114, 31, 129), (183, 55, 121), (241, 96, 93), (254, 176, 120), (252, 253, 191)], float
)
"""Seven points of the colour map magma (S. van der Walt, N. Smith 2015), dark to light evenly."""
_STEPS = (
    ("refused.parquet", "refused by scan", "records that cannot be read or have nothing to answer"),
    ("dropped.parquet", "parts left out", "broken pictures and sounds of records that were kept without them"),
    ("curation.parquet", "curated", "records that a curation step dropped or changed"),
)

Html = str


def write_page(shards: Path, manifest: Path, out_file: Path) -> None:
    """The report about the finished ShardSet in folder `shards`, made of the Manifest in folder `manifest`.

    Raises ArtifactError when one of them is not there.
    """
    made, scanned = artifacts.read(shards, "shards"), artifacts.read(manifest, "manifest")
    spec = feature_spec.load(shards)
    rows = pq.read_table(shards / MANIFEST).to_pylist()
    body = [
        f"<h1>Corpus of {text(manifest.resolve().parent.name)}</h1>",
        f'<p class="soft">{text(scanned.created)} · shards {text(made.digest[:12])} · features {text(spec.digest[:12])}'
        f" · mmlm {text(made.code_version)}</p>",
        _tiles(made, scanned),
        *_records(scanned, manifest),
        *_media(scanned, spec, shards, rows),
        *_texts(made, scanned),
        *_examples(shards, rows, spec),
        *_curated(scanned),
        *_dropped(shards, manifest),
        *_stragglers(made),
        *_shards(rows),
    ]
    head, _, tail = TEMPLATE.read_text(encoding="utf-8").partition("@body@")
    head = head.replace("@title@", f"Corpus: {text(manifest.resolve().parent.name)}")
    write_bytes(out_file, "\n".join([head, *body, tail]).encode("utf-8", "backslashreplace"))


def text(value: Any) -> Html:
    """A value from the data as HTML: escaped; characters that hide or turn others around are shown as `\\u202e`."""
    shown = _HIDDEN.sub(lambda m: f"\\u{ord(m[0]):04x}", str(value))
    return escape(shown)


def _tiles(made: Artifact, scanned: Artifact) -> Html:
    counts = {**scanned.counts, **made.counts}
    tiles = [
        ("found", counts.get("found"), "by scan"),
        ("kept", counts.get("kept"), "records"),
        ("refused", counts.get("refused"), "by scan"),
        ("curated", counts.get("dropped"), "dropped by curation"),
        ("quarantined", counts.get("quarantined"), "while features were made"),
        ("samples", counts.get("samples"), "in the shards"),
        ("images", counts.get("images"), "pictures stored"),
        ("sounds", counts.get("sounds"), "sounds stored"),
        ("tokens", counts.get("tokens"), "text and slots"),
        ("shards", counts.get("shards"), _bytes(counts.get("bytes", 0))),
    ]
    return '<div class="tiles">' + "".join(_tile(*t) for t in tiles if isinstance(t[1], int)) + "</div>"


def _tile(name: str, number: Any, note: str) -> Html:
    mark = " bad" if number and name in ("refused", "quarantined") else ""
    return f'<div class="tile{mark}"><b>{number:,}</b><span>{text(name)}</span><span>{text(note)}</span></div>'


def _records(scanned: Artifact, manifest: Path) -> Iterator[Html]:
    yield "<h2>Records</h2>"
    counted = {name: Counter[str]() for name in _COLUMNS}
    for batch in _batches(sorted(manifest.glob("records-*.parquet")), list(_COLUMNS)):
        for name, values in zip(batch.schema.names, batch.columns, strict=True):
            _count(counted[name], values)
    yield '<div class="grid">'
    for name, title in _COLUMNS.items():
        if set(counted[name]) - {""}:
            yield f"<div><h3>{title}</h3>{_bars(counted[name])}</div>"
    if given := scanned.counts.get("modalities"):
        yield f"<div><h3>Modality</h3>{_bars(Counter(given))}</div>"
    yield "</div>"
    if unseen := scanned.extra.get("unseen_labels"):
        named = "; ".join(f"{text(task)}: {', '.join(map(text, labels[:LISTED]))}" for task, labels in unseen.items())
        yield f"<p>Classes that no training record has, so that no model can have learnt them: {named}.</p>"


def _batches(paths: Sequence[Path], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The named columns of Parquet files, those of them that are there."""
    for path in paths:
        with pq.ParquetFile(path) as file:
            there = [name for name in columns if name in file.schema_arrow.names]
            yield from file.iter_batches(65_536, columns=there)


def _count(counter: Counter[str], values: pa.Array) -> None:
    for pair in pc.value_counts(values).to_pylist():
        name = str(pair["values"] or "")
        counter[name if name in counter or len(counter) < MOST_NAMES else "other"] += pair["counts"]


def _media(scanned: Artifact, spec: FeatureSpec, shards: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[Html]:
    """Figures of the files as they came, from the manifest; and of what is stored, from the offsets indexes."""
    tokens, frames, sizes = _stored(shards, rows, spec)
    yield '<h2>Sizes</h2><div class="grid">'
    media = scanned.extra.get("media") or {}
    if media.get("formats"):
        yield f"<div><h3>Files by format</h3>{_bars(Counter(media['formats']))}</div>"
    if media.get("image_sides"):  # upper bound → number of pictures
        bounds = dict(sorted((int(k), int(v)) for k, v in media["image_sides"].items()))  # as words, 128 is before 16
        yield f"<div><h3>Longest side of the pictures, pixels</h3>{_columns(list(bounds), list(bounds.values()))}</div>"
    elif found := media.get("image_side"):
        yield (
            f"<div><h3>Longest side of the pictures</h3><p>median {found['median']:,.0f} pixels, "
            f"19 of 20 at most {found['p95']:,.0f}</p></div>"
        )
    if media.get("audio_rates"):
        rates = Counter({f"{rate} Hz": n for rate, n in media["audio_rates"].items()})
        yield f"<div><h3>Sample rate of the sounds</h3>{_bars(rates)}</div>"
    if spec.audio and frames:
        seconds = np.array(frames) * spec.audio.hop / spec.audio.sample_rate
        yield f"<div><h3>Stored sounds, seconds</h3>{_histogram(seconds)}</div>"
    if sizes:
        yield f"<div><h3>Stored pictures, kB</h3>{_histogram(np.array(sizes) / 1000)}</div>"
    if tokens:
        yield f"<div><h3>Tokens a record, media slots closed</h3>{_histogram(np.array(tokens))}</div>"
    yield f"<div><h3>Shards, MB</h3>{_histogram(np.array([row['bytes'] / 1e6 for row in rows if row['path']]))}</div>"
    yield f"<div><h3>Samples a shard</h3>{_histogram(np.array([row['samples'] for row in rows if row['path']]))}</div>"
    yield "</div>"


def _stored(
    shards: Path, rows: Sequence[Mapping[str, Any]], spec: FeatureSpec
) -> tuple[list[int], list[int], list[int]]:
    """(tokens a record, frames a sound, bytes a picture) of at most 200 shards, evenly spaced."""
    there = [row for row in rows if row["path"]]
    tokens: list[int] = []
    frames: list[int] = []
    sizes: list[int] = []
    frame = spec.audio.n_mels * np.dtype(spec.audio.stored).itemsize if spec.audio else 1
    for row in _spread(there, 200):
        index = pq.read_table(_index(shards, row["path"]), columns=["ext", "size"]).to_pydict()
        for extension, size in zip(index["ext"], index["size"], strict=True):
            if extension == "tokens.npy":
                tokens.append((size - _NPY_HEADER) // 4)
            elif extension.startswith("audio"):
                frames.append((size - _NPY_HEADER) // frame)
            elif extension.startswith("image"):
                sizes.append(size)
    return tokens, frames, sizes


def _index(shards: Path, tar: str) -> Path:
    return (shards / tar).with_suffix(".index.parquet")


def _texts(made: Artifact, scanned: Artifact) -> Iterator[Html]:
    """How many tokens a word and a character take, by language, where the stage counted them."""
    rows = [row for a in (made, scanned) for row in a.extra.get("tokens") or [] if isinstance(row, Mapping)]
    if rows:
        yield "<h2>Text</h2><p>Fewer tokens a word or a character mean shorter sequences for the same text. Counted on a "
        yield "sample: some 500 records drawn over the whole corpus, and at least 50 of each language that has so many.</p>"
        yield _table([{**row, "lang": row.get("lang") or "unknown"} for row in rows])


def _examples(shards: Path, rows: Sequence[Mapping[str, Any]], spec: FeatureSpec) -> Iterator[Html]:
    tokenizer = Tokenizer.load(shards)
    yield '<h2>Examples</h2><p class="soft">As stored: pictures in their stored size, sounds as log-mel spectrograms '
    yield '(time to the right, pitch upwards).</p><div class="examples">'
    for sample in _pick(_candidates(shards, [row for row in rows if row["path"]])):
        yield _example(sample, tokenizer)
    yield "</div>"


def _candidates(shards: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[Sample]:
    """Samples from shards evenly spaced over the set, and from places evenly spaced in each."""
    for row in _spread(rows, 12):
        index = pq.read_table(_index(shards, row["path"])).to_pydict()
        places: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        for key, extension, offset, size in zip(*(index[n] for n in ("key", "ext", "offset", "size")), strict=True):
            places[key][extension] = (offset, size)
        with (shards / row["path"]).open("rb") as tar:
            for key in _spread(list(places), 5):
                members = {}
                for extension, (offset, size) in places[key].items():
                    tar.seek(offset)
                    members[extension] = tar.read(size)
                try:
                    yield unpack(members)
                except DataError:
                    continue  # `verify` is there to complain


def _pick(samples: Iterable[Sample]) -> list[Sample]:
    """EXAMPLES of them: tasks, languages and what is given take turns."""
    kinds: dict[tuple[str, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        kinds[(sample.task, sample.lang, *sample.modalities)].append(sample)
    turns = zip_longest(*(kinds[kind] for kind in sorted(kinds)))
    return [sample for turn in turns for sample in turn if sample is not None][:EXAMPLES]


def _example(sample: Sample, tokenizer: Tokenizer) -> Html:
    media = [f'<img class="picture" alt="picture" src="{_picture(image)}">' for image in sample.images[:4]]
    media += [f'<img class="sound" alt="sound" src="{_spectrogram(sound)}">' for sound in sample.sounds[:2]]
    asked = [int(i) for i in sample.tokens[1 : sample.answer_at] if int(i) not in (IMAGE, AUDIO, FIELDS)]
    question = "".join(
        SPECIAL_TOKENS[part[0]] + " " if part[0] < len(SPECIAL_TOKENS) else tokenizer.decode(part)
        for part in _runs(asked)
    )
    told = [
        ("asked", _short(question)),
        ("fields", ", ".join(f"{k}: {v}" for k, v in list(sample.fields.items())[:8])),
        ("answer", _short(sample.answer or "")),
        ("task", sample.task),
        ("split", " · ".join(filter(None, (sample.split, sample.lang)))),
        ("id", sample.id),
    ]
    listed = "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in told if value)
    shown = f'<div class="media">{"".join(media)}</div>' if media else ""
    return f'<div class="example">{shown}<dl>{listed}</dl></div>'


def _runs(ids: Sequence[int]) -> Iterator[list[int]]:
    """Runs of text tokens, and marks one by one."""
    run: list[int] = []
    for token in ids:
        if token < len(SPECIAL_TOKENS):
            if run:
                yield run
            yield [token]
            run = []
        else:
            run.append(token)
    if run:
        yield run


def _short(value: str, length: int = 240) -> str:
    return value if len(value) <= length else value[:length] + " …"


def _curated(scanned: Artifact) -> Iterator[Html]:
    """What each curation step did to the records of each source, from the manifest's own account."""
    from mmlm.corpus.curation.config import CurateConfig  # whose fields stand in the order in which the steps run

    told = scanned.extra.get("curation") or {}
    known = [step for step in CurateConfig.model_fields if step in told]
    steps = [*known, *sorted(set(told).difference(known))]
    found = [(step, source, counts) for step in steps for source, counts in told[step].items()]
    if not found:
        return
    yield (
        '<h2>Curation</h2><p class="soft">Steps in their order, each with what the ones before it left. kept: let pass; '
        "changed: so many of these were altered, or their language filled in.</p>"
    )
    yield _table(
        [
            {
                "step": step,
                "source": _short(source, 80) or "none",
                **{name: counts.get(name, 0) for name in ("kept", "dropped", "changed")},
                "reasons": ", ".join(f"{reason} {number:,}" for reason, number in counts.get("reasons", {}).items()),
            }
            for step, source, counts in found[:500]
        ]
    )
    if len(found) > 500:
        yield f"<p>The first 500 of {len(found):,}; all are in the manifest's <code>artifact.json</code>.</p>"


def _dropped(shards: Path, manifest: Path) -> Iterator[Html]:
    yield "<h2>What was dropped, and why</h2>"
    tables = [(manifest / name, title, told) for name, title, told in _STEPS]
    tables.append((shards / QUARANTINE, "quarantined by shard", "records whose media or length do not do"))
    any_row = False
    for path, title, told in tables:
        if not path.is_file():
            continue
        reasons, cases = _reasons(path)
        if not reasons:
            continue
        any_row = True
        yield f'<h3>{title}: {reasons.total():,}</h3><p class="soft">{told} (<code>{path.name}</code>)</p>'
        for reason, count in reasons.most_common():
            yield f"<details><summary>{text(reason)}: {count:,}</summary>{_table(cases[reason])}</details>"
    if not any_row:
        yield "<p>Nothing: every record that was found is in the shards.</p>"


def _reasons(path: Path) -> tuple[Counter[str], dict[str, list[dict[str, Any]]]]:
    """(reason → number of rows, reason → its first rows) of a table of dropped records; steps stand before reasons."""
    counted: Counter[str] = Counter()
    cases: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for batch in _batches([path], ("step", "action", "reason", "source", "id", "detail")):
        for row in batch.to_pylist():
            head = [row.pop(name) or "" for name in ("step", "action", "reason") if name in row]
            reason = " · ".join(filter(None, head)) or "no reason"
            counted[reason] += 1
            if len(cases[reason]) < CASES:
                cases[reason].append({name: _short(str(value or "")) for name, value in row.items()})
    return counted, cases


def _stragglers(made: Artifact) -> Iterator[Html]:
    """How evenly the work went, and the units that took much longer than the others."""
    found = made.extra.get("stragglers") or {}
    if not found.get("units"):
        return
    yield (
        f"<h2>Time</h2><p>{found['units']:,} units written by the run that finished; median "
        f"{found['median_seconds']:,.3g} s a unit, {found['median_milliseconds_a_record']:,.3g} ms a record.</p>"
    )
    yield _table([{"worker": name, "seconds": float(s)} for name, s in found["seconds_by_worker"].items()])
    if found["slow"]:
        yield "<h3>Stragglers</h3><p>They took more than twice the median time a record.</p>" + _table(found["slow"])


def _shards(rows: Sequence[Mapping[str, Any]]) -> Iterator[Html]:
    names = ("path", "split", "bytes", "samples", "quarantined", "images", "sounds", "tokens")
    shown = [{name: row.get(name) for name in names} for row in rows[:500]]
    more = f"<p>The first 500 of {len(rows):,}.</p>" if len(rows) > 500 else ""
    yield f"<h2>Shards</h2><details><summary>{len(rows):,} shards</summary>{_table(shown)}{more}</details>"


def _table(rows: Sequence[Mapping[str, Any]]) -> Html:
    """Rows of the same keys; numbers stand to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {n for n in names if all(isinstance(r.get(n), int | float) for r in rows)}
    mark = {name: ' class="number"' if name in numeric else "" for name in names}
    head = "<tr>" + "".join(f"<th{mark[name]}>{text(name)}</th>" for name in names) + "</tr>"
    lines = ["".join(f"<td{mark[n]}>{text(_number(row.get(n)))}</td>" for n in names) for row in rows]
    return '<div class="wide"><table>' + head + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def _bars(counter: Counter[str]) -> Html:
    """The commonest names with a bar each, the others together."""
    listed = sorted(counter.items(), key=lambda pair: (-pair[1], pair[0]))
    rows = listed[:LISTED] if len(listed) > LISTED + 1 else listed
    most = max((n for _, n in rows), default=0) or 1
    lines = [
        f"<tr><td>{text(_short(name, 80)) or '<i>none</i>'}</td>"
        f'<td><svg viewBox="0 0 100 12" width="100" height="12" preserveAspectRatio="none" role="img">'
        f'<rect width="{100 * n / most:.1f}" height="12" rx="1.5"/></svg></td><td class="number">{n:,}</td></tr>'
        for name, n in rows
    ]
    if left := len(listed) - len(rows):
        lines.append(
            f'<tr><td class="soft">{left:,} more</td><td></td>'
            f'<td class="number">{sum(n for _, n in listed[len(rows) :]):,}</td></tr>'
        )
    return '<table class="bars">' + "".join(lines) + "</table>"


def _histogram(values: np.ndarray, bins: int = 24) -> Html:
    """Numbers as columns, with their least, median and greatest below."""
    if not len(values):
        return "<p>none</p>"
    low, high = float(values.min()), float(values.max())
    whole = bool(np.all(values == np.floor(values)))
    if whole and high - low < bins:
        edges = np.arange(low, high + 2) - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    counts, _ = np.histogram(values, edges)
    told = f"{_figure(low)} to {_figure(high)}, median {_figure(float(np.median(values)))}, n {len(values):,}"
    return _columns([*edges[1:]], counts.tolist(), (low, high)) + f'<span class="soft">{told}</span>'


def _columns(bounds: Sequence[float], counts: Sequence[int], ends: tuple[float, float] | None = None) -> Html:
    """A column per class of numbers; the first and last bound stand below."""
    width, height, most = 320, 90, max([*counts, 1])
    step = width / max(1, len(counts))
    bars = "".join(
        f'<rect x="{i * step + 0.5:.1f}" y="{height * (1 - n / most):.1f}" width="{max(1.0, step - 1):.1f}" '
        f'height="{height * n / most:.1f}"><title>up to {_figure(float(bound))}: {n:,}</title></rect>'
        for i, (bound, n) in enumerate(zip(bounds, counts, strict=True))
        if n
    )
    first, last = ends or ((bounds[0], bounds[-1]) if bounds else (0, 0))
    return (
        f'<svg viewBox="0 0 {width} {height + 16}" width="{width}" role="img">{bars}'
        f'<line x1="0" x2="{width}" y1="{height}" y2="{height}"/>'
        f'<text x="0" y="{height + 13}">{_figure(float(first))}</text>'
        f'<text x="{width}" y="{height + 13}" text-anchor="end">{_figure(float(last))}</text></svg>'
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value == math.floor(value) or abs(value) >= 1000 else f"{value:.3g}"


def _bytes(count: float) -> str:
    if count < 1000:
        return f"{count:,.0f} bytes"
    step = min(int(math.log10(count) / 3), 4)
    return f"{count / 1000**step:,.1f} {('bytes', 'kB', 'MB', 'GB', 'TB')[step]}"


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of `items`, evenly spaced, the first among them."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _picture(pixels: np.ndarray) -> str:
    """(H, W, C) uint8 → a data: URI. A JPEG: as a PNG, a photograph takes 15 times as long and six times the room."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return _inline(picture, "JPEG", quality=90, subsampling=0)


def _spectrogram(mel: np.ndarray) -> str:
    """(frames, mels) log-mel → a data: URI of a picture: time to the right, pitch upwards."""
    values = mel.astype(np.float32).T[::-1]
    values = values[:, :: max(1, values.shape[1] // 400)]
    low, high = float(values.min()), float(values.max())
    at = (values - low) / max(high - low, 1e-6)
    points = np.linspace(0, 1, len(_MAGMA))
    colours = np.stack([np.interp(at, points, _MAGMA[:, i]) for i in range(3)], axis=-1)
    return _inline(Image.fromarray(colours.astype(np.uint8)), "PNG")


def _inline(picture: Image.Image, form: str, **options: Any) -> str:
    held = io.BytesIO()
    picture.save(held, form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(held.getvalue()).decode()
