"""Modules of mmlm as files beside each other, as transformers wants the code that comes with a model.

`mmlm.model.attention` becomes `mmlm_model_attention.py`; imports among them become relative, nothing else changes.
"""

from __future__ import annotations

import ast
from pathlib import Path

from mmlm.publish.bundle import modules

ENTRY = "mmlm.model.huggingface.modeling"
NAME = "modeling_mmlm"


def write(folder: Path) -> list[str]:
    """Write the entry as `modeling_mmlm.py`, and all that it needs. Returns the names of the files."""
    found = {name: path for name, path in modules(ENTRY)[0].items() if path.name != "__init__.py"}
    written = []
    for name, path in found.items():
        file = folder / f"{_flat(name)}.py"
        file.write_text(flattened(path.read_text(encoding="utf-8"), set(found)), encoding="utf-8")
        written.append(file.name)
    return sorted(written)


def flattened(source: str, known: set[str]) -> str:
    """`source` with the imports of the modules `known` made relative. An import of another module of ours, which what is
    exported never reaches, becomes an ImportError."""
    lines = source.splitlines(keepends=True)
    for node in sorted(ast.walk(ast.parse(source)), key=lambda n: -getattr(n, "lineno", 0)):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "mmlm":
            continue
        indent = " " * node.col_offset
        names = ", ".join(f"{a.name} as {a.asname}" if a.asname else a.name for a in node.names)
        new = f"{indent}from .{_flat(node.module or '')} import {names}\n"
        if node.module not in known:
            new = f"{indent}raise ImportError({f'{node.module} is not part of this model'!r})\n"
        lines[node.lineno - 1 : node.end_lineno] = [new]
    return "".join(lines)


def _flat(module: str) -> str:
    return NAME if module == ENTRY else module.replace(".", "_")
