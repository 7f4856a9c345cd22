"""Tables, looked at: what is asked of their rows."""

from __future__ import annotations

import os
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from mmlm.corpus.column_names import name_of
from mmlm.corpus.columns import ROWS
from mmlm.corpus.guess import Guess, _listed, measure, text_sizes
from mmlm.corpus.guess_ask import Asked
from mmlm.corpus.records import Target
from mmlm.corpus.select import find
from mmlm.corpus.table_files import (
    no_header,
    no_row,
    one_table,
    only_in_training,
    other_encoding,
    refused_words,
    sampled_rows,
    sources,
    spelled_alike,
    spelling_words,
    split_words,
    with_target,
)
from mmlm.errors import DataError
from mmlm.storage import is_remote


def look_at_tables(data: Path, names: list[str]) -> Guess:
    """What the tables `names` (relative to folder `data`) hold. Raises DataError when no target can be found."""
    groups = one_table(data, names)
    rows, totals = {}, {}
    for name, _ in groups:
        rows[name], totals[name] = sampled_rows(data, name)
    shown = ", ".join(name for name, _ in groups)
    if not any(rows.values()):
        raise no_row(data, [name for name, _ in groups], shown)
    every = [r for found in rows.values() for r in found]
    says = [f"{n} is not UTF-8; it is read as {read_as}." for n in rows if (read_as := other_encoding(data / n))]
    if sum("messages" in r or "conversations" in r for r in every) > len(every) / 2:
        return _chat(data, groups, every, sum(totals.values()), says)
    rows, spelling = spelled_alike(groups, rows)
    says += [spelling_words(name, other) for name, other in spelling.items()]
    headless = [m for name, _ in groups if (m := no_header(name, rows[name]))]
    try:
        guess = _guess(data, groups, rows, totals, says, spelling)
    except DataError as error:
        raise headless[0] if headless else error from None
    if headless:
        guess.says.insert(1, f"Mind: {headless[0]}.")  # behind what the story is called after
    return guess


def _guess(
    data: Path, groups: list[tuple[str, str]], rows: dict[str, list[dict[str, Any]]], totals: dict[str, int],
    says: list[str], spelling: dict[str, dict[str, str]],
) -> Guess:  # fmt: skip
    """What tables that belong together, of which `rows` are looked at, hold."""
    likely = only_in_training(groups, rows)
    groups, without = with_target(groups, rows, likely or _target_of(data, groups, rows))
    if without:
        says.append(f"Left out, since nothing in it is labelled: {_listed(without)}.")
    table = _Table(data, groups, [rows[name] for name, _ in groups], sum(totals[n] for n, _ in groups))
    return table.guess(likely, says, spelling)


def _target_of(data: Path, groups: list[tuple[str, str]], rows: dict[str, list[dict[str, Any]]]) -> str:
    """What would be answered if there were only the training table; "" with a single table."""
    if len(groups) == 1:
        return ""
    training = next((g for g in groups if g[1] == "train"), groups[0])
    ask = _Table(data, [training], [rows[training[0]]], 0).guess("", [], {}).scan["sources"][0]["ask"][0]
    return str(next((ask[k] for k in ("label", "labels", "number", "answer") if k in ask), ""))


def _chat(data: Path, groups: list[tuple[str, str]], rows: list[dict[str, Any]], total: int, says: list[str]) -> Guess:
    from mmlm.corpus.config import ChatSource
    from mmlm.corpus.drafts import Draft, Refusal
    from mmlm.corpus.readers.chat import read_chat

    name = groups[0][0]
    roots = sorted({"", os.path.dirname(name)})
    best: tuple[int, str, list[Any]] = (-1, "", [])
    refused: list[Refusal] = []
    cut = 0
    for root in roots:
        source = ChatSource(kind="chat", files=[name], root=root)
        found = list(islice(read_chat(source, [(name, data / name)], ""), ROWS))
        refused, cut = [d for d in found if isinstance(d, Refusal)], sum(isinstance(d, Draft) and d.cut for d in found)
        drafts = [d.record for d in found if isinstance(d, Draft)]
        there = sum(
            os.path.isfile(data / p.uri) for r in drafts[:200] for p in r.parts if p.uri and not is_remote(p.uri)
        )
        if there > best[0]:
            best = (there, root, drafts)
    _, root, records = best
    if not records:
        why = f": {refused[0].source}: {refused[0].reason}, {refused[0].detail}" if refused else ""
        raise DataError(
            f"{name} looks like chat messages, but none can be read{why}",
            wanted="messages of which the last is the assistant's",
            cure="check the file, or write scan.yaml by hand",
        )
    tasks: dict[str, set[str]] = {}
    for r in records:
        tasks.setdefault(r.task, set()).update([r.target.label] if r.target.label else [])
    media = {
        k: [p.data or data / (p.uri or "") for r in records for p in r.parts if p.kind == k] for k in ("image", "audio")
    }
    sizes, seen = measure(media["image"], media["audio"])
    sizes["text_bytes"] = text_sizes(
        [_bytes_of([*(p.text or "" for p in r.parts), _answer(r.target)]) for r in records]
    )
    for kind in media:
        sizes[f"{kind}s_each"] = max(sum(p.kind == kind for p in r.parts) for r in records)
    said = f"{_listed(n for n, _ in groups)}: {total:,} chat records, each with a question and an answer."
    says = [said, *says, *seen]
    says.append(split_words(groups, "split" if any(r.split for r in records) else None))
    ids = [str(r["id"]) for r in rows if r.get("id") not in (None, "")]
    repeated = len(set(ids)) < len(ids)
    if repeated:
        says.append("Ids repeat: each is taken for a group, and every record is named by its content (`id: hash`).")
    if cut:
        says.append(f"{cut:,} of {len(records):,} go on after the assistant's last message; that is left out.")
    if refused:
        reasons = Counter(r.reason for r in refused)
        says.append(f"Refused when scanning: {_listed(f'{n:,} {reason}' for reason, n in sorted(reasons.items()))}.")
    source_yaml: dict[str, Any] = {"kind": "chat", **({"id": "hash"} if repeated else {})}
    roots_of = [os.path.dirname(n) if root else "" for n, _ in groups]
    return Guess(
        "chat", data, {"sources": sources(groups, source_yaml, roots_of)}, {t: sorted(v) for t, v in sorted(tasks.items())},
        tuple(sorted({m for r in records for m in r.modalities()})), sizes, {"records": total}, says,
    )  # fmt: skip


