"""Small whole files to start from: films, PDFs, pages, WARCs, tables, data sets, chats and side-car files."""

from __future__ import annotations

import base64
import functools
import gzip
import io
import json
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.corpus.samples import png

_FORMS = {
    "mp4": ("mpeg4", "aac"),
    "mov": ("mjpeg", "aac"),
    "avi": ("mpeg4", "mp3"),
    "matroska": ("mjpeg", "mp3"),
}
TEXT = "The owl sat in the oak. It saw the moon rise over the lake, and it was glad. 猫头鹰看见了月亮。"


@functools.cache
def films() -> list[bytes]:
    """One second of 32 x 24 pixels and a tone, in each container that is read, and without one of the two."""
    made = [_film(form, *codecs) for form, codecs in _FORMS.items()]
    return [*made, _film("mp4", "mpeg4", ""), _film("mp4", "", "aac"), _film("webm", "libvpx", ""), made[0][:900], b""]


def _film(form: str, picture: str, sound: str) -> bytes:
    import av

    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        if picture:
            stream: Any = container.add_stream(picture, rate=5)
            stream.width, stream.height = 32, 24
            stream.pix_fmt = "yuvj420p" if picture == "mjpeg" else "yuv420p"
        if sound:  # before the first packet, which writes the header
            audio: Any = container.add_stream(sound, rate=16000)
            audio.layout = "mono"
        if picture:
            for i in range(5):
                frame: Any = av.VideoFrame.from_ndarray(np.full((24, 32, 3), 40 * i, np.uint8), format="rgb24")
                frame.pts = i
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        if sound:
            wave, kind = 0.3 * np.sin(np.arange(8000) / 9), audio.codec_context.format.name
            values = (wave * (2**31 - 1)).astype(np.int32) if kind.startswith("s32") else wave.astype(np.float32)
            whole: Any = av.AudioFrame.from_ndarray(values[None], format=kind, layout="mono")
            whole.sample_rate, whole.pts = 16000, 0
            fifo = av.AudioFifo()
            fifo.write(whole)
            while (frame := fifo.read(audio.codec_context.frame_size or 1024, partial=True)) is not None:
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return out.getvalue()


def _pdf(objects: list[bytes], trailer: bytes = b"") -> bytes:
    made, places = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(made))
        made += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % at for at in places)
    return (
        made + b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R %s>>\nstartxref\n%d\n%%%%EOF\n"
        % (len(objects) + 1, table, len(objects) + 1, trailer, len(made))
    )  # fmt: skip


def _stream(data: bytes, *, more: bytes = b"") -> bytes:
    return b"<< /Length %d %s>>\nstream\n%s\nendstream" % (len(data), more, data)


def pdfs() -> list[bytes]:
    """Of one page each: plain, deflated, ASCII filters, a font with a map of characters, forms, outlines, odd links."""
    words = b"BT /F1 12 Tf 72 700 Td (The owl sat in the oak.) Tj 0 -14 Td [(It) -250 (saw) 3 (it)] TJ T* (x) ' ET"
    cmap = (
        b"/CIDInit /ProcSet findresource begin 12 dict begin begincmap 1 begincodespacerange <00> <FF> endcodespacerange "
        b"1 beginbfchar <41> <732B> endbfchar 1 beginbfrange <42> <50> <0042> endbfrange endcmap end end"
    )
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding << /Differences [65 /B /C] >> "
    head = [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>"]
    page = (
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 5 0 R >> "
        b"/XObject << /X 7 0 R >> >> /Contents 4 0 R >>"
    )
    deflated = _stream(zlib.compress(words), more=b"/Filter /FlateDecode ")
    hexed = _stream(words.hex().encode() + b">", more=b"/Filter /ASCIIHexDecode ")
    predicted = _stream(
        zlib.compress(b"".join(b"\0" + words[i : i + 8] for i in range(0, len(words), 8))),
        more=b"/Filter [/FlateDecode] /DecodeParms [<< /Predictor 12 /Columns 8 >>] ",
    )
    runs = _stream(b"\x04BT /F\xfe1\x80", more=b"/Filter /RunLengthDecode ")
    form = _stream(b"q /X Do Q " + words, more=b"/Type /XObject /Subtype /Form /BBox [0 0 9 9] ")
    made = [
        _pdf([*head, page, content, font + b"/ToUnicode 6 0 R >>", _stream(cmap), form])
        for content in (_stream(words), deflated, hexed, predicted, runs, _stream(b"/X Do " + words))
    ]
    titled = _pdf(
        [*head, page, deflated, font + b">>", b"<< /Title (An owl) /Author <FEFF732B> >>", form], b"/Info 6 0 R "
    )
    objects = b"8 0 9 36 << /Type /Catalog /Pages 2 0 R >> "
    packed = _pdf([*head, page, deflated, font + b">>", _stream(objects, more=b"/Type /ObjStm /N 1 /First 4 "), form])
    return [*made, titled, packed, made[0].replace(b"xref", b"xerf"), made[1][:400], b"%PDF-1.4\n", b""]


def pages() -> list[bytes]:
    whole = (
        f"<!DOCTYPE html><html><head><title>Owls &amp; oaks</title><meta charset=utf-8><style>p{{}}</style></head><body>"
        f"<h1>Owls</h1><p>{TEXT}</p><ul><li>one<li>two</ul><table><tr><td>a<td>b</table><pre>  kept  so </pre>"
        "<script>alert(1)</script><!-- no --><svg><text>x</text></svg><p>&#x1F989;&nbsp;&bogus;<br>end</body></html>"
    )
    return [
        whole.encode(), whole.encode("utf-16"), whole.replace("utf-8", "gb18030").encode("gb18030"),
        b"<p>" * 300 + TEXT.encode(), b"<div " + b"a=1 " * 50 + b">x" + TEXT.encode(), TEXT.encode(), b"<", b"<![CDATA[",
        b"<html xmlns:x='y'><x:p>" + TEXT.encode(), b"",
    ]  # fmt: skip


def warcs() -> list[bytes]:
    body = TEXT.encode()
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n\r\n" % len(body)
    chunked = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    zipped = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(
        body, mtime=0
    )
    records = [
        _record(b"warcinfo", b"application/warc-fields", b"software: x\r\n"),
        _record(b"response", b"application/http; msgtype=response", http + body),
        _record(b"response", b"application/http; msgtype=response", chunked),
        _record(b"response", b"application/http; msgtype=response", zipped),
        _record(b"conversion", b"text/plain", body),
    ]
    whole = b"".join(records)
    return [
        whole,
        b"".join(gzip.compress(r, mtime=0) for r in records),
        whole[:700],
        *records[1:3],
        b"WARC/1.0\r\n",
        b"",
    ]


def _record(kind: bytes, form: bytes, content: bytes) -> bytes:
    return (
        b"WARC/1.0\r\nWARC-Type: %s\r\nWARC-Record-ID: <urn:uuid:1>\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
        b"WARC-Target-URI: http://a.example/\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n"
        % (kind, form, len(content), content)
    )  # fmt: skip


_FEATURES: dict[str, Any] = {
    "picture": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["calm", "高兴"]},
    "text": {"_type": "Value", "dtype": "string"}, "lang": {"_type": "Value", "dtype": "string"},
}  # fmt: skip


