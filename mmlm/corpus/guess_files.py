"""Files that need no columns, looked at: side-car captions, WebDataset tars, Hugging Face data sets, documents.

What their readers make of a sample tells the tasks, the modalities and the sizes.
"""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmlm.config import parse
from mmlm.corpus.config import HfSource, ScanConfig
from mmlm.corpus.drafts import Draft, Refusal
from mmlm.corpus.elsewhere import source_of
from mmlm.corpus.guess import SAMPLE, Guess, _listed, measure, text_sizes
from mmlm.corpus.readers.hf import features_of, hf_files
from mmlm.corpus.readers.hf_columns import unused
from mmlm.corpus.readers.sources import data_set, read_source
from mmlm.corpus.records import Record
from mmlm.corpus.sniff import AUDIO_ENDINGS, IMAGE_ENDINGS, TEXT_ENDINGS, VIDEO_ENDINGS
from mmlm.errors import DataError
from mmlm.storage import is_remote

LOOKED_AT = 60
"""Documents that are read; a PDF may take a second."""
COUNTED = 20_000
"""Records that are counted; of more it is said that there are at least so many."""
DOCUMENT_ENDINGS = (".txt", ".md", ".markdown", ".html", ".htm", ".xhtml", ".warc", ".warc.gz", ".pdf")
COUNTED_ELSEWHERE = 500
"""The same where each may have to be fetched."""
_MEDIA_ENDINGS = (*IMAGE_ENDINGS, *AUDIO_ENDINGS, *VIDEO_ENDINGS)
_PARTNERS = 0.8
"""Share of the media that must have a text of the same name beside them to be side-car captions."""
_BESIDE_TARS = (".parquet", "_stats.json")
"""What img2dataset writes beside each tar about its samples."""
_NAMES = {
    "image": "pictures",
    "audio": "sounds",
    "video": "videos",
    "context": "texts beside them",
    "fields": "named values",
}


def look_at_files(path: Path, files: list[str]) -> Guess | None:
    """What the folder `path` with its `files` is, where it is none of tables and class folders; None when unsure."""
    if len(files) > 1 and hugging_face(path):
        guess = _read("hf", path, {"kind": "hf"}, [f"{path} is a Hugging Face data set."])
        left = _unused(path)
        return replace(guess, says=[*guess.says, f"Not used: {_listed(f'`{c}`' for c in left)}."]) if left else guess
    tars = [f for f in files if f.lower().endswith(".tar")]
    beside = {os.path.splitext(t)[0] + end for t in tars for end in _BESIDE_TARS}
    if tars and 2 * len(tars) > len([f for f in files if f not in beside]):
        pattern = tars[0] if len(files) == 1 else "*.tar" if all("/" not in t for t in tars) else "**/*.tar"
        source = {"kind": "webdataset", "files": pattern}
        return _read("webdataset", path, source, [f"{path} holds {len(tars):,} tar files, read as WebDataset shards."])
    media, partners = captioned(files)
    if media and len(partners) >= max(2, _PARTNERS * len(media)):
        said = f"{path} holds {len(media):,} pictures, sounds or videos, {len(partners):,} of them with a text of the same name"
        return _read("sidecar", path, {"kind": "sidecar"}, [f"{said} beside them: the text is what to write."])
    return None


