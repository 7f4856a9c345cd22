"""The documents say what is so: tables of keys, links, command lines, YAML, and the same commands in both languages."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import yaml

from mmlm.cli import build_parser
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.curation.config import PiiKind
from mmlm.corpus.curation.curator import CURATED
from mmlm.corpus.records import REFUSED, SCHEMA
from mmlm.features.failures import REASONS
from mmlm.publish.serve import MAX_BODY
from mmlm.shards.commit import SHARDS
from mmlm.shards.config import ShardConfig
from mmlm.shards.write import INDEX, QUARANTINE
from mmlm.story import VERBS
from mmlm.train.config import TrainConfig

ROOT = Path(__file__).parents[1]
IGNORED = {".git", ".venv", "runs", "build", "dist", "corpora"}
PAGES = sorted(p for p in ROOT.rglob("*.md") if not IGNORED & set(p.relative_to(ROOT).parts))
WITH_COMMANDS = [ROOT / name for name in ("README.md", "README.zh.md", "docs/guide.md", "docs/reference.md")]
VALUES = {"STORY": "demo", "URI": "models:/x@champion", "DIR": "x", "PATH": "x", "N": "2"}
"""What stands for a value in a form such as `mmlm run STORY`."""


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def load_script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def blocks(text: str, *languages: str) -> list[str]:
    return [body for lang, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if lang in languages]


def shell_lines(page: Path) -> list[str]:
    """Command lines of a page's shell blocks; in a `console` block only those after `$`. Continued lines are joined."""
    text = page.read_text(encoding="utf-8")
    found = [line for body in blocks(text, "sh") for line in re.sub(r"\\\n\s*", "", body).splitlines()]
    found += [line[2:] for body in blocks(text, "console") for line in body.splitlines() if line.startswith("$ ")]
    return [line for line in found if line.strip() and not line.startswith("#")]


def inline_commands(page: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    spans = [span.strip() for span in re.findall(r"`([^`\n]+)`", prose)]
    # `mmlm run` in a sentence names the command, and only has to be one
    return [span + " --help" if span.count(" ") == 1 else span for span in spans if re.match(r"mmlm \S", span)]


def arguments_of(line: str) -> list[str] | None:
    """The arguments for `mmlm` in a command line, or None when it is another program's."""
    try:
        words = shlex.split(line.split(" | ")[0], comments=True)
    except ValueError:  # a quotation that goes on in the next line
        return None
    words = [word for word in words if word != "&"]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    job = next((i for i, word in enumerate(words) if re.fullmatch(r"jobs/\w+\.py", word)), None)
    if job is not None:
        assert (ROOT / words[job]).is_file(), f"{words[job]} is not there"
        return [Path(words[job]).stem, *words[job + 1 :]]
    return [VALUES.get(word, word) for word in words[1:]] if words[:1] == ["mmlm"] else None


def parses(arguments: list[str]) -> str:
    """ "" when the real parser takes the arguments, else what it says."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            build_parser().parse_args(arguments)
    except SystemExit as leaving:  # --help leaves with 0
        return said.getvalue() if leaving.code else ""
    return ""


def test_committed_tables_are_what_the_script_prints() -> None:
    script = load_script()
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    committed = page.partition(script.BEGIN)[2].partition(script.END)[0].strip()
    assert committed == script.tables(), "run: python docs/make_reference.py --write"


def test_every_config_field_is_in_the_tables() -> None:
    tables = load_script().tables()
    for stage, kind in VERBS.items():
        assert f"### {stage}.yaml" in tables
        if stage != "distill":
            missing = [f for f in kind.model_fields if f"| `{f}" not in tables]
            assert not missing, f"{stage}: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{page.name} links to {target}"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{page.name} links to {target}, and there is no such heading"


def anchors(page: Path) -> set[str]:
    """Anchors as GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_every_command_line_is_one(page: Path) -> None:
    lines = shell_lines(page) + inline_commands(page)
    commands = [(line, arguments) for line in lines if (arguments := arguments_of(line)) is not None]
    assert len(commands) >= 5
    wrong = [f"{line}: {said}" for line, arguments in commands if (said := parses(arguments))]
    assert not wrong, "\n".join(wrong)


def test_a_wrong_command_line_would_be_seen() -> None:
    assert "unrecognized" in parses(arguments_of("mmlm run demo --sett train.seed=1") or [])
    assert "invalid choice" in parses(arguments_of("FOO=1 mmlm rum demo") or [])
    assert arguments_of("torchrun -- jobs/train.py demo --ranks 2") == ["train", "demo", "--ranks", "2"]
    assert arguments_of("curl http://127.0.0.1") is None


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_every_make_target_is_there(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z]+)`", text))
    named |= {m[1] for line in shell_lines(page) if (m := re.search(r"\bmake ([a-z]+)$", line))}
    assert named <= targets


def test_yaml_in_the_guide_is_valid_config() -> None:
    found = blocks((ROOT / "docs" / "guide.md").read_text(encoding="utf-8"), "yaml")
    assert found
    for text in found:
        given = yaml.safe_load(text)
        kind = ScanConfig if "sources" in given else ShardConfig if "features" in given else TrainConfig
        parse(kind, given, "guide.md")


def test_both_readmes_show_the_same() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README.zh.md"
    assert shell_lines(english) == shell_lines(chinese)
    texts = [page.read_text(encoding="utf-8") for page in (english, chinese)]
    assert len({len(re.findall(r"^## ", text, re.M)) for text in texts}) == 1
    assert len({tuple(sorted(re.findall(r"`([\w/.-]+\.yaml)`", text))) for text in texts}) == 1


def test_numbers_of_the_server_are_those_of_the_code() -> None:
    assert f"larger than {MAX_BODY >> 20} MB" in (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    return page.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_every_flag_is_in_the_reference() -> None:
    told = section("Commands")
    found = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in found.choices.items():
        assert f"`mmlm {name}" in told
        flags = [o for a in command._actions if a.help != argparse.SUPPRESS for o in a.option_strings]
        missing = [flag for flag in flags if flag.startswith("--") and not re.search(rf"`[^`]*{flag}(?![\w-])", told)]
        assert not missing, (name, missing)


