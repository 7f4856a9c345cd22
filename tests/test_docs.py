"""The documents say what is so: tables of keys, links, command lines, YAML, and the same commands in both languages."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from mmlm.cli import build_parser
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.publish.serve import MAX_BODY
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
        parse(ScanConfig if "sources" in given else TrainConfig, given, "guide.md")


def test_both_readmes_show_the_same() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README.zh.md"
    assert shell_lines(english) == shell_lines(chinese)
    texts = [page.read_text(encoding="utf-8") for page in (english, chinese)]
    assert len({len(re.findall(r"^## ", text, re.M)) for text in texts}) == 1
    assert len({tuple(sorted(re.findall(r"`([\w/.-]+\.yaml)`", text))) for text in texts}) == 1


def test_numbers_of_the_server_are_those_of_the_code() -> None:
    assert f"larger than {MAX_BODY >> 20} MB" in (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
