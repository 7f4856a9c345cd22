"""Somebody's files, looked at: what form they have, what is asked, and the `scan` section of a story for them.

Only a sample is read (the first rows of a table, some hundred headers of media). What is guessed is said in words and
ends as plain YAML that a person can change.
"""

from __future__ import annotations

import io
import os
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmlm import remote
from mmlm.config import blank_credentials, unsigned
from mmlm.corpus.counts import quantile
from mmlm.corpus.drafts import SPLIT_NAMES, Refusal, RefuseError, as_label, storable
from mmlm.corpus.elsewhere import address_of, laid_out, looking_at
from mmlm.corpus.readers.folders import list_files, split_level
from mmlm.corpus.readers.rows import ENDINGS
from mmlm.corpus.sniff import AUDIO_ENDINGS, IMAGE_ENDINGS, TEXT_ENDINGS, VIDEO_ENDINGS, Header, read_header
from mmlm.errors import DataError
from mmlm.storage import is_remote, read_uri

SAMPLE = 200
"""Media whose headers are read."""
DECODED = 40
"""Pictures that are decoded to see whether they have colours."""
MAX_PIXELS = 64_000_000
STEPS = 50
"""Quantiles of the lengths of texts that are kept."""
_FORMS = (
    "a folder per class; a table ("
    + " ".join(ENDINGS)
    + ") with a column of labels or answers; pictures or sounds with "
    "captions of the same name beside them; WebDataset tars; a Hugging Face data set on disk; documents"
)


@dataclass(frozen=True)
class Guess:
    """What somebody's files seem to be."""

    form: str
    """folders, table, chat, sidecar, webdataset, hf or documents."""
    data: Path | str
    """The folder, or the address, to give as --data."""
    scan: dict[str, Any]
    """The content of scan.yaml."""
    tasks: dict[str, list[str]]
    """task → its classes in the sample, sorted; empty for a task that is answered by text."""
    modalities: tuple[str, ...]
    """Sorted, of image, audio, fields, context, text."""
    sizes: dict[str, Any]
    """image_side {median, p95} in pixels, channels 1 or 3, audio_seconds {median, p95}; text_bytes
    {median, p90, p95, max, steps}: UTF-8 bytes of all words of a record, its answer included, where `steps` are evenly
    spaced quantiles; fields, their number; images_each and audios_each, the most in one record."""
    counts: dict[str, int]
    """records, and per class or split what there is."""
    says: list[str] = field(default_factory=list)
    """Sentences for the person."""


def look(path: Path | str) -> Guess:
    """What lies at `path`, a file, a folder or an address. Raises DataError when nothing in it can be learnt from.

    Of an address the names are listed, and what is read of a folder is fetched: tables, and a sample of everything else.
    """
    return _look(Path(path)) if not is_remote(str(path)) else _look_elsewhere(str(path))


def _look_elsewhere(uri: str) -> Guess:
    if "?" in uri:
        raise DataError(
            f"{unsigned(uri)} is signed, and a story remembers its data", wanted="an address without a signature",
            cure="give credentials by the environment, or a copy",
        )  # fmt: skip
    above, _, name = uri.rstrip("/").rpartition("/")
    folder = remote.scheme_of(uri) != "http" and bool(remote.below(uri.rstrip("/") + "/"))
    only = name if not folder and remote.scheme_of(uri) == "http" else ""
    with laid_out(uri if folder else above, only) as place, looking_at(place):
        guess = _look(place.folder if folder else place.folder / name)
        says = [line.replace(str(place.folder), blank_credentials(place.uri)) for line in guess.says]
        return replace(guess, data=place.uri, says=says)


def _look(path: Path) -> Guess:
    from mmlm.corpus.guess_files import DOCUMENT_ENDINGS, look_at_documents, look_at_files
    from mmlm.corpus.guess_table import look_at_tables

    _require_utf8(os.path.abspath(path), "the path")
    if not path.exists():
        raise DataError(f"there is nothing at {path}", wanted=_FORMS, cure="check the path")
    if path.is_file():
        if path.name.lower().endswith((".tar", *DOCUMENT_ENDINGS)):
            look_at = look_at_files if path.name.lower().endswith(".tar") else look_at_documents
            if guess := look_at(path.parent, [path.name]):
                return guess
        if path.suffix.lower() not in ENDINGS:
            raise DataError(
                f"{path.name} ends in {path.suffix or 'nothing'}", wanted=_FORMS, cure="give a table or a folder"
            )
        return look_at_tables(path.parent, [path.name])
    links: list[Refusal] = []
    files = list(list_files(path, bad=links.append))
    told = _listed((f"{link.id if storable(link.id) else ascii(link.id)}: {link.detail}" for link in links), 3)
    if not files:
        raise DataError(
            f"{path} {f'holds nothing but links that are not followed: {told}' if links else 'is an empty folder'}",
            wanted=_FORMS,
            cure="give the folder that they lead to, or copy it here (`cp -rL`)" if links
            else "put your files there, or give another folder",
        )  # fmt: skip
    for folder in sorted({os.path.dirname(f) for f in files}):
        _require_utf8(folder, "the folder")
    try:
        guess = _look_at_folder(path, files)
    except DataError as error:
        if not links:
            raise
        raise DataError(f"{error.found} (left out: {told})", wanted=error.wanted, cure=error.cure) from None
    return replace(guess, says=[*guess.says, f"Left out: {told}."]) if links else guess


