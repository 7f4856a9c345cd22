"""Hugging Face data sets on disk → drafts, with pyarrow alone: folders of `save_to_disk`, repositories of Parquet files.

Arrow files are memory-mapped and read batch by batch; every batch is validated before its values are touched, since
offsets that lie would read beyond the file. What a column is stands in the features, which both forms carry.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mmlm.corpus.config import HfSource
from mmlm.corpus.drafts import SPLIT_NAMES, Outcomes, Refusal, storable
from mmlm.corpus.readers.folders import list_files
from mmlm.corpus.readers.hf_columns import KINDS, Features, inferred
from mmlm.corpus.readers.rows import BROKEN_TABLE, Row, parquet_rows, parse_json, rows_at_a_time, rows_of_batch
from mmlm.corpus.readers.table import read_asked
from mmlm.corpus.readers.webdataset import split_in_name
from mmlm.errors import DataError

Need = Callable[[Path], Path]
MAX_INFO = 64 << 20
"""Bytes of the largest JSON or YAML that describes a data set."""


def hf_files(source: HfSource, folder: Path) -> list[tuple[str, str]]:
    """(split or "", path relative to `folder`) of the Arrow or Parquet files, sorted.

    Raises DataError when `folder` is no such data set.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _json(folder / "dataset_dict.json").get("splits")
        splits = [n for n in names if isinstance(n, str) and _is_name(n)] if isinstance(names, list) else []
        found = [
            (SPLIT_NAMES.get(name.lower(), ""), f"{name}/{file}")
            for name in splits
            for file in _arrow_files(folder / name)
        ]
    elif (folder / "state.json").is_file() or (folder / "dataset_info.json").is_file():
        split = _json(folder / "state.json").get("_split") if (folder / "state.json").is_file() else ""
        found = [(SPLIT_NAMES.get(str(split).lower(), ""), file) for file in _arrow_files(folder)]
    else:
        found = _parquet_files(source, folder)
    if not found:
        raise DataError(
            f"no Arrow or Parquet files of a data set in {folder}",
            wanted="a folder made by save_to_disk, or a repository of Parquet files",
            cure="check `path`",
        )
    return sorted(found, key=lambda pair: pair[1])


def read_hf(
    source: HfSource, folder: Path, data: str, need: Need = lambda path: path, repeats: dict[int, int] | None = None
) -> Outcomes:
    """Drafts of every row of the data set in `folder`; `need` gives a file with its content. `repeats`: see `read_asked`.

    Raises DataError when nothing says what is to be answered.
    """
    files = hf_files(source, folder)
    features = features_of(folder, files, need)
    hidden: set[str] = set()
    prefix = "" if source.path in ("", ".") else os.path.normpath(source.path) + "/"
    rows: Iterator[tuple[str, Row | Refusal, str]] = (
        (prefix + name, converted(row, features, hidden), split)
        for split, name in files
        for row in rows_of(need(folder / name), prefix + name)
    )
    if not source.ask and not features:
        refused: list[Refusal] = []
        for one in rows:  # a broken file is told before what is missing
            if not isinstance(one[1], Refusal):
                raise DataError(
                    f"{folder} does not say what its columns are",
                    wanted="features in dataset_info.json, README.md or the files",
                    cure="say in `map` and `ask` which columns hold what",
                )
            refused.append(one[1])
        yield from refused  # nothing else is there, and no question to be made up
        return
    for outcome in read_asked(inferred(source, features), rows, data, True, repeats):
        # a row is not taken before all is yielded of the one before it, so `hidden` is about this one
        yield _unlabelled(outcome, hidden) if isinstance(outcome, Refusal) else outcome


def _unlabelled(refusal: Refusal, hidden: set[str]) -> Refusal:
    """The refusal, said more exactly where it is for the lack of a class that is one of `hidden`."""
    for column in hidden:
        if (refusal.reason, refusal.detail) == ("no_target", f"no label at `{column}`"):
            detail = f"`{column}` is -1, by which Hugging Face data sets say that there is no label"
            return Refusal(refusal.source, refusal.id, "no_label", detail)
    return refusal


