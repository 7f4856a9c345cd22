"""The house rules: who imports whom, what imports what it must not, and that every YAML here means something."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from mmlm import story as stories

ROOT = Path(__file__).parents[1]
IGNORED = {".git", ".venv", "runs", "build", "dist", "corpora"}
SOURCES = [p for top in ("mmlm", "jobs", "pipelines", "benchmarks", "tests") for p in (ROOT / top).rglob("*.py")]


def yaml_files() -> list[Path]:
    found = [p for suffix in ("*.yaml", "*.yml") for p in ROOT.rglob(suffix)]
    return sorted(p for p in found if not IGNORED & set(p.relative_to(ROOT).parts))


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_imports_keep_their_contracts() -> None:
    done = run(str(Path(sys.executable).parent / "lint-imports"), "--no-cache")
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("path", yaml_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_yaml_is_yaml(path: Path) -> None:
    documents = [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if d is not None]
    assert documents or path.parent.parent.name == "configs"


@pytest.mark.parametrize("name", stories.built_in())
def test_every_story_parses_into_its_configs(name: str) -> None:
    story = stories.load(name)
    assert story.name == name
    strangers = {p.stem for p in story.folder.glob("*.yaml")} - {"story", *stories.VERBS}
    assert not strangers, f"files that no stage reads: {strangers}"


@pytest.mark.parametrize("name", stories.built_in())
def test_every_story_file_is_headed_with_its_cost(name: str) -> None:
    for path in stories.find(name).glob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# "), f"{path} does not open with a comment"


def test_there_is_no_utils() -> None:
    assert not [p for p in SOURCES if re.search(r"utils?$", p.stem) or "utils" in p.parts]


def test_packages_hold_only_a_docstring() -> None:
    for path in (ROOT / "mmlm").rglob("__init__.py"):
        if path.parent.name != "mmlm":
            assert not re.search(r"^(import|from|def|class) ", path.read_text(encoding="utf-8"), re.M), path


def test_every_module_says_what_it_is() -> None:
    ours = [p for p in SOURCES if "tests" not in p.parts and p.read_text(encoding="utf-8").strip()]
    silent = [p for p in ours if not _opens_with_docstring(p)]
    assert not silent


def _opens_with_docstring(path: Path) -> bool:
    return path.read_text(encoding="utf-8").lstrip().startswith(('"""', 'r"""', "#!"))


def test_configs_and_the_command_load_without_the_heavy_ones() -> None:
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in (ROOT / "mmlm").rglob("*.py")
        if p.name == "config.py"
    ]
    heavy = ("torch", "ray", "mlflow", "deepspeed", "pyarrow", "pandas", "sklearn", "dagster")
    imports = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)"
    parser = "import sys, mmlm.cli\nmmlm.cli.build_parser()"
    for code, unwanted in ((imports, heavy), (parser, (*heavy, "pydantic", "numpy"))):
        done = run(sys.executable, "-c", f"{code}\nprint([h for h in {unwanted!r} if h in sys.modules])")
        assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_help_is_there_at_once() -> None:
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        done = run(sys.executable, "-m", "mmlm.cli", "--help")
        seconds.append(time.monotonic() - start)
        assert done.returncode == 0
        assert "run" in done.stdout
    assert min(seconds) < (5.0 if os.environ.get("CI") else 1.0)  # 0.15 s on an idle machine


@pytest.mark.parametrize("name", ["scan", "shard", "train", "distill", "evaluate", "register", "serve"])
def test_every_verb_has_a_job_that_runs_by_hand(name: str) -> None:
    done = run(sys.executable, f"jobs/{name}.py", "--help", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert f"mmlm {name}" in done.stdout


def test_shell_scripts_are_shell() -> None:
    scripts = [ROOT / ".ci" / "run", *(ROOT / "infra").rglob("*.sbatch"), *(ROOT / "infra").rglob("*.sh")]
    for path in scripts:
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0, path


def test_constraints_pin_what_the_project_asks_for() -> None:
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[<>=!~ ;]", text)[0].lower() for text in asked}
    assert names - pins - {project["name"]} == set()


def test_the_licence_is_apache() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


def test_texts_are_read_and_written_in_utf_8() -> None:
    """Whatever the locale is: configs and figures hold Chinese, and a cluster's nodes need not speak as the submitter does."""
    calls = [
        (path, node)
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] in ("mmlm", "jobs", "pipelines")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in ("read_text", "write_text")
    ]
    silent = [f"{path}:{node.lineno}" for path, node in calls if "encoding" not in {k.arg for k in node.keywords}]
    assert calls and not silent