@functools.cache
def _table() -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "id": f"r{i}",
                "picture": {"bytes": png(i), "path": None},
                "label": i % 2,
                "text": f"{i}: {TEXT}",
                "lang": "en",
            }
            for i in range(4)
        ]
    )


def _parquet(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def _arrow(table: pa.Table, whole: bool = False, **options: Any) -> bytes:
    out = io.BytesIO()
    make = pa.ipc.new_file if whole else pa.ipc.new_stream
    with make(out, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=2)
    return out.getvalue()


def _odd_table() -> pa.Table:
    """Columns of kinds that a row seldom has."""
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table(
        {
            "text": pa.array(["a", None]).dictionary_encode(), "label": pa.array([1, 0], pa.int8()),
            "id": pa.array([10**18, 0], pa.timestamp("ns")), "picture": pa.array([None, {"bytes": png(1)}], picture),
            "lang": pa.array(["zh", "en"], pa.large_string()), "many": pa.array([[{"a": 1}], []]),
            "m": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int8())), "d": pa.array([1, 2], pa.decimal128(5)),
            "x": pa.array([1.5, float("nan")]),
        }
    )  # fmt: skip


def parquets() -> list[bytes]:
    whole = _parquet(_table(), row_group_size=2, compression="none")
    packed = [_parquet(_table(), compression=name, use_dictionary=False) for name in ("snappy", "gzip", "zstd")]
    return [whole, *packed, _parquet(_odd_table(), compression="none"), whole[: len(whole) // 2], b"PAR1PAR1", b""]


def arrows() -> list[bytes]:
    whole = _arrow(_table())
    packed = [_arrow(_table(), compression="zstd"), _arrow(_table(), whole=True)]
    told = {"huggingface": json.dumps({"info": {"features": _FEATURES}})}
    told_within = _arrow(_table().replace_schema_metadata(told))
    return [whole, *packed, told_within, _arrow(_odd_table()), whole[: len(whole) // 2], b"ARROW1", b""]


@functools.cache
def saved() -> dict[str, bytes]:
    """What `save_to_disk` writes."""
    state = {"_data_files": [{"filename": "data.arrow"}], "_split": "train"}
    return {
        "data.arrow": _arrow(_table()),
        "state.json": json.dumps(state).encode(),
        "dataset_info.json": json.dumps({"features": _FEATURES}, ensure_ascii=False).encode(),
    }


@functools.cache
def repository() -> dict[str, bytes]:
    readme = """---
configs:
- config_name: default
  data_files: [{split: train, path: "*.parquet"}]
dataset_info:
  features:
  - {name: picture, dtype: image}
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': calm, '1': 高兴}}}}
---
"""
    return {"README.md": readme.encode(), "train-0.parquet": _parquet(_table(), compression="none")}


@functools.cache
def sidecars() -> dict[str, bytes]:
    told = {
        "label": "owl",
        "question": "哪个？",
        "fields": {"age": 3, "sex": "f"},
        "split": "train",
    }
    return {"x.png": png(1), "x.txt": TEXT.encode(), "x.json": json.dumps(told, ensure_ascii=False).encode()}


def data_sets(files: dict[str, bytes]) -> list[bytes]:
    """Each file behind the byte that chooses it."""
    return [bytes([i]) + data for i, (_, data) in enumerate(sorted(files.items()))] + [b""]


def chats() -> list[bytes]:
    inline = "data:image/png;base64," + base64.b64encode(png(2)).decode()
    lines: list[dict[str, Any]] = [
        {"id": "a", "messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Yes."}]},
        {"conversations": [{"from": "human", "value": "<image>\n谁？"}, {"from": "gpt", "value": "猫"}], "images": [inline]},
        {"messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {"url": inline}}]},
            {"role": "tool", "content": "t"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ], "split": "val", "lang": "zh", "group": 7},
        {"messages": [{"role": "user", "content": [{"type": "fields", "fields": {"age": 50}}]}], "label": "x"},
    ]  # fmt: skip
    each = [json.dumps(line, ensure_ascii=False).encode() for line in lines]
    return [b"\n".join(each), *each, b'{"messages": [{"role": "user", "content": "\\ud800"}], "number": 1}', b"[]", b""]
