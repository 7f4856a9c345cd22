"""Pieces of HTML for a report that is one file: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --paper: #ffffff; --card: #f5f7fa;
  --good: #00704f; --bad: #b23c00; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #a2adbb; --line: #3a4350; --paper: #14181e;
  --card: #1d232b; --good: #4cc79d; --bad: #ff9a66; --mark: #6cb9ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 1100px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC",
  sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--line); } h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p { max-width: 75ch; } .soft { color: var(--soft); } code { font-size: .88em; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem;
  min-width: 11rem; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.25; }
.tile span { color: var(--soft); font-size: .85rem; display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .28rem 1.1rem .28rem 0; vertical-align: top; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } td.number, th.number { text-align: right; }
td small { color: var(--soft); display: block; line-height: 1.2; } tr.first td { border-top: 2px solid var(--line); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 1.2rem 1rem;
  margin: 1.2rem 0; align-items: start; }
figure { margin: 0; max-width: 100%; } figure img { max-width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: 8px; padding: 6px; }
figcaption { color: var(--soft); font-size: .85rem; max-width: 60ch; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(245px, 1fr)); gap: .8rem; }
.example { border: 1px solid var(--line); border-left: 4px solid var(--good); border-radius: 8px; padding: .6rem .8rem;
  background: var(--card); font-size: .88rem; overflow-wrap: anywhere; }
.example.wrong { border-left-color: var(--bad); }
.media { display: flex; gap: .5rem; align-items: flex-end; min-height: 0; margin-bottom: .4rem; }
.media img.picture { height: 84px; max-width: 48%; object-fit: contain; image-rendering: pixelated;
  border-radius: 4px; background: #fff; }
.media img.sound { height: 84px; flex: 1; min-width: 0; object-fit: fill; border-radius: 4px; }
.example .verdict { font-weight: 600; color: var(--good); } .example.wrong .verdict { color: var(--bad); }
.example dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .6rem; margin: 0; }
.example dt { color: var(--soft); }
.example dd { margin: 0; } details { margin: 1rem 0; } summary { cursor: pointer; color: var(--mark); }
"""


def page(title: str, body: Iterable[str]) -> str:
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
    )
    return head + "\n".join(body) + "\n</body></html>\n"


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def figure(png: bytes, alt: str, caption: str = "") -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{data_uri(png)}" alt="{escape(alt)}">{below}</figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int, group_by: int | None = None) -> str:
    """Cells are HTML. Columns from `numbers_from` on stand to the right; a line parts rows where `group_by` changes."""
    side = [' class="number"' if i >= numbers_from else "" for i in range(len(head))]
    lines = ["<tr>" + "".join(f"<th{s}>{escape(h)}</th>" for s, h in zip(side, head, strict=True)) + "</tr>"]
    before: str | None = None
    for row in rows:
        mark = ""
        if group_by is not None:
            mark = ' class="first"' if before not in (None, row[group_by]) else ""
            before = row[group_by]
        lines.append(f"<tr{mark}>" + "".join(f"<td{s}>{c}</td>" for s, c in zip(side, row, strict=True)) + "</tr>")
    return '<div class="wide"><table>' + "".join(lines) + "</table></div>"


def tile(big: str, small: Sequence[str]) -> str:
    return f'<div class="tile"><b>{escape(big)}</b>' + "".join(f"<span>{escape(s)}</span>" for s in small) + "</div>"


def thumbnail(kind: str, png: bytes) -> str:
    """`kind` is `picture` or `sound` (its spectrogram)."""
    return f'<img class="{kind}" alt="{kind}" src="{data_uri(png)}">'
