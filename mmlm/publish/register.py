"""Verb register: Checkpoint + Report → ModelVersion in MLflow; the alias `champion` on the better one."""

from __future__ import annotations

import base64
import contextlib
import json
import sqlite3
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mmlm import artifacts, tracking_store
from mmlm.artifacts import Artifact
from mmlm.config import blank_credentials
from mmlm.corpus.records import Record, read_records
from mmlm.errors import ArtifactError, LaunchError, MmlmError
from mmlm.features import spec as feature_spec
from mmlm.publish import bundle, gate
from mmlm.publish.challenge import answers_to
from mmlm.publish.config import RegisterConfig
from mmlm.publish.locate import fluent
from mmlm.storage import read_uri, write_json

RECIPE = 1
"""Bumped when the same checkpoint and report would be registered differently."""
ALIAS = "champion"
FILE = "registered.json"


def register(
    config: RegisterConfig, *, story: str, checkpoint: Artifact, report: Artifact, shards: Artifact, manifest: Artifact,
    data: Path | str, out: Path, tracker: Any, tracking_uri: str | None,
) -> Artifact:  # fmt: skip
    """Log the bundle, let the gate compare it with the champion, make the model version, move the alias or say why not.

    The noun holds `registered.json` (name, version, model_uri, alias, promoted, reason) and `gate.json`. A rerun after
    a kill finds the version it made by its fingerprint. Raises LaunchError when the registry does not take it.
    """
    name = config.name or f"mmlm-{story}"
    parents = {"checkpoint": checkpoint, "report": report}
    work = artifacts.begin(out, "model_version", recipe=RECIPE, config=config, parents=parents, extra={"name": name})
    if work.artifact:
        return work.artifact
    uri = tracking_store.absolute(tracking_uri or tracking_store.default_uri())
    with tracker.run("register", config, work) as run:
        job = _Registration(config, story, name, work, checkpoint, report, shards, manifest, data, uri)
        try:
            version = job.version(run)
        except (MmlmError, OSError):
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LaunchError(
                f"the registry {blank_credentials(uri)} did not take the model ({first[:200]})",
                cure="check the tracking server, then run the same command again",
            ) from error
        verdict = json.loads(version.tags["gate"])
        promoted = bool(verdict["promote"])
        write_json(work.path / "gate.json", verdict)
        write_json(
            work.path / FILE,
            {
                "name": name, "version": int(version.version), "model_uri": f"models:/{name}/{version.version}",
                "alias": ALIAS if promoted else None, "promoted": promoted, "reason": verdict["reason"],
                "tracking_uri": blank_credentials(uri),
            },
        )  # fmt: skip
        numbers = ("value", "champion_value", "difference", "low", "high", "probability_better")
        run.metrics({f"gate/{k}": verdict[k] for k in numbers if verdict[k] is not None})
        run.tags({"model_version": f"{name}/{version.version}", "promoted": promoted, "reason": verdict["reason"]})
        run.artifact(work.path / "gate.json")
        run.artifact(work.path / FILE)
        counts = {"version": int(version.version), "promoted": promoted}
        artifact = work.finish(counts=counts, digest_of=[FILE], extra={"reason": verdict["reason"]})
        run.noun(artifact)
    return artifact


