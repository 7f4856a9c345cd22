"""The corpus report says what is there and what was dropped, and nothing in the data can act in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.records import REFUSED, Part, Record, Target
from mmlm.corpus.scan import scan
from mmlm.errors import ArtifactError
from mmlm.shards.page import text, write_page
from mmlm.shards.shard import shard
from tests.shards.conftest import CONFIG, make_records, write_manifest, write_wav

NASTY = '<img src=x onerror="alert(1)">@body@&\u202etxt.exe\x00'


class Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


class Sections(HTMLParser):
    """Of every heading of third rank: the rows of its table, the titles of its columns, and its other words."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.columns: dict[str, list[str]] = {}
        self.words: dict[str, list[str]] = {}
        self.tiles: dict[str, list[str]] = {}
        self.heading = self.within = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div" and dict(attrs).get("class", "") in ("tile", "tile bad"):
            self.heading, self.within = "tile", ""
            self.tiles[str(len(self.tiles))] = []
        elif tag in ("h2", "h3"):
            self.heading = ""
        elif tag == "tr":
            self.rows.setdefault(self.heading, []).append([])
        self.within = tag

    def handle_endtag(self, tag: str) -> None:
        self.within = ""

    def handle_data(self, data: str) -> None:
        if self.within == "h3":
            self.heading = data
        elif self.heading == "tile":
            self.tiles[str(len(self.tiles) - 1)].append(data)
        elif self.within in ("td", "i"):
            self.rows[self.heading][-1].append(data)
        elif self.within == "title":
            self.columns.setdefault(self.heading, []).append(data)
        elif data.strip():
            self.words.setdefault(self.heading, []).append(data)

    def bars(self, heading: str) -> dict[str, int]:
        return {name: int(number.replace(",", "")) for name, number in self.rows[heading]}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("page")
    records = make_records(root / "data")
    (root / "data" / "broken.png").write_bytes(b"\x89PNG but no more")
    nasty = Record(
        f"zz/{NASTY}", (Part("text", text=NASTY), Part("image", uri="0.png")), "digit", Target(label="3"),
        "train", "z", NASTY, NASTY, NASTY, "f" * 64,
    )  # fmt: skip
    broken = Record(
        f"zy/{NASTY}", (Part("text", text="这是几？"), Part("image", uri="broken.png")), "digit", Target(label="4"),
        "train", "y", "zh", NASTY, "", "e" * 64,
    )  # fmt: skip
    manifest = write_manifest(root / "manifest", [*records, nasty, broken])
    refused = [{"source": NASTY, "id": "", "reason": "bad_json", "detail": f"{i} {NASTY}"} for i in range(30)]
    refused.append({"source": "一.csv:3", "id": "三", "reason": "bad_row", "detail": "2 cells under 3 columns"})
    pq.write_table(pa.Table.from_pylist(refused, schema=REFUSED), manifest.path / "refused.parquet")
    curated = [{"step": "exact", "action": "drop", "source": "a", "id": NASTY, "reason": "duplicate", "detail": "of b"}]
    pq.write_table(pa.Table.from_pylist(curated), manifest.path / "curation.parquet")
    made = shard(CONFIG, manifest, data=root / "data", out=root / "shards")
    whole = json.loads((made.path / "artifact.json").read_text())
    whole["extra"] |= {
        "stragglers": {
            "units": 6, "median_seconds": 0.5, "median_milliseconds_a_record": 5.0, "seconds_by_worker": {"a": 15.0},
            "slow": [{"shard": "train-00001", "seconds": 12.5, "times_median": 25.0}],
        },
        "tokens": [{"lang": "zh", "texts": 7, "tokens_per_character": 1.25, "tokens_per_word": None}],
    }  # fmt: skip
    (made.path / "artifact.json").write_text(json.dumps(whole))
    out = root / "corpus.html"
    write_page(made.path, manifest.path, out)
    again = root / "again.html"
    write_page(made.path, manifest.path, again)
    assert again.read_bytes() == out.read_bytes()
    return out.read_text(encoding="utf-8")