def _look_at_folder(path: Path, files: list[str]) -> Guess:
    from mmlm.corpus.guess_files import look_at_documents, look_at_files
    from mmlm.corpus.guess_table import look_at_tables

    if guess := look_at_files(path, files):
        return guess
    tables = [f for f in files if f.count("/") <= 1 and f.lower().endswith(ENDINGS)]
    classes = _classes(files)
    if tables:
        try:
            guess = look_at_tables(path, tables)
        except DataError:
            if len(classes) < 2:
                raise
        else:
            if len(classes) < 2 or {"image", "audio"} & set(guess.modalities) or guess.form == "chat":
                return guess
    if len(classes) < 2 and (guess := look_at_documents(path, files)):
        return guess
    if not classes:
        endings = Counter(Path(f).suffix.lower() or "no ending" for f in files)
        seen = ", ".join(f"{n} {e}" for e, n in endings.most_common(4))
        raise DataError(
            f"{path} holds {len(files):,} files ({seen}) in no class folder", wanted=_FORMS, cure=_cure(files)
        )
    if len(classes) == 1:
        raise DataError(
            f"{path} holds a single class folder, {next(iter(classes))!r}",
            wanted="two or more classes",
            cure=_cure(files),
        )
    return _folders(path, files, classes)


def _cure(files: list[str]) -> str:
    return "move the files into a folder per class, or add a CSV with the columns file,label"


def _is_record(name: str) -> bool:
    return name.lower().endswith((*IMAGE_ENDINGS, *AUDIO_ENDINGS, *VIDEO_ENDINGS, *TEXT_ENDINGS))


def _classes(files: list[str]) -> dict[str, list[str]]:
    """class → files in its folder that can be read."""
    with_splits = split_level(files)
    found: dict[str, list[str]] = {}
    for name in files:
        folders = name.split("/")[:-1]
        if with_splits and folders and folders.pop(0).lower() not in SPLIT_NAMES:
            continue
        if folders and _is_record(name):
            found.setdefault(as_label(folders[0]) or folders[0], []).append(name)
    if all(c.lower() in SPLIT_NAMES for c in found):
        return {}  # such as train/1.png beside a table
    return dict(sorted(found.items()))


def _require_utf8(name: str, what: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{what} {name!a} is not named in UTF-8", wanted="names in UTF-8",
            cure="rename it (`convmv -f gb18030 -t utf8 -r --notest FOLDER` renames all below a folder)",
        ) from None  # fmt: skip


