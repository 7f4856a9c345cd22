"""KubeRay: the YAML is a pure function of its settings and holds only fields of the typed model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from mmlm.cli import main
from mmlm.errors import LaunchError
from mmlm.launch import kuberay, kubernetes
from mmlm.launch.kuberay import KubeRayConfig, Title
from mmlm.launch.ray_train import STOP_WAIT
from mmlm.world import quiet_environment

INFRA = Path(__file__).parents[2] / "infra"
FULL = KubeRayConfig(
    gpus=2, workers=2, workers_max=6, namespace="ml", service_account="trainer", image="mmlm:cuda",
    environment={"NCCL_DEBUG": "WARN"}, secrets={"TOKEN": "mlflow/token"},
)  # fmt: skip


TITLE = Title("mmlm-run-demo-0a1b2c", {kuberay.OUT: "runs-demo"})
GIVEN = ["--on", "kuberay", "--tracking-uri", "http://mlflow:5000"]


def documents(config: KubeRayConfig) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(kuberay.render(config, ["mmlm", "run", "a b"], TITLE, {"X": "1"})))


@pytest.mark.parametrize("config", [KubeRayConfig(), FULL])
def test_what_is_rendered_is_what_the_model_reads(config: KubeRayConfig) -> None:
    claim, job = documents(config)
    assert kubernetes.RayJob.model_validate(job).plain() == job
    assert kubernetes.Claim.model_validate(claim).plain() == claim
    assert kuberay.render(config, ["x"], TITLE) == kuberay.render(config, ["x"], TITLE)


def test_settings_arrive() -> None:
    job = documents(FULL)[1]
    cluster = job["spec"]["rayClusterSpec"]
    assert job["metadata"] == {"name": TITLE.name, "namespace": "ml", "labels": TITLE.labels}
    workers = cluster["workerGroupSpecs"][0]
    assert (workers["replicas"], workers["maxReplicas"], cluster["enableInTreeAutoscaling"]) == (2, 6, True)
    container = workers["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert "nvidia.com/gpu" not in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    variables = {v["name"]: v for v in container["env"]}
    assert variables["X"]["value"] == "1" and variables["NCCL_DEBUG"]["value"] == "WARN"
    assert variables["TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "mlflow", "key": "token"}
    assert len(documents(FULL.model_copy(update={"storage": None}))) == 1


@pytest.mark.parametrize(
    ("asked", "image"), [({}, "mmlm:cpu"), ({"gpus": 1}, "mmlm:cuda"), ({"gpus": 1, "image": "x"}, "x")]
)
def test_gpus_get_the_image_that_can_use_them(asked: dict[str, Any], image: str) -> None:
    cluster = documents(KubeRayConfig(**asked))[1]["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0])]
    assert {container["image"] for pod in pods for container in pod["containers"]} == {image}


def test_all_pods_are_quiet_and_leave_time_to_save() -> None:
    cluster = documents(KubeRayConfig(grace=120))[1]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]):
        pod = group["template"]["spec"]
        variables = {v["name"]: v.get("value") for v in pod["containers"][0]["env"]}
        assert variables.items() >= quiet_environment().items()
        assert variables[STOP_WAIT] == variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "120"
        assert pod["terminationGracePeriodSeconds"] > 120


def test_a_cluster_that_may_grow_says_how_far() -> None:
    for most, told in ((None, set()), (2, set()), (6, {("MMLM_RAY_MOST_CPUS", "24"), ("MMLM_RAY_MOST_GPUS", "12")})):
        config = KubeRayConfig(workers=2, workers_max=most, cpus=4, gpus=2)
        head = documents(config)[-1]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        variables = {(v["name"], v.get("value")) for v in head["containers"][0]["env"]}
        assert {(name, value) for name, value in variables if name.startswith("MMLM_RAY_MOST")} == told


def test_a_cluster_that_may_only_grow_below_its_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--cluster", "workers=3", "--cluster", "workers_max=2", "--tracking-uri", "http://m:5000"]
    assert main(["run", "demo", "--on", "kuberay", "--print", *asked]) == 2
    assert "`workers_max` = 2: the cluster begins with workers = 3" in capsys.readouterr().err


def test_words_arrive_through_two_shells_and_the_quotes_of_windows() -> None:
    words = [
        "a b",
        "it's",
        '"$HOME"',
        "x;y",
        "lr=log(1e-4,1e-2)",
        "",
        "a\\",
        "tab\there",
        "é*",
        "[1, 2]",
        "--set",
        "k=1%",
    ]
    ray = f"{sys.executable} -c 'import subprocess, sys; print(subprocess.list2cmdline(sys.argv[1:]))' "
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"

    def shell(name: str, line: str) -> str:
        return subprocess.run([name, "-c", line], capture_output=True, text=True, check=True).stdout.rstrip("\n")

    joined = shell("bash", ray + kuberay.entrypoint([sys.executable, "-c", show, *words]))  # KubeRay's submitter
    assert json.loads(shell("sh", joined)) == words  # Ray's supervisor
    assert kuberay.entrypoint(["mmlm", "run", "--set", "train.seed=3"]) == "mmlm run --set train.seed=3"


def test_names_are_short_and_apart() -> None:
    config = KubeRayConfig()
    long = "a-story-with-a-name-that-is-longer-than-kubernetes-takes"
    titles = [
        kuberay.title(config, "run", story, "/runs/x") for story in ("demo", "demo", f"{long}-1", f"{long}-2", "故事")
    ]
    assert len({title.name for title in titles}) == 5 and max(len(title.name) for title in titles) <= 47
    assert len({title.name.rpartition("-")[0] for title in titles}) == 4  # the same story, and three others
    assert len({title.labels[kuberay.OUT] for title in titles}) == 1
    for title in titles:
        kubernetes.Metadata(name=title.name, labels=title.labels)
    places = [kuberay.title(config, "run", "demo", out).labels[kuberay.OUT] for out in ("/runs/a-b", "/runs/a/b")]
    assert places[0] != places[1]


KUBECTL = """#!{python}
import json, pathlib, sys
import yaml
folder = pathlib.Path({folder!r})
jobs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.job"))]
if sys.argv[1] == "get":
    if (folder / "forbidden").exists():
        sys.exit("Error from server (Forbidden): rayjobs.ray.io is forbidden")
    key, _, value = sys.argv[sys.argv.index("-l") + 1].partition("=")
    found = [job for job in jobs if job["metadata"]["labels"].get(key) == value]
    print(json.dumps({{"items": found}}))
