"""What is fuzzed: name → a function of bytes that may raise only the errors it promises, and seeds to start from.

Nothing here writes outside of a temporary folder. A function that returns at all, or raises one of the promised
errors, has done its duty; everything else, and every input that takes longer than SECONDS, is a finding.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmlm.config import parse
from mmlm.corpus.config import DocumentsSource, ScanConfig, Source
from mmlm.corpus.drafts import (
    Draft,
    RefuseError,
    as_field,
    as_label,
    as_labels,
    as_number,
    as_split,
    as_text,
    media_part,
    refused_row,
)
from mmlm.corpus.media import Looked, MediaReader
from mmlm.corpus.readers.cutting import tidied
from mmlm.corpus.readers.document_child import answer_to
from mmlm.corpus.readers.documents import Document, decode_html, pieces_of, read_documents
from mmlm.corpus.readers.rows import parse_json, read_rows
from mmlm.corpus.readers.sources import read_source
from mmlm.corpus.readers.tar import read_members
from mmlm.corpus.records import REFUSED, SCHEMA, to_row
from mmlm.corpus.select import check_selector, check_template, fill, find
from mmlm.corpus.sniff import read_header
from mmlm.errors import DataError
from mmlm.features.audio import decode_sound
from mmlm.features.failures import SampleError
from mmlm.features.image import decode_image
from mmlm.features.sample import Sample
from mmlm.features.spec import AudioSpec, ImageSpec, VideoSpec
from mmlm.features.svg import render_svg
from mmlm.features.video import decode_video
from mmlm.shards.codec import pack, unpack
from mmlm.shards.tar import members
from mmlm.storage import resolve, split_fragment
from tests.fuzz.seeds import arrows, chats, data_sets, films, pages, parquets, pdfs, repository, saved, sidecars, warcs
from tests.hostile.corpora import header, member
from tests.hostile.pictures import encode, picture_cases
from tests.hostile.sounds import flac, sound, sound_cases, wav

SECONDS = 2.0
"""Longest time for one input, processor time."""
SLOWER = {"image": 10.0, "video": 10.0, "pdf": 10.0}
"""Exceptions: forty bytes may be a picture of 64 million pixels, and more than that is refused; so with frames. What
takes a PDF longer than DEADLINE is stopped, there by the child's deadline, here by a signal."""
DEADLINE = 5.0
SEED_BYTES = 20_000
"""Larger hostile files are no seeds: mutating them says little."""
REGRESSIONS = Path(__file__).parent / "regressions"
_COLOUR, _GREY = ImageSpec(size=32, patch=8, channels=3), ImageSpec(size=16, patch=8, channels=1, resize="crop")
_SOUND = AudioSpec(max_seconds=1.0, n_mels=40)
_FILM = VideoSpec(fps=2.0, max_frames=4)
_DOCUMENTS = DocumentsSource(kind="documents", max_chars=400, max_bytes=1 << 20)
_ROW = {"a": {"b": [1, {"c": "x", "lang": "fr"}, None]}, "a.b": "whole name", "list": [[1], [2, [3]]], "text": "词"}


@dataclass(frozen=True)
class Target:
    """`run` may raise `allowed` only."""

    run: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]


def _our_tar(data: bytes) -> None:
    for _, _, size in islice(members(io.BytesIO(data)), 10_000):
        assert size >= 0


def _their_tar(data: bytes) -> None:
    for found in islice(read_members(io.BytesIO(data), len(data)), 10_000):
        assert found.problem or 0 <= found.offset <= found.offset + found.size <= len(data)


def _json(data: bytes) -> None:
    try:
        value = parse_json(data)
    except ValueError:
        return
    for convert in (as_text, as_label, as_labels, as_number, as_split, as_field):
        try:
            convert(value)
        except RefuseError:
            continue


def _rows(ending: str, data: bytes) -> None:
    for _ in islice(read_rows(_file(ending, data), "fuzzed"), 10_000):
        pass


@functools.cache
def _folder() -> str:
    return tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


def _file(ending: str, data: bytes) -> Path:
    path = Path(_folder()) / f"{os.getpid()}{ending}"
    path.write_bytes(data)
    return path


def _selector(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    find(_ROW, text)
    fill(text, _ROW)
    for check in (check_selector, check_template):
        try:
            check(text)
        except ValueError:
            continue


def _header(data: bytes) -> None:
    for kind in ("image", "audio", "video"):
        try:
            found = read_header(data, kind)
            assert found.width >= 0 and found.height >= 0 and 0 <= found.seconds < float("inf")
        except RefuseError:
            continue


def _image(data: bytes) -> None:
    for spec in (_COLOUR, _GREY):
        pixels = decode_image(data, spec)
        assert pixels.shape == (spec.size, spec.size, spec.channels) and pixels.dtype == np.uint8


def _sound(data: bytes) -> None:
    frames, _ = decode_sound(data, _SOUND)
    assert frames.ndim == 2 and frames.shape[1] == 40 and np.isfinite(frames).all()


def _video(data: bytes) -> None:
    film = decode_video(data, _FILM, _GREY, _SOUND)
    assert len(film.frames) <= 4 and all(frame.shape == (16, 16, 1) for frame in film.frames)
    assert film.sound is None or np.isfinite(film.sound).all()


class _TooSlow(BaseException):
    """Not an Exception: what is fuzzed may catch those."""


def _stop(number: int, frame: object) -> None:
    raise _TooSlow


def _pdf(data: bytes) -> None:
    before = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, DEADLINE)
    try:
        answer = answer_to({"kind": "pdf", "pages": 50, "chars": 1 << 20}, data)
    except _TooSlow:
        return
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    _pieces(answer)


