"""The bundle where `mmlm` is not installed, against the checkpoint it was made of."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest

from mmlm.publish import bundle
from mmlm.publish.answering import Responder
from mmlm.publish.locate import fluent

if TYPE_CHECKING:
    from tests.publish.conftest import World

ALONE = """
import sys

class Blocker:
    '''The editable install is away: only what the bundle carries may be imported as mmlm.'''
    def find_spec(self, name, path=None, target=None):
        return None

sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]
sys.path = [p for p in sys.path if p not in ('', sys.argv[3])]
try:
    import mmlm
    sys.exit('mmlm is installed all the same')
except ImportError:
    pass
import json
import mlflow
import pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
rows = json.load(open(sys.argv[2]))
out = model.predict(pd.DataFrame(rows))
import mmlm
assert mmlm.__path__[0].startswith(sys.argv[1]), mmlm.__path__
assert not {'ray', 'deepspeed', 'sklearn', 'webdataset', 'matplotlib'} & set(sys.modules)
print('ANSWERS' + json.dumps(out.to_dict('records')))
"""


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, logged bundle)."""
    root = tmp_path_factory.mktemp("bundle")
    checkpoint = world.checkpoint(0).path
    (root / "code").mkdir()
    with fluent(f"sqlite:///{root}/mlflow.db") as mlflow:
        experiment = mlflow.create_experiment("b", artifact_location=(root / "artifacts").as_uri())
        with mlflow.start_run(experiment_id=experiment):
            example = pd.DataFrame([{"text": "Which number is it?"}])
            info = bundle.log(mlflow, checkpoint, root / "code", example=example, metadata={"story": "demo"})
        where = Path(mlflow.artifacts.download_artifacts(artifact_uri=info.model_uri))
    assert info.signature is not None
    return checkpoint, where


def questions(world: World) -> list[dict[str, Any]]:
    return [
        {"text": "Which number is it?", "image": str(world.data / f"{i}.png"), "audio": str(world.data / f"{i}.wav")}
        for i in range(6)
    ] + [{"text": "这是哪个数字？", "image": str(world.data / "7.png"), "audio": None}]


def test_it_answers_like_the_checkpoint_where_mmlm_is_not_installed(
    saved: tuple[Path, Path], world: World, tmp_path: Path
) -> None:
    checkpoint, where = saved
    (tmp_path / "rows.json").write_text(json.dumps(questions(world)))
    command = [sys.executable, "-c", ALONE, str(where), str(tmp_path / "rows.json"), str(bundle.PACKAGE.parent)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean())
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.split("ANSWERS", 1)[1])
    assert answers == Responder.load(str(checkpoint)).answer(questions(world))


def clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}


def test_tables_of_every_kind(saved: tuple[Path, Path], world: World) -> None:
    checkpoint, where = saved
    with fluent("sqlite:///:memory:") as mlflow:
        model = mlflow.pyfunc.load_model(str(where))
    expected = Responder.load(str(where)).answer(questions(world))
    assert expected == Responder.load(str(checkpoint)).answer(questions(world))

    def answers(table: Any) -> list[Any]:
        return model.predict(table)[["answer", "score", "label_scores"]].to_dict("records")  # type: ignore[no-any-return]

    rows = questions(world)
    assert answers(pd.DataFrame(rows)) == expected
    assert answers(pd.DataFrame(rows).astype(object)) == expected
    as_bytes = [{k: Path(v).read_bytes() if k != "text" and v else v for k, v in row.items()} for row in rows]
    assert answers(pd.DataFrame(as_bytes)) == expected
    table = pd.DataFrame(as_bytes, index=range(10, 17))
    table.loc[16, "audio"] = float("nan")
    assert answers(table) == expected
    only_text = pd.DataFrame({"text": ["Which number is it?"]})
    assert answers(only_text) == answers(only_text.assign(image=float("nan"), audio=None))
    bad = model.predict(pd.DataFrame({"text": ["?", "?"], "image": [None, "/gone.png"]}))
    assert "gone.png" in bad["error"][1]
    assert bad["answer"][1] is None
    assert isinstance(bad["answer"][0], str)


def test_what_it_carries(saved: tuple[Path, Path]) -> None:
    _, where = saved
    carried = {str(p.relative_to(where / "code")) for p in (where / "code").rglob("*.py")}
    assert {"mmlm/publish/answering.py", "mmlm/model/transformer.py", "mmlm/features/encode.py"} <= carried
    assert not any(p.startswith(("mmlm/launch", "mmlm/cli", "mmlm/tracking")) for p in carried), carried
    names = (
        "__init__",
        "codec",
        "encoder_checkpoint",
        "encoder_files",
        "encoder_inputs",
        "encoders",
        "timm_checkpoint",
    )
    encoding = {f"mmlm/shards/{name}.py" for name in names}
    assert {p for p in carried if p.startswith("mmlm/shards")} <= encoding, (
        "of the shards only what runs their encoders"
    )
    needed = (where / "requirements.txt").read_text().split()
    assert any(r.startswith("torch==") and "+" not in r for r in needed)
    assert not any(
        r.startswith(("ray", "deepspeed", "scikit", "webdataset", "dagster", "peft", "transformers")) for r in needed
    ), needed
    assert {"model.safetensors", "config.json", "feature_spec.json", "tokenizer.json"} == {
        p.name for p in (where / "artifacts" / "checkpoint").iterdir()
    }
    assert not list(where.rglob("*.pkl")), "a bundle is never pickled"


def test_the_scoring_server_takes_base64_and_never_opens_a_path(
    saved: tuple[Path, Path], world: World, tmp_path: Path
) -> None:
    _, where = saved
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        str(where),
        "-p",
        str(port),
        "--env-manager",
        "local",
    ]
    environment = {**clean(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not _reachable(f"http://127.0.0.1:{port}/ping"):
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.3)
        path = str(world.data / "3.png")
        coded = base64.b64encode(Path(path).read_bytes()).decode()
        rows = [{"text": "Which number is it?", "image": v} for v in (coded, None, path)]
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps({"dataframe_records": rows}).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as reply:
            answers = json.loads(reply.read())["predictions"]
    finally:
        os.killpg(server.pid, 15)
        server.wait(20)
    expected = Responder.load(str(where)).answer([{**rows[0], "image": path}, rows[1]])
    assert [a["answer"] for a in answers[:2]] == [a["answer"] for a in expected]
    assert answers[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-4)
    assert answers[2]["answer"] is None
    assert "base64" in answers[2]["error"]


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def test_loading_it_leaves_the_import_path_to_the_whole_package(saved: tuple[Path, Path]) -> None:
    import mlflow.pyfunc

    mlflow.pyfunc.load_model(str(saved[1]))
    packages = [Path(entry) / "mmlm" for entry in sys.path if (Path(entry) / "mmlm").is_dir()]
    assert all((package / "cli.py").exists() for package in packages)