def _arrow_files(folder: Path) -> list[str]:
    """Names of the Arrow files of one split: as state.json lists them, else all there are."""
    state = _json(folder / "state.json") if (folder / "state.json").is_file() else {}
    listed = state.get("_data_files")
    if isinstance(listed, list):
        names = [f.get("filename") for f in listed if isinstance(f, dict)]
        if not all(isinstance(n, str) and _is_name(n) for n in names) or len(names) != len(listed):
            raise DataError(
                f"{folder / 'state.json'} names files outside its folder", cure="do not trust this data set"
            )
        return [str(n) for n in names]
    return sorted(p.name for p in folder.glob("*.arrow") if p.is_file())


def _is_name(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0")


def _parquet_files(source: HfSource, folder: Path) -> list[tuple[str, str]]:
    """Parquet files with the splits that README.md gives them, else with those that their names tell."""
    found: dict[str, str] = {}
    configs = [c for c in _readme(folder).get("configs") or [] if isinstance(c, dict) and c.get("data_files")]
    if source.config or configs:
        names = [str(c.get("config_name", "default")) for c in configs]
        wanted = source.config or next((str(c["config_name"]) for c in configs if c.get("default")), "")
        wanted = wanted or ("default" if "default" in names else names[0] if len(names) == 1 else "")
        if wanted not in names:
            raise DataError(
                f"{folder / 'README.md'} has the configurations {', '.join(names) or 'none'}",
                cure=f"choose one with `config: {names[0]}`" if names else "leave `config` out",
            )
        given = configs[names.index(wanted)]["data_files"]
        for entry in given if isinstance(given, list) else [given]:
            name, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
            for pattern in paths if isinstance(paths, list) else [paths]:
                if not isinstance(pattern, str) or os.path.isabs(pattern) or ".." in Path(pattern).parts:
                    raise DataError(f"{folder / 'README.md'} names files outside its folder", cure="do not trust it")
                for path in glob.glob(pattern, root_dir=folder, recursive=True):
                    if path.endswith(".parquet"):
                        found[path] = SPLIT_NAMES.get(str(name).lower(), "")
    else:
        found = {f: split_in_name(f) for f in list_files(folder) if f.endswith(".parquet") and storable(f)}
    return [(split, path) for path, split in found.items()]


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_INFO:
            raise ValueError(f"larger than {MAX_INFO:,} bytes")
        found = parse_json(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"holds a {type(found).__name__}")
        return found
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}", wanted="what save_to_disk writes", cure="check the file") from None