def _folders(path: Path, files: list[str], classes: dict[str, list[str]]) -> Guess:
    taken = [f for names in classes.values() for f in names]
    by_kind = {
        "image": [f for f in taken if f.lower().endswith(IMAGE_ENDINGS)],
        "audio": [f for f in taken if f.lower().endswith(AUDIO_ENDINGS)],
        "video": [f for f in taken if f.lower().endswith(VIDEO_ENDINGS)],
        "text": [f for f in taken if f.lower().endswith(TEXT_ENDINGS)],
    }
    says = [f"{path} holds {len(classes)} class folders: {_listed(f'{c} ({len(f)})' for c, f in classes.items())}."]
    names = {"image": "pictures", "audio": "sounds", "video": "videos", "text": "texts"}
    says.append("In them: " + ", ".join(f"{len(v):,} {names[k]}" for k, v in by_kind.items() if v) + ".")
    left = 0
    counts = {"records": len(taken), **{f"class {c}": len(f) for c, f in classes.items()}}
    if split_level(files):
        splits = Counter(SPLIT_NAMES[f.split("/")[0].lower()] for f in taken)
        says.append(
            "They are split already: " + ", ".join(f"{n:,} {s}" for s, n in splits.items()) + "; that split is kept."
        )
        counts |= dict(splits)
        beside = Counter(top for f in files if "/" in f and (top := f.split("/")[0]).lower() not in SPLIT_NAMES)
        if left := beside.total():
            says.append(
                f"Left out, since they lie in no split: {_listed(f'{n:,} in {top}' for top, n in beside.items())}."
            )
    else:
        says.append("No split is given: 10 % for validation and 10 % for test, by a hash of the content.")
    if others := len(files) - len(taken) - left:
        says.append(f"{others:,} other files will be refused or looked into when scanning.")
    media = {k: [path / f for f in v] for k, v in by_kind.items()}
    sizes, seen = measure(media["image"], media["audio"])
    says += seen
    if not sizes and not by_kind["text"] and not by_kind["video"]:
        raise DataError(f"none of the files in {path} can be read", wanted=_FORMS, cure="check that they are whole")
    question = {"en": "Which class is this?", "zh": "这是哪一类？"}
    answer = max(len(c.encode()) for c in classes)
    lengths = [answer + os.path.getsize(f) for f in _sample(media["text"], SAMPLE)]
    sizes["text_bytes"] = text_sizes(lengths or [answer + len(question["zh"].encode())])
    modalities = {k for k, v in by_kind.items() if v} | {"text"}
    source = {
        "kind": "folders",
        "path": ".",
        "task": "category",
        "question": question,
    }
    return Guess(
        "folders",
        path,
        {"sources": [source]},
        {"category": sorted(classes)},
        tuple(sorted(modalities)),
        sizes,
        counts,
        says,
    )


def measure(images: list[Any], sounds: list[Any]) -> tuple[dict[str, Any], list[str]]:
    """Sizes of a sample of media (paths or bytes) and what to say about them."""
    found: dict[str, Any] = {}
    says: list[str] = []
    for kind, items in (("image", images), ("audio", sounds)):
        chosen = _sample(items, SAMPLE)
        headers = [h for h in (_header(i, kind) for i in chosen) if h]
        if bad := len(chosen) - len(headers):
            says.append(f"{bad} of {len(chosen)} {kind} files looked at cannot be read; they will be refused by name.")
        if kind == "image" and headers:
            sides = [max(h.width, h.height) for h in headers if h.width] or [256]
            found["image_side"] = spread(sides)
            colours = any(h.channels != 1 for h in headers) and any(_coloured(i) for i in _sample(chosen, DECODED))
            found["channels"] = 3 if colours else 1
            side = found["image_side"]["median"]
            says.append(
                f"Pictures are {'coloured' if colours else 'grey'}, {side:.0f} pixels on the longer side (median)."
            )
        if kind == "audio" and headers:
            found["audio_seconds"] = spread([round(h.seconds, 3) for h in headers])
            last = found["audio_seconds"]
            says.append(f"Sounds last {last['median']:.2g} s (median), 95 % of them at most {last['p95']:.2g} s.")
    return found, says


def spread(values: list[Any]) -> dict[str, float]:
    return {"median": float(statistics.median(values)), "p95": float(quantile(values, 0.95))}


def text_sizes(lengths: list[int]) -> dict[str, Any]:
    """Of the words of a sample's records, their answers included, in UTF-8 bytes."""
    steps = [float(quantile(lengths, (n + 0.5) / STEPS)) for n in range(STEPS)]
    return {**spread(lengths), "p90": float(quantile(lengths, 0.9)), "max": float(max(lengths)), "steps": steps}


def _sample(items: list[Any], most: int) -> list[Any]:
    return items[:: max(1, -(-len(items) // most))]


def _bytes(item: Any) -> bytes:
    # absolute, since the person may have given a path with `..` in it, which read_uri takes for an attack
    return item if isinstance(item, bytes) else read_uri(address_of(Path(item)) or os.path.abspath(item))


def _header(item: Any, kind: str) -> Header | None:
    try:
        return read_header(_bytes(item), kind)
    except (RefuseError, DataError):
        return None


def _coloured(item: Any) -> bool:
    """Whether a picture has a pixel whose red, green and blue differ visibly; unreadable ones have none."""
    import numpy as np
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(_bytes(item))) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                return False
            rgb = np.asarray(picture.convert("RGB").resize((32, 32)), dtype=np.int16)
    except Exception:  # SVG, or a broken picture: the header said what is to be said
        return _header(item, "image") is not None
    return bool((rgb.max(axis=2) - rgb.min(axis=2) > 12).mean() > 0.01)


def _listed(items: Iterable[str], most: int = 12) -> str:
    every = list(items)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
