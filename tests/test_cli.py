"""What people see when something is wrong: one line, exit code 2, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmlm import summary
from mmlm.cli import VERBS, build_parser, main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code, and everything that was said."""
    try:
        code = main(list(arguments))
    except SystemExit as leaving:  # argparse
        code = int(leaving.code or 0)
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "nosuchstory"], "nosuchstory"),
        (["run", "demmo"], "did you mean `demo`"),
        (["run", "demo", "--set", "train.sede=1"], "did you mean `seed`"),
        (["run", "demo", "--set", "trian.seed=1"], "did you mean `train`"),
        (["run", "demo", "--set", "train.seed=abc"], "train.yaml: `seed` = 'abc'"),
        (["run", "demo", "--set", "train.model.width=33"], "even multiple of heads"),
        (["run", "demo", "--set", "nonsense"], "wanted key=value"),
        (["run", "demo", "--set", "train=3"], "`train` is a stage, not a setting; wanted STAGE.key=value"),
        (["run", "demo", "--hang", "-3"], "--hang '-3'; wanted a duration"),
        (["run", "demo", "--on", "slurm", "--cluster", "nodes"], "--cluster 'nodes'; wanted KEY=VALUE, or a YAML file"),
        (["run", "demo", "--on", "slurm", "--cluster", "a b=1"], "--cluster 'a b=1'; wanted key=value"),
        (["run", "demo", "--on", "slurm", "--cluster", "nods=2"], "SlurmConfig in mmlm/launch/slurm.py"),
        (["run", "demo", "--on", "kuberay", "--cluster", "gpus=x"], "KubeRayConfig in mmlm/launch/kuberay.py"),
        (["verify", "."], "artifact.json"),
        (["inspect", "gone"], "is not there"),
        (["predict", "--model", "gone"], "nothing to answer"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_wrong_input_is_named_in_one_line(
    arguments: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    code, said = run(capsys, *arguments)
    assert code == 2
    assert named in said
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("out", ["taken", "taken/below"])
def test_an_out_that_is_a_file_is_named(out: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "taken").write_text("a file")
    code, said = run(capsys, "run", "demo", "--out", str(tmp_path / out))
    assert code == 2 and f"{tmp_path / out} is a file, or lies below one; wanted a folder" in said


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        *((f"{verb} demo --out s3://key:secret@bucket/run", "--mirror") for verb in ("run", *VERBS, "tune")),
        ("scan demo --out file:///tmp/run", "--mirror"),
        ("plan demo --out gs://bucket/run", ""),
        ("advise demo --out gs://bucket/run", ""),
        ("explain --model m --text x --out s3://bucket/page", ""),
        ("export m --to s3://bucket/model", ""),
        ("new s3://bucket/story --data .", ""),
    ],
)
def test_no_folder_is_made_of_an_address(
    arguments: str, cure: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    code, said = run(capsys, *arguments.split())
    assert code == 2 and "is an address" in said and cure in said and "secret" not in said
    assert said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_all_problems_of_a_config_are_listed_at_once(capsys: pytest.CaptureFixture[str]):
    code, said = run(
        capsys, "run", "demo", "--set", "train.sede=1", "--set", "train.steps=0", "--set", "shard.ray_form=1"
    )
    assert code == 2
    assert all(key in said for key in ("sede", "steps", "ray_form"))


@pytest.mark.parametrize(("verb", "takes"), [("train", True), ("distill", True), ("run", False), ("tune", False)])
def test_only_a_single_training_can_be_told_to_resume(verb: str, takes: bool, capsys: pytest.CaptureFixture[str]):
    """A story has several trainings, a search many: those that have not begun hold no checkpoint."""
    if takes:
        assert build_parser().parse_args([verb, "demo", "--resume"]).resume
    else:
        code, said = run(capsys, verb, "demo", "--resume")
        assert code == 2 and "--resume" in said


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    code, said = run(capsys, "--help")
    assert code == 0
    for verb in (
        "scan",
        "shard",
        "train",
        "distill",
        "evaluate",
        "register",
        "serve",
        "predict",
        "run",
        "new",
        "doctor",
    ):
        assert verb in said


@pytest.mark.parametrize(
    ("uri", "page", "flag"),
    [
        ("http://mlflow:5000", "http://mlflow:5000", " --tracking-uri http://mlflow:5000"),
        ("sqlite:////our x.db", "mlflow ui --backend-store-uri 'sqlite:////our x.db'   (or", " --tracking-uri 'sqlite"),
        ("sqlite:///runs/mlflow.db", "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db   (or", ""),
    ],
)  # fmt: skip
def test_a_run_says_where_its_page_is_and_what_finds_its_model(
    uri: str, page: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert summary.page(uri).startswith(page) and ("mlflow ui" in summary.page(uri)) == uri.startswith("sqlite")
    assert summary.elsewhere(uri).startswith(flag) and bool(summary.elsewhere(uri)) == bool(flag)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert summary.elsewhere(uri) == ""