def _readme(folder: Path) -> dict[str, Any]:
    """The YAML between the dashes at the top of README.md; {} when there is none."""
    path = folder / "README.md"
    if not path.is_file() or path.stat().st_size > MAX_INFO:
        return {}
    head = path.read_bytes().decode("utf-8", "replace").split("---", 2)
    if len(head) < 3 or head[0].strip() or "&" in head[1]:  # aliases could swell without end
        return {}
    try:
        found = yaml.safe_load(head[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def features_of(folder: Path, files: list[tuple[str, str]], need: Need = lambda path: path) -> Features:
    """Of dataset_info.json, else of what a file says of itself, else of README.md, else by the types of the columns."""
    first = folder / files[0][1]
    for info in (first.parent / "dataset_info.json", folder / "dataset_info.json"):
        if info.is_file() and (told := _json(info).get("features")):
            return read_features(told)
    schemas = []
    for _, name in files[:20]:
        if (schema := _schema(need(folder / name))) is None:
            continue
        schemas.append(schema)
        try:
            return read_features(json.loads(schema.metadata[b"huggingface"])["info"]["features"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    if told := _readme_features(folder):
        return read_features(told)
    try:
        return _features_of_schema(schemas[0]) if schemas else Features()
    except UnicodeDecodeError:  # a column's name; its rows are refused
        return Features()


def read_features(told: Any) -> Features:
    """Features as dataset_info.json has them: `{column: {"_type": "Image" | "Audio" | "ClassLabel" | "Value", ...}}`."""
    features = Features()
    for name, what in told.items() if isinstance(told, dict) else ():
        inner, listed = what, False
        while isinstance(inner, list) or (
            isinstance(inner, dict) and inner.get("_type") in ("Sequence", "List", "LargeList")
        ):
            inner, listed = (inner[0] if inner else None) if isinstance(inner, list) else inner.get("feature"), True
        if not isinstance(inner, dict):
            features.others.append(name)
        elif (kind := inner.get("_type")) in KINDS:
            features.media[name] = KINDS[kind]
        elif kind == "ClassLabel" and isinstance(inner.get("names"), list):
            features.classes[name] = [str(n) for n in inner["names"]]
            features.many |= {name} if listed else set()
        elif kind == "Value" and inner.get("dtype") in ("string", "large_string") and not listed:
            features.strings.append(name)
        else:
            features.others.append(name)
    return features


def _readme_features(folder: Path) -> dict[str, Any] | None:
    """`dataset_info.features` of README.md in the form of dataset_info.json."""
    info = _readme(folder).get("dataset_info")
    info = info[0] if isinstance(info, list) and info else info
    listed = info.get("features") if isinstance(info, dict) else None
    found: dict[str, Any] = {}
    for one in listed if isinstance(listed, list) else []:
        kind = one.get("dtype") if isinstance(one, dict) else None
        if isinstance(kind, dict) and isinstance(kind.get("class_label"), dict):
            names = kind["class_label"].get("names")
            values = list(names.values()) if isinstance(names, dict) else names
            found[str(one.get("name"))] = {"_type": "ClassLabel", "names": values}
        elif isinstance(kind, str):
            named = {"_type": kind.capitalize()} if kind.capitalize() in KINDS else {"_type": "Value", "dtype": kind}
            found[str(one.get("name"))] = named
    return found or None


def _features_of_schema(schema: pa.Schema) -> Features:
    """What can be told without any features: columns of text, and structs of `bytes` and `path`, by their names."""
    features = Features()
    for column in schema:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            features.strings.append(column.name)
        elif pa.types.is_struct(column.type) and {f.name for f in column.type} == {"bytes", "path"}:
            features.media[column.name] = "audio" if "audio" in column.name.lower() else "image"
        else:
            features.others.append(column.name)
    return features


def _schema(path: Path) -> pa.Schema | None:
    try:
        if path.suffix == ".parquet":
            return pq.read_schema(path)
        with pa.memory_map(str(path)) as held:
            return _open(held).schema
    except BROKEN_TABLE:
        return None


def _open(held: Any) -> Any:
    """The batches of an Arrow stream; of an Arrow file where it is one."""
    if held.read(6) == b"ARROW1":
        file = pa.ipc.open_file(held)
        return pa.RecordBatchReader.from_batches(file.schema, map(file.get_batch, range(file.num_record_batches)))
    held.seek(0)
    return pa.ipc.open_stream(held)


def rows_of(path: Path, shown: str) -> Iterator[Row | Refusal]:
    if path.suffix == ".parquet":
        yield from parquet_rows(path, shown)
        return
    number = 0
    try:
        for batch in _batches(path):
            # `nbytes` would follow offsets that nobody has looked at yet
            at_a_time = rows_at_a_time(batch.get_total_buffer_size(), batch.num_rows)
            for at in range(0, batch.num_rows, at_a_time):
                yield from rows_of_batch(batch.slice(at, at_a_time), shown, number + at)
            number += batch.num_rows
    except BROKEN_TABLE as error:
        where = f"{shown}:{number + 1}" if number else shown
        yield Refusal(where, "", "bad_table", f"{str(error)[:120]}; the rest of the file is not read")


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as held:
        yield from _open(held)


def converted(row: Row | Refusal, features: Features, hidden: set[str] | None = None) -> Row | Refusal:
    """The row with names for numbers of classes; -1 means that the class is not told.

    `hidden` is made the set of columns of which that is so.
    """
    hidden = set() if hidden is None else hidden
    hidden.clear()
    if isinstance(row, Refusal):
        return row
    where, values = row
    for name, names in features.classes.items():
        value = values.get(name)
        told = value if isinstance(value, list) else [value]
        numbers = [v for v in told if isinstance(v, int) and v != -1]
        if any(not 0 <= v < len(names) for v in numbers):
            return Refusal(where, "", "bad_value", f"class {value} of `{name}`, which has {len(names)} classes")
        if isinstance(value, list):
            values[name] = [names[v] for v in numbers]
        elif isinstance(value, int):
            values[name] = names[value] if numbers else None
            hidden.update(() if numbers else [name])
    for kind in set(features.media.values()):
        columns = [c for c, k in features.media.items() if k == kind]
        if len(columns) > 1:
            held = [values.get(c) for c in columns]
            values[f"_{kind}s"] = [
                v for one in held if one is not None for v in (one if isinstance(one, list) else [one])
            ]
    return where, values
