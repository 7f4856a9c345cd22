"""Chat messages of the usual dialects become records."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.guess import look
from mmlm.corpus.records import Record
from mmlm.corpus.scan import scan
from mmlm.errors import DataError
from tests.corpus.samples import Scan, png, wav, write_lines

SOURCE = {"kind": "chat", "files": "c.jsonl", "task": "chat"}
URI = "data:image/png;base64," + base64.b64encode(png(9)).decode()


def parts(record: Record) -> list[tuple[str, str, str | None]]:
    return [(p.kind, p.role, p.uri or p.text or ("inline" if p.data else None)) for p in record.parts]


def turns(*content: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(content)]


def test_dialects(tmp_path: Path, scanned: Scan) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    (tmp_path / "a.wav").write_bytes(wav(2))
    sound = base64.b64encode(wav(4)).decode()
    q = {"type": "text", "text": "What?"}
    picture = {"type": "image", "image": "a.png"}
    heard = {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}
    rows = [
        {"id": "plain", "messages": turns("What?", "A cat."), "label": "cat", "split": "validation", "group": "g"},
        {"id": "parts", "messages": turns([picture, {"type": "audio", "audio": "a.wav"}, q], "x")},
        {"id": "url", "messages": turns([{"type": "image_url", "image_url": {"url": URI}}, q], "x")},
        {"id": "input", "messages": turns([heard, q], "x")},
        {
            "id": "gpt", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}],
            "image": "a.png",
        },
        {
            "id": "middle", "messages": turns("<image> or <image>, heard as <audio>?", "x"),
            "images": ["a.png", "b.png"], "audios": ["a.wav"],
        },
        {"id": "list", "messages": turns("What?", "x"), "images": ["b.png"]},
        {"id": "hole", "messages": turns([{"type": "image"}, q], "x"), "images": ["b.png"]},
        {"id": "fields", "messages": turns([{"type": "fields", "fields": {"age": 3, "sex": "f", "bp": None}}, q], "x")},
        {"id": "long", "messages": [{"role": "system", "content": "Be brief."}, *turns("Hello", "Hi", "What?", "x")]},
        {"id": "class", "messages": turns("What?"), "label": 7, "task": "digit"},
        {"id": "classes", "messages": turns("What?"), "labels": ["b", "a", "b"]},
        {"id": "no list", "messages": turns("Is <image> a tag?", "Yes.")},
    ]  # fmt: skip
    write_lines(tmp_path / "c.jsonl", rows)
    made = scanned(tmp_path, SOURCE)
    assert not made.refused
    r = made.records
    question = ("text", "user", "What?")
    assert (r["plain"].target.text, r["plain"].target.label, r["plain"].split, r["plain"].group) == (
        "A cat.",
        "cat",
        "val",
        "g",
    )
    assert parts(r["parts"]) == [("image", "user", "a.png"), ("audio", "user", "a.wav"), question]
    assert parts(r["url"]) == [("image", "user", "inline"), question]
    assert r["input"].parts[0].data == wav(4)
    assert parts(r["gpt"]) == [("image", "user", "a.png"), question]
    assert [p[2] for p in parts(r["middle"])] == ["a.png", "or", "b.png", ", heard as", "a.wav", "?"]
    assert parts(r["list"]) == parts(r["hole"]) == [("image", "user", "b.png"), question]
    assert r["fields"].parts[0].fields == {"age": 3.0, "sex": "f", "bp": None}
    assert parts(r["long"]) == [
        ("text", "system", "Be brief."), ("text", "user", "Hello"), ("text", "assistant", "Hi"), question,
    ]  # fmt: skip
    assert [p.turn for p in r["long"].parts] == [-3, -2, -1, 0]
    assert [p.modality for p in r["long"].parts] == ["text", "context", "context", "text"]
    assert (r["class"].task, r["class"].target.label, r["class"].target.text) == ("digit", "7", None)
    assert r["classes"].target.labels == ("a", "b")
    assert parts(r["no list"]) == [("text", "user", "Is <image> a tag?")]


def test_refusals(tmp_path: Path, scanned: Scan) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    rows: list[Any] = [
        {"id": "good", "messages": turns("What?", "x")},
        {"id": "no target", "messages": turns("What?")},
        {"id": "no messages", "text": "What?"},
        {"id": "empty", "messages": []},
        {"id": "silent", "messages": turns("What?", " ")},
        {"id": "no question", "messages": turns("", "x")},
        {"id": "too few", "messages": turns("<image><image>", "x"), "images": ["a.png"]},
        {"id": "too many", "messages": turns("<image>", "x"), "images": ["a.png", "a.png"]},
        {"id": "role", "messages": [{"role": "wizard", "content": "x"}]},
        {"id": "part", "messages": turns([{"type": "hologram"}], "x")},
        {"id": "kind", "messages": turns([{"type": {"of": "image"}}], "x")},
        {"id": "film", "messages": turns([{"type": "video", "video": "a.mp4"}], "x")},
        {"id": "climbs", "messages": turns([{"type": "image", "image": "../a.png"}], "x")},
        {"id": "number", "messages": turns(7, "x")},
        {"id": "twice", "messages": "What?"},
    ]
    write_lines(tmp_path / "c.jsonl", rows)
    made = scanned(tmp_path, SOURCE)
    assert set(made.records) == {"good"}
    assert {r["id"]: r["reason"] for r in made.refused} == {
        "no target": "no_target", "no messages": "no_messages", "empty": "no_messages", "silent": "no_target",
        "no question": "no_parts", "too few": "media_mismatch", "too many": "media_mismatch", "role": "bad_role",
        "part": "unsupported_kind", "kind": "unsupported_kind", "film": "missing_file", "climbs": "unsafe_path",
        "number": "bad_row", "twice": "no_messages",
    }  # fmt: skip


def test_media_lie_below_root(tmp_path: Path, scanned: Scan) -> None:
    (tmp_path / "deep/media").mkdir(parents=True)
    (tmp_path / "deep/media/a.png").write_bytes(png(1))
    rows = [{"id": str(i), "messages": turns([{"type": "image", "image": "media/a.png"}], "x")} for i in range(3)]
    write_lines(tmp_path / "deep/c.jsonl", rows)
    made = scanned(tmp_path, {**SOURCE, "files": "**/*.jsonl", "root": "deep"})
    assert made.records["0"].parts[0].uri == "deep/media/a.png"


def test_turns_are_numbered_and_media_keep_theirs(tmp_path: Path, scanned: Scan) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(ord(name[0])))
    talk = turns("What is <image>?", "A cat.", "And <image>?", "A dog.")
    called = [
        {"role": "user", "content": "How warm is it?"}, {"role": "assistant", "content": "call weather()"},
        {"role": "tool", "content": "17"}, {"role": "assistant", "content": "17 degrees."},
    ]  # fmt: skip
    rows = [
        {"id": "two", "messages": talk, "images": ["a.png", "b.png"]},
        {"id": "list", "messages": turns("What is it?", "A cat.", "Sure?", "Yes."), "images": ["a.png"]},
        {"id": "tool", "messages": called},
        {
            "id": "end",
            "messages": [*turns("Hello", "Hi", "What?"), {"role": "system", "content": "Be brief."}],
            "label": "x",
        },
    ]
    write_lines(tmp_path / "c.jsonl", rows)
    made = scanned(tmp_path, SOURCE)
    assert not made.refused
    found = {name: [(p.kind, p.role, p.turn) for p in record.parts] for name, record in made.records.items()}
    assert found["two"] == [
        ("text", "user", -2), ("image", "user", -2), ("text", "user", -2), ("text", "assistant", -1),
        ("text", "user", 0), ("image", "user", 0), ("text", "user", 0),
    ]  # fmt: skip
    assert found["list"][0] == ("image", "user", -2)
    assert found["tool"] == [("text", "user", 0), ("text", "assistant", 0), ("text", "tool", 0)]
    assert found["end"] == [("text", "user", -2), ("text", "assistant", -1), ("text", "user", 0), ("text", "system", 0)]


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def test_calls_of_tools_are_text_of_their_turn(tmp_path: Path, scanned: Scan) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    asked = {"role": "user", "content": "How warm is it?"}
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [
        {"id": "used", "tools": [WEATHER], "messages": [
            asked, calls, {"role": "tool", "content": "17"}, {"role": "assistant", "content": "17 degrees."},
        ]},
        {"id": "last", "tools": "[]", "messages": [asked, {**calls, "content": "Let me look.", "tool_calls": [call, call]}]},
        {"id": "old", "messages": [asked, {"role": "assistant", "function_call": {"name": "weather", "arguments": "{bad"}}]},
        {"id": "nameless", "messages": [asked, {**calls, "tool_calls": [{"function": {"arguments": "{}"}}]}]},
        {"id": "sharegpt", "conversations": [
            {"from": "human", "value": "What?"}, {"from": "function_call", "value": '{"name": "f"}'},
            {"from": "observation", "value": "1"}, {"from": "gpt", "value": "One."},
        ]},
    ]  # fmt: skip
    write_lines(tmp_path / "c.jsonl", rows)
    made = scanned(tmp_path, SOURCE)
    r, said = made.records, '{"name": "weather", "arguments": {"city": "北京"}}'
    assert [(p.role, p.turn, p.text) for p in r["used"].parts] == [
        ("system", -1, '{"type": "function", "function": {"name": "weather", "parameters": {}}}'),
        ("user", 0, "How warm is it?"), ("assistant", 0, said), ("tool", 0, "17"),
    ]  # fmt: skip
    assert r["last"].target.text == f"Let me look.\n{said}\n{said}" and len(r["last"].parts) == 1
    assert r["old"].target.text == '{"name": "weather", "arguments": "{bad"}'
    assert [p.role for p in r["sharegpt"].parts] == ["user", "assistant", "tool"]
    assert [(row["id"], row["reason"]) for row in made.refused] == [("nameless", "bad_row")]


def test_turns_after_the_last_answer_are_cut_and_counted(tmp_path: Path, scanned: Scan) -> None:
    rows = [
        {"id": "thanks", "messages": turns("What?", "A cat.", "Thanks.")},
        {"id": "whole", "messages": turns("What?", "A dog.")},
        {"id": "labelled", "messages": turns("What?", "A cat.", "Sure?"), "label": "yes"},
        {"id": "asked", "messages": turns("What?")},
    ]
    write_lines(tmp_path / "c.jsonl", rows)
    made = scanned(tmp_path, SOURCE)
    assert [(p.turn, p.text) for p in made.records["thanks"].parts] == [(0, "What?")]
    assert made.records["thanks"].target.text == "A cat." and made.counts["chats_cut"] == 1
    assert [p.text for p in made.records["labelled"].parts] == ["What?", "A cat.", "Sure?"]
    assert [row["id"] for row in made.refused] == ["asked"]
    assert any(s.startswith("1 of 3 go on") for s in look(tmp_path / "c.jsonl").says)


def test_ids_that_repeat_are_groups(tmp_path: Path, scanned: Scan) -> None:
    rows = [{"id": str(i % 20), "messages": turns(f"What is {i}?", str(i))} for i in range(40)]
    write_lines(tmp_path / "c.jsonl", rows)
    config = parse(ScanConfig, {"sources": [SOURCE]}, "scan")
    with pytest.raises(DataError, match="`id: hash` in the chat source"):
        scan(config, data=tmp_path, out=tmp_path / "out")
    guess = look(tmp_path / "c.jsonl")
    assert guess.scan["sources"] == [{"kind": "chat", "files": "c.jsonl", "id": "hash"}]
    made = scanned(tmp_path, *guess.scan["sources"])
    assert made.counts["kept"] == 40 and {r.group for r in made.records.values()} == {str(i) for i in range(20)}
    assert all(len({r.split for r in made.records.values() if r.group == str(i)}) == 1 for i in range(20))
    write_lines(tmp_path / "c.jsonl", [{"id": "0", "messages": turns("Anew?", "Yes.")}, *reversed(rows)])
    again = scanned(tmp_path, *guess.scan["sources"])
    assert made.records.keys() < again.records.keys()


def test_why_no_chat_can_be_read_is_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "c.jsonl", [{"messages": [{"role": "wizard", "content": "x"}]}] * 3)
    with pytest.raises(DataError, match=r"c\.jsonl:1: bad_role, role 'wizard'"):
        look(tmp_path / "c.jsonl")