def test_every_variable_is_in_the_reference() -> None:
    ours = {"MMLM_PARENT", "MMLM_QUIET", "MMLM_PROGRESS_FD", "MMLM_RAY_SESSION", "MMLM_FAULTPOINT"}  # among processes
    ours |= {"MMLM_DEADLINE", "MMLM_HANG_SECONDS", "MMLM_LEDGER", "MMLM_RESUME", "MMLM_STOP_FILE"}  # what flags become
    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "mmlm").rglob("*.py"))
    assert set(re.findall(r"MMLM_[A-Z_]*[A-Z]", text)) - ours <= set(
        re.findall(r"MMLM_[A-Z_]*[A-Z]", section("Environment variables"))
    )


def test_every_column_of_the_tables_is_in_the_reference() -> None:
    told = section("Folders of the nouns")
    for table, schema in (
        ("manifest/records-*.parquet", SCHEMA), ("manifest/refused.parquet", REFUSED), ("shards/quarantine.parquet", QUARANTINE),
        ("manifest/curation.parquet", CURATED), ("shards/manifest.parquet", SHARDS), ("shards/*.index.parquet", INDEX),
    ):  # fmt: skip
        (line,) = [line for line in told.splitlines() if line.startswith("| `") and f"`{table}`" in line]
        assert not [name for name in schema.names if f"`{name}`" not in line], table


REASON_AT = {"RefuseError": 0, "Refused": 0, "refuse": 0, "Refusal": 2, "Member": 3, "Event": 2}
"""Calls that give a reason, and which argument it is."""


def words_of(node: ast.AST) -> set[str]:
    if isinstance(node, ast.IfExp):
        return words_of(node.body) | words_of(node.orelse)
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def reasons_in(path: Path) -> set[str]:
    """The reasons that a module of the scan writes out, as text, where it refuses."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=given):
                if len(given) > REASON_AT.get(name, len(given)):
                    found |= words_of(given[REASON_AT[name]])
            case ast.Dict(keys=[ast.Constant(value="reason"), *_], values=[value, *_]):
                found |= words_of(value)
            case ast.Assign(targets=[ast.Name(id="reason" | "found")], value=value):
                for each in value.elts[:1] if isinstance(value, ast.Tuple) else [value]:
                    found |= words_of(each)
            case ast.Tuple(elts=[*_, ast.Constant(value=str(word)), ast.Constant() | ast.JoinedStr()]):
                # (name, problem, detail) of a tar's member, (fault, detail) of a text
                if path.name in ("tar.py", "quality.py", "record_steps.py"):
                    found.add(word)
    return {word for word in found if re.fullmatch(r"[a-z]+(_[a-z]+)*", word)}


def test_every_reason_for_which_a_record_is_lost_is_in_the_reference() -> None:
    told = set(re.findall(r"`([a-z_]+)`", section("Refused and quarantined")))
    found = {path: reasons_in(path) for path in (ROOT / "mmlm" / "corpus").rglob("*.py")}
    every = set().union(*found.values()) - {"missing"}  # of a library, which ends the scan
    assert {"no_partner", "link_member", "truncated_tar", "too_slow", "missing_file", "bad_span", "bullets"} <= every
    assert not {named(path): sorted(lost) for path, words in found.items() if (lost := words & every - told)}
    every |= {"unreadable_image", "unreadable_audio", "unreadable_video", *REASONS}
    assert every <= told
    assert set(get_args(PiiKind)) <= told
    for word, ending in (("duplicate", "_of_val"), ("near_image", "_in_test"), ("over_cap", "")):
        assert word in told and (not ending or ending in told)