elif sys.argv[1:] == ["apply", "-f", "-"]:
    for document in yaml.safe_load_all(sys.stdin):
        name = document["metadata"]["name"]
        path = folder / f"{{name}}.{{'job' if document['kind'] == 'RayJob' else 'other'}}"
        print(name, "unchanged" if path.exists() else "created")
        path.exists() or path.write_text(json.dumps(document))
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a `kubectl` that keeps what is applied as NAME.job, and leaves an object that is there as it is."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL.format(python=sys.executable, folder=str(tmp_path)))
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def end(job: Path, state: str) -> None:
    job.write_text(json.dumps({**json.loads(job.read_text()), "status": {"jobDeploymentStatus": state}}))


@pytest.mark.parametrize("state", kuberay.ENDED)
def test_the_same_command_again_is_a_new_job(cluster: Path, state: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", *GIVEN]) == 0
    (first,) = cluster.glob("*.job")
    shown = capsys.readouterr().out
    assert f"{first.stem} created" in shown and f"kubectl logs -f job/{first.stem}" in shown
    end(first, state)
    assert main(["run", "demo", *GIVEN]) == 0
    assert len(list(cluster.glob("*.job"))) == 2
    assert capsys.readouterr().out.splitlines()[:1] == ["mmlm-runs unchanged"]


@pytest.mark.parametrize("state", [None, "", "Initializing", "Running", "Retrying", "Suspended"])
def test_a_second_job_for_one_folder_is_refused(
    cluster: Path, state: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "demo", *GIVEN]) == 0
    (first,) = cluster.glob("*.job")
    if state is not None:
        end(first, state)
    assert main(["train", "demo", *GIVEN]) == 2
    assert f"the job {first.stem} is still at work on this folder" in capsys.readouterr().err
    assert main(["train", "demo", *GIVEN, "--out", "/runs/other"]) == 0
    (cluster / "forbidden").touch()  # who may not list jobs may still submit them
    assert main(["train", "demo", *GIVEN]) == 0
    assert len(list(cluster.glob("*.job"))) == 3


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ((), "specs"),
        (("spec",), "entryPoint"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec"), "volume"),
    ],
)
def test_a_misspelt_key_is_refused_at_every_depth(path: tuple[str, ...], key: str) -> None:
    job = documents(KubeRayConfig())[1]
    here = job
    for step in path:
        here = here[step]
    here[key] = here.get("spec", "x")
    with pytest.raises(pydantic.ValidationError, match="Extra inputs are not permitted"):
        kubernetes.RayJob.model_validate(job)


def test_a_mount_without_a_volume_is_refused() -> None:
    job = documents(KubeRayConfig())[1]
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"][0]
    with pytest.raises(pydantic.ValidationError, match="no volume of the pod"):
        kubernetes.RayJob.model_validate(job)


def test_the_command_line_shows_it_and_wants_a_tracking_server(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = ["run", "demo", "--on", "kuberay", "--print", "--set", "train.seed=3"]
    assert main(command) == 2
    assert "a tracking server" in capsys.readouterr().err
    assert main([*command, "--tracking-uri", "http://mlflow:5000", "--cluster", "memory=lots"]) == 2
    assert "memory" in capsys.readouterr().err
    assert main([*command, "--tracking-uri", "http://mlflow:5000", "--cluster", "workers=3"]) == 0
    job = list(yaml.safe_load_all(capsys.readouterr().out))[1]
    assert job["spec"]["entrypoint"] == "mmlm run demo --out /runs/demo --set train.seed=3 --inside-ray"
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 3
    secret = ["--tracking-uri", "http://me:word@mlflow:5000", "--cluster", "secrets.MLFLOW_TRACKING_URI=mlflow/uri"]
    assert main([*command, *secret]) == 0
    text = capsys.readouterr().out
    assert "me:word" not in text and text.count("key: uri") == 2  # head and workers


def test_without_kubectl_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no `kubectl` here"):
        kuberay.submit("{}", TITLE)


def test_the_examples_in_infra_are_what_is_rendered() -> None:
    specification = importlib.util.spec_from_file_location("render", INFRA / "render.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for path, text in module.examples().items():
        assert path.read_text(encoding="utf-8") == text, "run: python infra/render.py --write"
