"""The model as MLflow loads it (models-from-code): a table with text, image, audio, fields in, a table of answers out.

Runs where `mmlm` is not installed: the bundle carries the modules that it needs. Media are bytes; in process also a
path; several pictures or sounds a list; fields are a mapping or its JSON. Under MLflow's scoring server a text is base64 and
no path is ever opened.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import mlflow.models
import pandas as pd
from mlflow.pyfunc import PythonModel

import mmlm
from mmlm.publish.answering import Responder
from mmlm.publish.asked_media import missing

COLUMNS = ("text", "image", "audio", "fields", "adapter")
"""Of the table that are read."""


def serving() -> bool:
    """Whether this process is MLflow's scoring server, so that what arrives came over the network."""
    return "__pyfunc_model_path__" in os.environ or "mlflow.pyfunc.scoring_server.app" in sys.modules


def unshadow() -> None:
    """Take bundles off the import path of a process that has the whole mmlm: MLflow puts them first, and their trimmed
    package would hide the rest of it from processes that are started later."""
    home = Path(mmlm.__file__).resolve().parents[1]
    for entry in list(sys.path):
        package = Path(entry) / "mmlm"
        trimmed = (package / "publish" / "pyfunc_model.py").exists() and not (package / "cli.py").exists()
        if trimmed and package.parent.resolve() != home:
            sys.path.remove(entry)


class MmlmModel(PythonModel):
    """Answers rows; `answer`, `score`, `label_scores`, and where some row has them `labels`, `number`, and `error` for a
    row that could not be answered. Asked to `embed`, a model with an embedding head gives `embedding`, a list of numbers,
    and `note` where some row has one."""

    def load_context(self, context: Any) -> None:
        """Loads the checkpoint of the bundle on the CPU, or on the GPU that MMLM_DEVICE names."""
        self.responder = Responder(context.artifacts["checkpoint"])
        unshadow()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        table = pd.DataFrame(model_input)
        columns = [table[key].tolist() if key in table else [None] * len(table) for key in COLUMNS]
        cells = [zip(COLUMNS, values, strict=True) for values in zip(*columns, strict=True)]
        rows = [{key: value for key, value in row if not missing(value)} for row in cells]
        embed = bool((params or {}).get("embed"))
        answers = (self.responder.embed if embed else self.responder.answer)(rows, paths=not serving())
        extra = [name for name in ("labels", "number", "note", "error") if any(name in a for a in answers)]
        names = [*(["embedding"] if embed else ["answer", "score", "label_scores"]), *extra]
        return pd.DataFrame({name: pd.Series([a.get(name) for a in answers], dtype=object) for name in names})


mlflow.models.set_model(MmlmModel())
