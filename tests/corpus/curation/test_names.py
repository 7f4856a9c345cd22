"""Names of people: how many are found of sentences with labels, and what becomes of them in records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmlm.corpus.curation.config import CurateConfig, PiiConfig
from mmlm.corpus.curation.curator import libraries
from mmlm.corpus.curation.names import names_in
from mmlm.corpus.curation.pii import Scrubber
from tests.corpus.curation import sentences
from tests.corpus.samples import Scan, write_lines

pytest.importorskip("jieba")
pytest.importorskip("names")


@pytest.mark.parametrize(
    ("which", "precision", "recall"),
    [("CHINESE", 0.93, 0.88), ("ENGLISH", 0.99, 0.83), ("NEW_CHINESE", 0.71, 0.81), ("NEW_ENGLISH", 0.84, 0.76)],
)
def test_precision_and_recall_are_those_that_are_told(which: str, precision: float, recall: float) -> None:
    right = found = wanted = 0
    for text, labels in getattr(sentences, which):
        spans = {text[a:b] for a, b in names_in(text)}
        right, found, wanted = right + len(spans & set(labels)), found + len(spans), wanted + len(labels)
    assert right / found >= precision
    assert right / wanted >= recall


def test_names_are_replaced_hashed_and_stay_replaced() -> None:
    text = "Yesterday John Smith wrote to 王建国 (wang@example.com). Mr. Smith did not call."
    redact = Scrubber(PiiConfig(kinds=("email", "name")))
    clean, counts = redact.scrub(text)
    assert clean == "Yesterday <name> wrote to <name> (<email>). Mr. <name> did not call."
    assert counts == {"email": 1, "name": 3}
    hashed = Scrubber(PiiConfig(kinds=("name",), action="hash", salt="s"))
    once, _ = hashed.scrub("John Smith met JOHN. John Smith left.")
    assert once.count(once[: once.index(">") + 1]) == 2
    assert Scrubber(PiiConfig()).scrub(text)[0].startswith("Yesterday John Smith wrote to 王建国")  # off by default
    for which in ("CHINESE", "ENGLISH"):
        for sentence, _ in getattr(sentences, which):
            made = redact.scrub(sentence)[0]
            assert redact.scrub(made)[0] == made


def test_a_scan_tells_of_them_and_of_the_versions_that_found_them(tmp_path: Path, scanned: Scan) -> None:
    rows = [
        {"text": f"{n} sent parcel {i}.", "label": "ab"[i % 2]} for i, n in enumerate(["John Smith", "A firm"] * 10)
    ]
    write_lines(tmp_path / "t.jsonl", rows)
    source: dict[str, Any] = {
        "kind": "table",
        "files": "t.jsonl",
        "ask": [{"task": "x", "text": "text", "label": "label"}],
    }
    made = scanned(tmp_path, source, curate={"pii": {"kinds": ["name"]}})
    texts = sorted(part.text or "" for record in made.records.values() for part in record.parts)
    assert sum(t.startswith("<name> sent parcel") for t in texts) == 10
    assert made.artifact.counts["curation"]["pii"] == {"kept": 20, "dropped": 0, "changed": 10}
    assert libraries(CurateConfig(pii=PiiConfig())) == {}
    assert sorted(libraries(CurateConfig(pii=PiiConfig(kinds=("name",))))) == ["jieba", "names"]


def test_nothing_is_written_where_others_could_plant_it(tmp_path: Path) -> None:
    code = "from mmlm.corpus.curation.names import names_in; print([*names_in('张伟来了。')])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
        env={"TMPDIR": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(p for p in sys.path if p)},
    )  # fmt: skip
    assert done.stdout.strip() == "[(0, 2)]"
    assert list(tmp_path.iterdir()) == []