def look_at_documents(path: Path, files: list[str]) -> Guess | None:
    """The story of learning to continue the texts among `files` below `path`; None when there are too few of them."""
    documents = [f for f in files if f.lower().endswith(DOCUMENT_ENDINGS)]
    if 2 * len(documents) <= len(files):
        return None
    source: dict[str, Any] = {"kind": "documents"}
    if len(files) == 1:
        source["files"] = files[0]
    kinds = Counter("." + f.lower().rsplit(".", 1)[-1] for f in documents)
    shown = ", ".join(f"{n:,} {ending}" for ending, n in kinds.most_common())
    says = [
        f"{path / files[0] if len(files) == 1 else path} holds documents ({shown}): the task is to continue a text."
    ]
    plain = [f for f in documents if not set(f) & set("*?[]{}")]  # others would be taken for patterns
    some = plain[:: -(-len(plain) // LOOKED_AT)] if len(documents) > LOOKED_AT else []
    return _read("documents", path, source, says, some, len(documents) / len(some) if some else 1)


def hugging_face(path: Path) -> bool:
    """Whether a folder was made by `save_to_disk`, or is a repository whose README.md names its Parquet files."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return True
    if not any(path.glob("*.parquet")) and not any(path.glob("*/*.parquet")):
        return False
    try:
        head = (path / "README.md").read_bytes()[:65536]
    except OSError:
        return (path / "dataset_info.json").is_file()
    return head.startswith(b"---") and (b"dataset_info:" in head or b"configs:" in head)


def _unused(path: Path) -> list[str]:
    """The columns of a Hugging Face data set that no record has."""
    source = HfSource(kind="hf")
    with data_set(source, source_of(path)) as (folder, need):
        return unused(features_of(folder, hf_files(source, folder), need))


def captioned(files: list[str]) -> tuple[list[str], list[str]]:
    """(the media among `files`, those that have a text or JSON file of the same name beside them)."""
    stems = {os.path.splitext(f)[0] for f in files if f.lower().endswith((*TEXT_ENDINGS, ".json"))}
    media = [f for f in files if f.lower().endswith(_MEDIA_ENDINGS)]
    return media, [f for f in media if os.path.splitext(f)[0] in stems]


def _read(
    form: str, path: Path, source: dict[str, Any], says: list[str], some: list[str] | None = None, times: float = 1
) -> Guess:
    """What the readers make of `source`; or of its files `some` alone, `times` which is about all of it.

    Raises DataError when they make nothing of it.
    """
    config = parse(ScanConfig, {"sources": [{**source, "files": some} if some else source]}, form)
    rng = random.Random(0)
    drawn: list[Record] = []
    tasks: dict[str, set[str]] = defaultdict(set)
    splits: Counter[str] = Counter()
    refused: list[Refusal] = []
    found = total = 0
    data = source_of(path)
    most = COUNTED if isinstance(data, Path) else COUNTED_ELSEWHERE
    for outcome in read_source(config.sources[0], data):
        total += 1
        if not isinstance(outcome, Draft):
            refused.append(outcome)
        else:
            found += 1
            record = outcome.record
            tasks[record.task].update([record.target.label] if record.target.label else [])
            splits[record.split] += 1
            at = len(drawn) if len(drawn) < SAMPLE else rng.randrange(found)
            if at < SAMPLE:
                drawn[at : at + 1] = [record]
        if total == most:
            break
    if not found:
        why = f": {refused[0].source}: {refused[0].reason}, {refused[0].detail}" if refused else ""
        raise DataError(
            f"no record can be read from {path}{why}",
            wanted=f"a {form} corpus",
            cure="check the files, or write scan.yaml by hand",
        )
    sizes, seen = measure(_media(drawn, path, "image"), _media(drawn, path, "audio"))
    sizes["text_bytes"] = text_sizes([_text_bytes(r) for r in drawn])
    for kind in ("image", "audio", "video"):
        sizes[f"{kind}s_each"] = max(sum(p.kind == kind for p in r.parts) for r in drawn)
    sizes["fields"] = max(sum(len(p.fields or {}) for p in r.parts) for r in drawn)
    modalities = tuple(sorted({m for r in drawn for m in r.modalities()}))
    about = "About " if times > 1 else "At least " if total == most else ""
    found = round(found * times)
    given = ", ".join(_NAMES[m] for m in modalities if m in _NAMES)
    says.append(f"{about}{found:,} records{f' with {given}' if given else ''}.")
    says += _told(tasks, refused, splits)
    return Guess(
        form, path, {"sources": [source]}, {t: sorted(v) for t, v in sorted(tasks.items())}, modalities, sizes,
        {"records": found}, [*says, *seen],
    )  # fmt: skip


def _told(tasks: dict[str, set[str]], refused: list[Refusal], splits: Counter[str]) -> list[str]:
    """What to say about the tasks, about what cannot be read, and about the splits."""
    says = []
    for task, labels in sorted(tasks.items()):
        says.append(
            f"Task `{task}`: "
            + (f"{len(labels)} classes: {_listed(sorted(labels))}." if labels else "a text is written.")
        )
    if refused:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(Counter(r.reason for r in refused).items()))
        says.append(f"Refused when scanning: {reasons}.")
    if given_splits := {s: n for s, n in splits.items() if s}:
        says.append("A split is given and kept: " + ", ".join(f"{n:,} {s}" for s, n in given_splits.items()) + ".")
    else:
        says.append("No split is given: 10 % for validation and 10 % for test, by a hash.")
    return says


def _media(records: list[Record], data: Path, kind: str) -> list[Any]:
    """Bytes or absolute places of the media of one kind."""
    parts = [p for r in records for p in r.parts if p.kind == kind]
    return [p.data if p.uri is None else data / p.uri for p in parts if p.uri is None or not is_remote(p.uri)]


def _text_bytes(record: Record) -> int:
    """UTF-8 bytes of all words of a record, its answer included."""
    target = record.target
    texts = [*(p.text or "" for p in record.parts), target.text or target.label or ", ".join(target.labels or ())]
    return sum(len(t.encode("utf-8", "replace")) for t in texts)