def _html(data: bytes) -> None:
    _pieces(answer_to({"kind": "html", "chars": 1 << 20}, decode_html(data).encode()))


def _pieces(answer: dict[str, str]) -> None:
    """What a child answers must go through its pipe, and make records or refusals."""
    answer = json.loads(json.dumps(answer).encode())
    if "reason" in answer:
        assert answer["reason"] != "missing" and isinstance(answer["detail"], str)
        return
    document = Document("fuzzed", answer["title"], tidied(answer["text"]))
    for piece in pieces_of(_DOCUMENTS, document, ""):
        if isinstance(piece, Draft):
            assert all((part.text or "").strip() for part in piece.record.parts) and piece.record.target.text


def _warc(data: bytes) -> None:
    name = "fuzzed.warc.gz" if data[:2] == b"\x1f\x8b" else "fuzzed.warc"
    for _ in read_documents(_DOCUMENTS, [name], [(name, _file(name, data))]):
        pass


@functools.cache
def _parsed(kind: str) -> Source:
    ask = {"task": "mood", "text": "text", "question": "好吗？", "label": "label"}
    columns = {"id": "id", "image": "picture.bytes", "lang": "lang"}
    sources = {
        "table": {"kind": "table", "files": "*.parquet", "map": columns, "ask": [ask]},
        "chat": {"kind": "chat", "files": "*.jsonl"},
        "hf": {"kind": "hf"},
        "sidecar": {"kind": "sidecar"},
        "documents": {"kind": "documents", "max_chars": 80, "overlap": 20},
    }
    return parse(ScanConfig, {"sources": [sources[kind]]}, "fuzzed").sources[0]


def _corpus(kind: str, files: dict[str, bytes]) -> None:
    """What a source makes of a folder: records and refusals that their tables take."""
    folder = Path(_folder()) / f"{os.getpid()}-{kind}"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():  # not written over: the last run may have mapped it into memory
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    reader = MediaReader(folder, drop=False, allow_remote=False, threads=1)
    found = list(islice(reader.look(read_source(_parsed(kind), folder)), 10_000))
    pa.Table.from_pylist([to_row(one.record) for one in found if isinstance(one, Looked)], schema=SCHEMA)
    pa.Table.from_pylist([refused_row(one) for one in found if not isinstance(one, Looked)], schema=REFUSED)


def _one_of(kind: str, files: Callable[[], dict[str, bytes]], data: bytes) -> None:
    """The first byte chooses the file that the rest stands for."""
    whole = files()
    name = sorted(whole)[data[0] % len(whole)] if data else min(whole)
    _corpus(kind, {**whole, name: data[1:]})


def _svg(data: bytes) -> None:
    assert render_svg(data, 64).shape[2] == 3


@functools.cache
def _sample() -> dict[str, bytes]:
    image, mel = np.zeros((16, 16, 3), np.uint8), np.zeros((20, 8), np.float16)
    whole = Sample("id", "task", np.arange(9, dtype=np.int32), 4, [image], [mel], {"age": 3.0}, [(1, 2)], label="a")
    return pack(whole)


def _unpack(data: bytes) -> None:
    """The first byte chooses the member that the rest stands for."""
    whole = _sample()
    name = sorted(whole)[data[0] % len(whole)] if data else "json"
    assert unpack({**whole, name: data[1:]}).tokens.dtype == np.int32


