"""What `mmlm scan --explain` found, in words for a terminal."""

from __future__ import annotations

import io
from typing import Any

from mmlm.corpus.explain import on_one_line

WIDTH = 100
"""Columns of a terminal that are used."""
_UNUSED = 12
"""Unused columns that get a row of their own."""


def words(found: dict[str, Any], story: str = "") -> str:
    """`explain`'s facts for a terminal, at most WIDTH columns wide. `story` is where scan.yaml lies, if anywhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=WIDTH, force_terminal=False, file=io.StringIO(), record=True, highlight=False)
    if "inferred" in found:
        console.print(Text(f"Without a story; `mmlm new DIR --data {found['data']}` would take it like this:"))
        for line in found["inferred"]["says"]:
            console.print(Text(f"- {''.join(c if c.isprintable() else '?' for c in line)}"))
    for source in found["sources"]:
        _print_source(console, source)
    if steps := found.get("curate"):
        console.print(Text(f"Not shown: what curation drops or changes afterwards ({', '.join(steps)})."))
    where = f"{story}/scan.yaml" if story else "the scan.yaml that `mmlm new` writes"
    console.print(
        Text(f"To change a role, set its key in {where}, such as map.image or ask[0].label; nothing was written.")
    )
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def _print_source(console: Any, source: dict[str, Any]) -> None:
    from rich.text import Text

    files = source["files"]
    console.print()
    console.rule(Text(f"{source['key']}: {source['kind']}"), characters="─", align="left")
    names = ", ".join(files["first"]) + (", …" if files["count"] > len(files["first"]) else "")
    plural = "" if files["count"] == 1 else "s"
    console.print(Text(f"{files['count']:,} file{plural}, {_bytes(files['bytes'])}: {names}"))
    if "note" in source:
        console.print(Text(source["note"]))
    _print_columns(console, source)
    for number, record in enumerate(source["records"], 1):
        _print_record(console, number, record)
    _print_refused(console, source)


def _print_columns(console: Any, source: dict[str, Any]) -> None:
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=f"columns, of {source['rows']:,} rows or files", title_justify="left")
    rows = []
    for column in source["columns"]:
        role = ", ".join(column["keys"]) + (f" ({column['how']})" if column["how"] != "scan.yaml" else "")
        rows.append((column["column"], role, column["example"], *_figures(column)))
    unused = sorted(source["unused"], key=lambda c: not c["filled"])
    shown = [c for c in unused if c["filled"]][:_UNUSED]
    rows += [(c["column"], "- not used", c["example"], *_figures(c)) for c in shown]
    names = ("column", "role (key in scan.yaml)", "example", "filled", "distinct")
    # wide enough for what is in them, up to a limit; the example takes what is left
    widths = [
        min(most, max(cell_len(r[at]) for r in [names, *rows])) for at, most in ((0, 28), (1, 28), (3, 8), (4, 9))
    ]
    widths.insert(2, WIDTH - sum(widths) - 16)
    for name, width in zip(names, widths, strict=True):
        figure = name in ("filled", "distinct")
        example = name == "example"
        table.add_column(
            name, width=width, justify="right" if figure else "left", no_wrap=example or figure,
            overflow="ellipsis" if example else "fold",
        )  # fmt: skip
    for cells in rows:
        table.add_row(*map(Text, cells))
    console.print(table)
    if more := unused[len(shown) :]:
        console.print(
            Text("Also not used: " + ", ".join(c["column"] + ("" if c["filled"] else " (empty)") for c in more))
        )


def _figures(column: dict[str, Any]) -> tuple[str, str]:
    if column["filled"] is None:
        return "", ""
    if not column["filled"]:
        return "never", "0"
    share = 100 * column["filled"]
    return f"{share:.0f} %" if share >= 99.95 or share < 99.5 else f"{share:.1f} %", f"{column['distinct']:,}"


def _print_record(console: Any, number: int, record: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=10)
    grid.add_column(overflow="fold", ratio=1)
    rows = [(f"record {number}", record["id"])]
    rows.append(("split", f"{record['split']}{', ' if record['split'] else ''}by: {record['split_by']}"))
    rows.append(("group", record["group"]))
    rows.append(("task", record["task"] + (f", lang {record['lang']}" if record["lang"] else "")))
    for part in record["parts"]:
        name = part["role"] if part["kind"] == "text" and part["role"] != "user" else part["kind"]
        rows.append((name, _part_words(part)))
    rows += [(f"→ {kind}", value) for kind, value in record["target"].items()]
    for name, value in rows:
        grid.add_row(Text(name), Text(on_one_line(value, 200)))
    console.print(grid)
    console.print()


def _part_words(part: dict[str, Any]) -> str:
    if part["kind"] == "text":
        return str(part["text"])
    if part["kind"] == "fields":
        return ", ".join(f"{k} {'missing' if v is None else v}" for k, v in part["fields"].items())
    facts = [str(part.get("format", ""))]
    if "size" in part:
        facts.append(f"{part['size'][0]} x {part['size'][1]}")
    if "seconds" in part:
        facts += [f"{part['seconds']:g} s", f"{part['rate']:,} Hz"]
    what = part.get("uri") or f"{part['bytes']:,} bytes inside"
    return f"{what} ({', '.join(f for f in facts if f)})" if any(facts) else str(what)


def _print_refused(console: Any, source: dict[str, Any]) -> None:
    from rich.text import Text

    refused, tried = source["refused"], source["tried"]
    if not refused["count"]:
        console.print(Text(f"Of the first {tried:,} records none would be refused."))
    else:
        reasons = ", ".join(f"{n} {reason}" for reason, n in refused["reasons"].items())
        console.print(Text(f"Of the first {tried:,} records {refused['count']:,} would be refused: {reasons}."))
        for one in refused["examples"]:
            console.print(
                Text(f"- {one['reason']}: {on_one_line(one['source'], 100)}: {on_one_line(one['detail'], 160)}")
            )
    if "dropped_parts" in source:
        dropped = ", ".join(f"{n} {reason}" for reason, n in source["dropped_parts"].items())
        console.print(Text(f"Parts that would be left out of records: {dropped}."))
    if "stops" in source:
        console.print(Text(f"The scan would stop: {source['stops']}"))
    console.print()


def _bytes(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
