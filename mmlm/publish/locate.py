"""From what people call a model (a registry URI, a run, a folder) to the checkpoint folder that answers."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmlm import tracking_store
from mmlm.config import blank_credentials
from mmlm.errors import ArtifactError

WEIGHTS = "model.safetensors"
CHECKPOINT = "checkpoint"
"""Name of the checkpoint among the artifacts of a bundle."""


def checkpoint_folder(model: str, tracking_uri: str | None = None) -> Path:
    """The folder with the weights of `model`. Raises ArtifactError when there is no such model."""
    if model.startswith(("models:/", "runs:/", "mlflow-artifacts:", "s3://", "gs://", "http://", "https://")):
        folder = download(model, tracking_store.absolute(tracking_uri or tracking_store.default_uri()))
    else:
        folder = Path(model.removeprefix("file://"))
        if not folder.is_dir():
            raise ArtifactError(
                f"there is no folder {model}",
                wanted="models:/NAME@champion, or a checkpoint's folder",
                cure="check the name or path of the model",
            )
    for place in (folder, folder / "artifacts" / CHECKPOINT, folder / "student", folder / "model"):
        if (place / WEIGHTS).is_file():
            return place
    raise ArtifactError(
        f"{model} holds no model",
        wanted=f"a folder with {WEIGHTS}, or an MLflow model",
        cure="check the name or path of the model",
    )


def download(uri: str, tracking_uri: str) -> Path:
    """The local folder of an MLflow model; nothing is copied when it lies on this machine."""
    file = tracking_store.database(tracking_uri)
    where = blank_credentials(tracking_uri)
    if file is not None and not file.exists():
        raise ArtifactError(
            f"there is no model {uri}: the registry {where} does not exist yet",
            cure="run `mmlm run demo` first, or give --tracking-uri",
        )
    tracking_store.probe(tracking_uri)
    tracking_store.open_client(tracking_uri)
    with fluent(tracking_uri) as mlflow:
        try:
            return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ArtifactError(
                f"there is no model {uri} in {where} ({first[:200]})",
                cure="`mlflow ui` lists them; `mmlm run demo` makes models:/mmlm-demo@champion",
            ) from None


@contextlib.contextmanager
def fluent(tracking_uri: str) -> Iterator[Any]:
    """MLflow's global functions pointed at `tracking_uri`, silent, and put back afterwards."""
    tracking_store.quiet_mlflow()
    import mlflow as untyped

    mlflow: Any = untyped
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")  # MLflow writes what it is told into the environment
    kept = {name: os.environ.get(name) for name in names}
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    registry_before = mlflow.get_registry_uri() if kept["MLFLOW_REGISTRY_URI"] else None
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    try:
        yield mlflow
    finally:
        mlflow.set_tracking_uri(before)
        mlflow.set_registry_uri(registry_before)
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        logger.setLevel(level)