def _answer(target: Target) -> str:
    return target.text or target.label or ", ".join(target.labels or ())


def _bytes_of(texts: list[str]) -> int:
    return sum(len(t.encode("utf-8", "replace")) for t in texts)


class _Table(Asked):
    """A table, and the `scan` section for it."""

    def guess(self, likely: str, said: list[str], spelling: dict[str, dict[str, str]]) -> Guess:
        """`likely`: the column that is probably the answer; `said`: what was said about the files; `spelling`: see
        `spelled_alike`."""
        roles = self.roles()
        ask, tasks, words = self.ask(roles, likely)
        label = ask.get("label")
        # a question and its answer, a sound and its words stand for themselves; what else a row has is about the row
        alone = ask.get("answer") and ("text" in ask or ask["task"] == "transcript")
        fields, given_away = ({}, []) if alone else self.fields(label)
        given_away += [name_of(c) for c in self.leaking]
        if given_away:
            words.append(f"Left out because they give `{label}` away: {_listed(given_away)}.")
        ignored = [c for c in self.free if c not in fields.values() and name_of(c) not in given_away] + self.odd
        answers = [c for c in ignored if c in self.other_answers()]
        ignored = [c for c in ignored if c not in answers]
        columns: dict[str, Any] = dict(roles)
        if fields:
            columns["fields"] = fields
        source: dict[str, Any] = {"kind": "table", "map": columns, "ask": [ask]}
        media = {k: self.items(roles.get(k), k) for k in ("image", "audio")}
        sizes, seen = measure(media["image"][0], media["audio"][0])
        seen = [*(refused_words(roles[k], *media[k]) for k in media if media[k][1]), *seen]
        sizes["text_bytes"] = text_sizes([self.written(row, ask) for row in self.rows])
        sizes["fields"] = len(fields)
        modalities = {k for k in ("image", "audio") if k in roles} | ({"fields"} if fields else set()) | {"text"}
        modalities |= {"context"} if "context" in ask else set()
        says = [f"{_listed(n for n, _ in self.groups)}: a table of {self.total:,} rows.", *said, *words]
        says += _role_words(roles)
        if fields:
            says.append(f"Taken as named values: {_listed(fields)}.")
        if answers:
            says.append(f"Other answers, not asked and never given to the model: {_listed(f'`{c}`' for c in answers)}.")
        if ignored:
            says.append(f"Not used: {_listed(f'`{c}`' for c in ignored)}.")
        says += [*seen, split_words(self.groups, roles.get("split"))]
        return Guess(
            "table", self.data, {"sources": sources(self.groups, source, self.roots, spelling)}, tasks,
            tuple(sorted(modalities)), sizes, {"records": self.total}, says,
        )  # fmt: skip

    def written(self, row: dict[str, Any], ask: dict[str, Any]) -> int:
        """UTF-8 bytes of all words of a row's record: text, context, question, answer."""
        if "each" in ask:
            row = {**row, "value": next((v for held in find(row, ask["each"])[:1] for v in held.values()), "")}
        places = [str(ask[k]).strip("{}") for k in ("text", "context", "answer", "label", "labels") if ask.get(k)]
        cells = [str(v) for place in places for v in find(row, place)[:1]]
        return _bytes_of([*cells, max((ask.get("question") or {"en": ""}).values(), key=lambda q: len(q.encode()))])


def _role_words(roles: dict[str, str]) -> list[str]:
    """What to say about the columns that are about the row itself."""
    says = [
        f"`{c}` holds {'pictures' if k == 'image' else 'sounds'}." for k, c in roles.items() if k in ("image", "audio")
    ]
    about = {k: c for k, c in roles.items() if k in ("id", "group", "lang", "license")}
    if plain := [f"`{c}`" for k, c in about.items() if c == k]:
        says.append(f"Taken for what {'its name says' if len(plain) == 1 else 'their names say'}: {', '.join(plain)}.")
    return [*says, *(f"`{c}` is the {k}." for k, c in about.items() if c != k)]