def test_it_counts_what_is_there_and_what_is_not(page: str) -> None:
    found = Tags()
    found.feed(page)
    told = " ".join(found.texts)
    tiles = page[page.index('<div class="tiles">') : page.index("<h2>Records")]
    assert "<b>46</b><span>samples</span>" in tiles and "<b>1</b><span>quarantined</span>" in tiles
    assert "refused by scan: 31" in told and "bad_json: 30" in told and "bad_row: 1" in told
    assert "exact · drop · duplicate: 1" in told
    assert "unreadable_image: 1" in told
    assert "Stragglers" in told and "12.5" in told and "1.25" in told
    assert "一.csv:3" in told and "这是哪个数字？" in told  # Chinese comes through as it is


def test_pictures_and_sounds_are_shown(page: str) -> None:
    found = Tags()
    found.feed(page)
    shown = [attributes for tag, attributes in found.tags if tag == "img"]
    assert {a["class"] for a in shown} == {"picture", "sound"}
    assert all((a["src"] or "").startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for a in shown)
    assert page.count('<div class="example">') == 12
    assert page.count("<rect") > 20


def test_stored_sounds_are_as_long_as_they_are(page: str) -> None:
    told = page[page.index("Stored sounds, seconds") :]
    assert "0.48 to 0.48, median 0.48, n 30" in told[: told.index("</div>")]  # 48 whole windows in 0.5 s