class _Registration:
    """What the making of one model version needs to know."""

    def __init__(
        self, config: RegisterConfig, story: str, name: str, work: artifacts.Work, checkpoint: Artifact,
        report: Artifact, shards: Artifact, manifest: Artifact, data: Path | str, uri: str,
    ) -> None:  # fmt: skip
        self.config, self.story, self.name, self.work, self.uri = config, story, name, work, uri
        self.checkpoint, self.report, self.shards, self.manifest, self.data = checkpoint, report, shards, manifest, data
        tracking_store.probe(uri)
        self.client = tracking_store.open_client(uri)

    def version(self, run: Any) -> Any:
        """The model version of this work: the one that a killed attempt made, else a new one. The alias is on it if the
        gate let it pass."""
        self._registered_model()
        version = self._made_before()
        if version is None:
            version = self._make(run.run_id or self._own_run())
        if json.loads(version.tags["gate"])["promote"]:
            champion = self._champion()
            if champion is None or int(champion.version) < int(version.version):
                self.client.set_registered_model_alias(self.name, ALIAS, version.version)
        return version

    def _own_run(self) -> str:
        """A run for callers that track nothing: a version needs one for its files."""
        experiment = tracking_store.experiment(self.client, self.uri, self.story)
        return str(self.client.create_run(experiment, run_name="register").info.run_id)

    def _registered_model(self) -> None:
        try:
            self.client.get_registered_model(self.name)
        except Exception as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.client.create_registered_model(
                self.name, {"story": self.story}, f"Models of the mmlm story {self.story}."
            )

    def _made_before(self) -> Any:
        for found in self.client.search_model_versions(f"name='{self.name}'"):
            if found.tags.get("fingerprint") == self.work.fingerprint and "gate" in found.tags:
                return found
        return None

    def _champion(self) -> Any:
        try:
            return self.client.get_model_version_by_alias(self.name, ALIAS)
        except Exception as error:
            if getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def _make(self, run_id: str) -> Any:
        verdict, predictions = self._judge()
        tags = {
            "story": self.story, "fingerprint": self.work.fingerprint, "digest": self.checkpoint.digest,
            "test_digest": str(self.report.extra.get("test_digest", "")), "gate": json.dumps(verdict.plain()),
            "promoted": str(verdict.promote).lower(), "reason": verdict.reason, "model": self.config.model,
            tracking_store.metric_name(f"{verdict.task}.{verdict.metric}"): f"{verdict.value:.4f}",
            **{f"parent.{k}": v for k, v in self.work.parents.items()},
            **{f"parent.{k}": v for k, v in self.checkpoint.parents.items()},
        }  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="mmlm-bundle-") as folder, fluent(self.uri) as mlflow:
            path = Path(folder) / Path(gate.PREDICTIONS).name
            pq.write_table(predictions, path)
            self.client.log_artifact(run_id, str(path), str(Path(gate.PREDICTIONS).parent))
            with mlflow.start_run(run_id=run_id):
                code = Path(folder) / "code"
                code.mkdir()
                info = bundle.log(
                    mlflow, self.checkpoint.path, code, example=self._example(),
                    metadata={"story": self.story, "digest": self.checkpoint.digest},
                )  # fmt: skip
            return self.client.create_model_version(
                self.name, info.model_uri, run_id, tags=tags, description=verdict.reason, model_id=info.model_id
            )

    def _judge(self) -> tuple[gate.Verdict, Any]:
        """The gate's verdict, and the challenger's answers that the next gate will compare with."""
        model = self.config.model
        predictions = gate.read_predictions(self.report.path / "predictions.parquet")
        if model not in set(predictions["model"].to_pylist()):
            model = "teacher"  # a story without distillation
        predictions = gate.read_predictions(self.report.path / "predictions.parquet", model)
        row = gate.choose(self.config.gate, feature_spec.load(self.shards.path), predictions)
        challenger = gate.select(predictions, row)
        champion = self._champion()
        if champion is None:
            return gate.decide(self.config.gate, row, challenger, None, None), predictions
        name = f"{self.name}/{champion.version}"
        try:
            answers = self._champions_answers(champion, row, challenger)
        except (MmlmError, OSError) as error:
            raise ArtifactError(
                f"the champion {name} cannot answer the test records ({error})",
                cure=f"restore its files, or take the alias `{ALIAS}` off it, then run the same command again",
            ) from error
        return gate.decide(self.config.gate, row, challenger, answers, name), predictions

    def _champions_answers(
        self, champion: Any, row: gate.Row, challenger: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The champion's answers to the challenger's records: those kept with its version, else asked again."""
        if champion.tags.get("test_digest") == self.report.extra.get("test_digest"):
            with contextlib.suppress(Exception), tempfile.TemporaryDirectory() as folder:
                path = self.client.download_artifacts(champion.run_id, gate.PREDICTIONS, folder)
                kept = gate.select(gate.read_predictions(Path(path)), row)
                if [a["id"] for a in kept] == [a["id"] for a in challenger]:
                    return kept
        return answers_to(
            f"models:/{self.name}/{champion.version}",
            self.uri,
            challenger,
            row,
            manifest=self.manifest.path,
            data=self.data,
        )

    def _example(self) -> Any:
        """A row as the served model takes it, its media as `data:` URIs: the first test record, without large media."""
        import pandas as pd

        record = next((r for r in read_records(self.manifest.path) if r.split == "test"), None)
        return pd.DataFrame([example_row(record, self.data) if record else {"text": "?"}])


def example_row(record: Record, data: Path | str) -> dict[str, str]:
    """A record as `{text, image, audio}`; media larger than bundle.MAX_EXAMPLE or gone are left out."""
    row = {"text": next((p.text for p in record.parts if p.kind == "text" and not p.beside and p.text), "?")}
    for part in record.parts:
        if part.kind in ("image", "audio") and part.kind not in row:
            try:
                media = part.data if part.data is not None else read_uri(part.uri or "", data, bundle.MAX_EXAMPLE)
            except MmlmError:
                continue
            row[part.kind] = f"data:application/octet-stream;base64,{base64.b64encode(media).decode()}"
    return row


def still_registered(artifact: Artifact, tracking_uri: str | None) -> bool:
    """Whether the registry at `tracking_uri` has the version that this noun names."""
    uri = tracking_store.absolute(tracking_uri or tracking_store.default_uri())
    try:
        row: Mapping[str, Any] = json.loads((artifact.path / FILE).read_text(encoding="utf-8"))
        name, version = str(row["name"]), int(row["version"])
    except (OSError, ValueError, KeyError):
        return False
    file = tracking_store.database(uri)
    if file is not None and not file.exists():
        return False
    if file is not None and _in_sqlite(file, name, version, artifact.fingerprint):
        return True
    client = tracking_store.open_client(uri)
    try:
        found = client.get_model_version(name, str(version))
    except Exception as error:
        if getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False
        raise
    return bool(found.tags.get("fingerprint") == artifact.fingerprint)


def _in_sqlite(file: Path, name: str, version: int, fingerprint: str) -> bool:
    """A look without importing MLflow, which takes seconds; False only means that MLflow has to be asked."""
    query = (
        "select 1 from model_version_tags t join model_versions v on v.name = t.name and v.version = t.version "
        "where t.name = ? and t.version = ? and t.key = 'fingerprint' and t.value = ? "
        "and v.current_stage != 'Deleted_Internal'"
    )
    try:
        with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as store:
            return store.execute(query, (name, version, fingerprint)).fetchone() is not None
    except sqlite3.Error:
        return False