def _data_uri(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    part = media_part("image", text, "root", "/data")
    if part.uri is not None:
        uri, _, _ = split_fragment(part.uri)
        where = resolve(uri, "/data")
        assert os.path.isabs(uri) or "://" in uri or os.path.normpath(where).startswith("/data"), where


def _small(cases: dict[str, tuple[bytes, str]], *endings: str) -> list[bytes]:
    return [
        data
        for name, (data, _) in cases.items()
        if name.endswith(endings) and len(data) <= SEED_BYTES and "just_below" not in name
    ]


def _pictures() -> list[bytes]:
    good = [encode(form) for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")]
    odd = [encode("PNG", mode="RGBA"), encode("PNG", mode="L"), encode("JPEG", progressive=True)]
    return [*good, *odd, *_small(picture_cases("/nonexistent"), ".png", ".gif", ".webp", ".jpg", ".bmp", ".tif")]


def _sounds() -> list[bytes]:
    good = [wav(), flac(), sound("OGG", "VORBIS"), sound("MP3", "MPEG_LAYER_III"), sound("WAV", "IMA_ADPCM")]
    return [*good, *_small(sound_cases(), ".wav", ".flac", ".ogg", ".mp3")]


def _tars() -> list[bytes]:
    whole = member("a.png", b"12345") + member("a.txt", b"x") + bytes(1024)
    pax = member("pax", b"12 path=a.b\n", b"x") + member("c.txt", b"y") + bytes(1024)
    return [whole, pax, header(b"././@LongLink", 5, b"L") + b"abcd\0" + bytes(507) + whole, b"\x1f\x8b", b""]


def _packed() -> list[bytes]:
    return [bytes([i]) + data for i, (_, data) in enumerate(sorted(_sample().items()))]


def _texts(*texts: str) -> Callable[[], list[bytes]]:
    return lambda: [text.encode("utf-8", "surrogatepass") for text in texts]


_JSON = ('{"id": 1, "messages": [{"role": "user", "content": "词"}]}', "[1, NaN, 1e999]", '"\\ud800"', "[" * 50, "{}")
_CSV = ('a,b\n1,"two\nlines"\n3,4\n', "a;b\n\x00;2\n", 'a\tb\n"open', "\ufeff图,标\n甲,乙\n")
_MARKDOWN = (
    "---\ntitle: 'An end'\n---\n# One #\n\nA sentence. Another one is longer.\n\n```\n# code\n```\n## Two\n\n- a\n- b",
    "# \u4e00\n\n这是一句话。第二句话比较长，有逗号，也有问号吗？是的！\n\n\u3000\u3000段落。\n" * 3,
    "Under\n=====\n\n~~~~\n```\n~~~\n\nE.g. Dr. No said “stop.” It was 3.14 p.m. … and\r\nso on.",
)
TARGETS: dict[str, Target] = {
    "our_tar": Target(_our_tar, (ValueError,), _tars),
    "their_tar": Target(_their_tar, (RefuseError,), _tars),
    "json": Target(_json, (), _texts(*_JSON)),
    "jsonl": Target(functools.partial(_rows, ".jsonl"), (DataError,), _texts("\n".join(_JSON), *_JSON)),
    "json_list": Target(functools.partial(_rows, ".json"), (DataError,), _texts(*_JSON)),
    "csv": Target(functools.partial(_rows, ".csv"), (DataError,), _texts(*_CSV)),
    "tsv": Target(functools.partial(_rows, ".tsv"), (DataError,), _texts(*_CSV)),
    "parquet": Target(lambda data: _corpus("table", {"t.parquet": data}), (DataError,), parquets),
    "arrow": Target(
        lambda data: _corpus("hf", {"state.json": saved()["state.json"], "data.arrow": data}), (DataError,), arrows
    ),
    "hf_folder": Target(functools.partial(_one_of, "hf", saved), (DataError,), lambda: data_sets(saved())),
    "hf_repository": Target(
        functools.partial(_one_of, "hf", repository), (DataError,), lambda: data_sets(repository())
    ),
    "chat": Target(lambda data: _corpus("chat", {"c.jsonl": data}), (DataError,), chats),
    "sidecar": Target(functools.partial(_one_of, "sidecar", sidecars), (DataError,), lambda: data_sets(sidecars())),
    "selector": Target(_selector, (), _texts("a.b[1].c", "a[lang=fr].b", "{a.b} and {list[0][*]}", "list[-1]", "a.b[")),
    "header": Target(_header, (), lambda: [*_pictures(), *_sounds()]),
    "image": Target(_image, (SampleError,), _pictures),
    "sound": Target(_sound, (SampleError,), _sounds),
    "video": Target(_video, (SampleError,), films),
    "pdf": Target(_pdf, (), pdfs),
    "html": Target(_html, (RefuseError,), pages),
    "markdown": Target(lambda data: _corpus("documents", {"d.md": data}), (DataError,), _texts(*_MARKDOWN)),
    "plain": Target(lambda data: _corpus("documents", {"d.txt": data}), (DataError,), _texts(*_MARKDOWN)),
    "warc": Target(_warc, (), warcs),
    "warc_gz": Target(lambda data: _warc(gzip.compress(data, 1)), (), warcs),
    "svg": Target(_svg, (SampleError,), lambda: _small(picture_cases("/nonexistent"), ".svg")),
    "unpack": Target(_unpack, (DataError,), _packed),
    "data_uri": Target(
        _data_uri,
        (RefuseError,),
        _texts(
            "data:image/png;base64,AAAA", "a/../b.png", "file:///etc/x", "a.wav#t=1,2", "s3://b/k", "..\\x", "data:,%41"
        ),
    ),
}


def check(name: str, data: bytes) -> None:
    """Run one input; what it may not raise comes out."""
    target = TARGETS[name]
    try:
        target.run(data)
    except target.allowed:
        return


def regressions() -> Iterator[tuple[str, Path]]:
    """(target, file) of every input that once was a finding."""
    for path in sorted(REGRESSIONS.glob("*/*")):
        if path.parent.name in TARGETS:
            yield path.parent.name, path


def seeds_as_json() -> str:
    """How many seeds each target has, for people."""
    return json.dumps({name: len(target.seeds()) for name, target in TARGETS.items()})