def test_languages_and_sizes_are_those_of_the_corpus(tmp_path: Path) -> None:
    sides = {"a.png": (10, 16), "b.png": (40, 20), "c.png": (33, 64), "d.jpg": (100, 120), "e.jpg": (300, 2)}
    langs = ["en", "zh", "en", "fr", "en", "zh", "", ""]
    raw = tmp_path / "raw"
    raw.mkdir()
    for number, (name, (width, height)) in enumerate(sides.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width), np.uint8)
        Image.fromarray(pixels).save(raw / name)
    for name, rate in (("f.wav", 8000), ("g.wav", 16_000), ("h.wav", 8000)):
        write_wav(raw / name, np.full(rate // 2, len(name) / 10), rate)
    files = [*sides, "f.wav", "g.wav", "h.wav"]
    rows = [
        {"id": name, "image": name if name in sides else None, "sound": None if name in sides else name, "lang": lang,
         "label": "ab"[len(lang) // 2], "split": "train"}
        for name, lang in zip(files, langs, strict=True)
    ]  # fmt: skip
    (raw / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {
        "kind": "table", "files": "t.jsonl",
        "map": {"id": "id", "image": "image", "audio": "sound", "lang": "lang", "split": "split"},
        "ask": [{"task": "which", "question": "Which is it?", "label": "label"}],
    }  # fmt: skip
    config = parse(ScanConfig, {"sources": [source], "split": {"fill": False}}, "scan.yaml")
    manifest = scan(config, data=raw, out=tmp_path / "manifest")
    assert manifest.counts["kept"] == len(files)
    made = shard(CONFIG.model_copy(update={"shard_records": 3}), manifest, data=raw, out=tmp_path / "shards")
    found = Sections()
    found.feed((made.path / "corpus.html").read_text(encoding="utf-8"))
    assert found.bars("Language") == {"en": 3, "none": 2, "zh": 2, "fr": 1}
    assert found.bars("Files by format") == {"png": 3, "wav": 3, "jpeg": 2}
    assert found.bars("Sample rate of the sounds") == {"8000 Hz": 2, "16000 Hz": 1}
    longest = found.columns["Longest side of the pictures, pixels"]
    assert longest == ["up to 16: 1", "up to 64: 2", "up to 128: 1", "up to 512: 1"]
    assert found.words["Longest side of the pictures, pixels"] == ["16", "512"]  # below the first and last column
    tars = [path.stat().st_size for path in made.path.glob("*.tar")]
    stored = [
        size
        for path in made.path.glob("*.index.parquet")
        for ext, size in zip(*pq.read_table(path, columns=["ext", "size"]).to_pydict().values(), strict=True)
        if ext.startswith("image")
    ]
    assert len(tars) == 3 and len(stored) == 5
    for heading, unit, sizes in (("Shards, MB", 1e6, tars), ("Stored pictures, kB", 1e3, stored)):
        low, high, median = (f"{f(sizes) / unit:.3g}" for f in (min, max, np.median))
        assert found.words[heading][-1] == f"{low} to {high}, median {median}, n {len(sizes)}"
    told = {name: (number, note) for number, name, note, *_ in found.tiles.values()}
    assert told["shards"] == ("3", f"{sum(tars) / 1e3:,.1f} kB")
    assert told["images"][0] == "5" and told["sounds"][0] == "3" and told["samples"][0] == "8"


def test_nothing_from_the_data_acts(page: str) -> None:
    found = Tags()
    found.feed(page)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "a", "base"}
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:,").startswith("data:")
    assert "default-src 'none'" in page
    assert page.count("&lt;img src=x") > 10  # they are told, as text
    assert "\u202e" not in page and "\x00" not in page
    assert page.index("<body>") < page.index("@body@")


@pytest.mark.parametrize(
    ("given", "shown"),
    [("a<b>&\"'", "a&lt;b&gt;&amp;&quot;&#x27;"), ("\u202e\x00", "\\u202e\\u0000"), ("一\n二", "一\n二")],
)
def test_text_is_escaped(given: str, shown: str) -> None:
    assert text(given) == shown


def test_an_unfinished_shard_set_has_no_report(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "manifest", make_records(tmp_path / "data", 2))
    with pytest.raises(ArtifactError, match="is not there"):
        write_page(tmp_path / "shards", manifest.path, tmp_path / "corpus.html")


def test_every_kind_of_numbers_becomes_a_histogram() -> None:
    from mmlm.shards.page import _histogram

    assert _histogram(np.array([], int)) == "<p>none</p>"
    assert _histogram(np.array([5])).count("<rect") == 1
    assert _histogram(np.array([0, 0, 3])).count("<rect") == 2  # a column a number
    assert "median 0.5" in _histogram(np.linspace(0, 1, 101))


def test_what_curation_did_is_told_by_step_source_and_reason(tmp_path: Path) -> None:
    texts = ["The owl sat in the old oak and saw the moon rise over the lake."] * 2 + [
        "写信给 li.lei@example.cn 谢谢你。",
        "no",
    ]
    rows = [
        {"id": f"r{i}", "text": text, "label": "aabb"[i], "split": "train", "from": NASTY if i > 1 else "web"}
        for i, text in enumerate(texts)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = {
        "kind": "table", "files": "*.jsonl", "map": {"id": "id", "split": "split", "source": "from"},
        "ask": [{"task": "mood", "text": "text", "label": "label"}],
    }  # fmt: skip
    curate = {"language": {}, "quality": {"min_words": 3}, "pii": {"action": "redact"}, "exact": {}}
    config = parse(ScanConfig, {"sources": [source], "curate": curate, "split": {"fill": False}}, "scan.yaml")
    manifest = scan(config, data=tmp_path / "data", out=tmp_path / "manifest")
    made = shard(CONFIG, manifest, data=tmp_path / "data", out=tmp_path / "shards")
    write_page(made.path, manifest.path, tmp_path / "corpus.html")
    whole = (tmp_path / "corpus.html").read_text(encoding="utf-8")
    table = whole[whole.index("<h2>Curation</h2>") : whole.index("<h2>What was dropped")]
    lines = [re.sub(r"(<[^>]+>)+", "|", line).strip("|") for line in table.split("<tr>")[2:]]
    assert manifest.extra["curation"]["language"]["web"]["changed"] == 2
    assert [line.split("|")[0] for line in lines[::2]] == ["language", "quality", "pii", "exact"]
    assert "language|web|2|0|2|detected 2" in lines
    assert "exact|web|1|1|0|" in "\n".join(lines)
    (hostile,) = [line for line in lines if line.startswith("quality|&lt;img src=x")]
    assert "|1|1|0|" in hostile and "<img src=x" not in table and "\u202e" not in table
    assert not [
        row for row in pq.read_table(manifest.path / "curation.parquet").to_pylist() if row["step"] == "language"
    ]
