"""KubeRay: the YAML is a pure function of its settings and holds only fields of the typed model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from mmlm.cli import main
from mmlm.errors import LaunchError
from mmlm.launch import kuberay, kubernetes
from mmlm.launch.kuberay import KubeRayConfig

INFRA = Path(__file__).parents[2] / "infra"
FULL = KubeRayConfig(
    gpus=2, workers=2, workers_max=6, namespace="ml", service_account="trainer", image="mmlm:cuda",
    environment={"NCCL_DEBUG": "WARN"}, secrets={"TOKEN": "mlflow/token"},
)  # fmt: skip


def documents(config: KubeRayConfig) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(kuberay.render(config, ["mmlm", "run", "a b"], "mmlm-run-demo", {"X": "1"})))


@pytest.mark.parametrize("config", [KubeRayConfig(), FULL])
def test_what_is_rendered_is_what_the_model_reads(config: KubeRayConfig) -> None:
    claim, job = documents(config)
    assert kubernetes.RayJob.model_validate(job).plain() == job
    assert kubernetes.Claim.model_validate(claim).plain() == claim
    assert kuberay.render(config, ["x"], "n") == kuberay.render(config, ["x"], "n")


def test_settings_arrive() -> None:
    job = documents(FULL)[1]
    cluster = job["spec"]["rayClusterSpec"]
    assert job["spec"]["entrypoint"] == "mmlm run 'a b'" and job["metadata"]["namespace"] == "ml"
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
        kuberay.submit("{}")


def test_the_examples_in_infra_are_what_is_rendered() -> None:
    specification = importlib.util.spec_from_file_location("render", INFRA / "render.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for path, text in module.examples().items():
        assert path.read_text(encoding="utf-8") == text, "run: python infra/render.py --write"
