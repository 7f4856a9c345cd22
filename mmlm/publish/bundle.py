"""The bundle: an MLflow pyfunc that carries checkpoint and code, and needs no installed `mmlm`."""

from __future__ import annotations

import ast
import importlib.metadata
import shutil
import sys
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mmlm.errors import LaunchError
from mmlm.publish.locate import CHECKPOINT

PACKAGE = Path(__file__).resolve().parents[1]
ENTRY = "mmlm.publish.pyfunc_model"
LEFT_OUT = frozenset({"mmlm.publish.locate", "mmlm.remote"})
"""Modules on the way that prediction never reaches: the bundle is where `locate` would lead, and media come as bytes."""
DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python-headless", "yaml": "pyyaml", "resvg_py": "resvg-py"}
"""Distributions whose import name is another."""
OPTIONAL = frozenset({"peft", "transformers"})
"""Packages that only models with adapters need, or those that are an encoder of transformers."""
MAX_EXAMPLE = 32 << 10
"""Pictures and sounds larger than this, bytes, are left out of the input example."""


def modules(entry: str = ENTRY) -> tuple[dict[str, Path], set[str]]:
    """The modules of `mmlm` that `entry` needs, as name → file, and the foreign packages that those import.

    Found by reading the import statements, those inside functions included.
    """
    found: dict[str, Path] = {}
    foreign: set[str] = set()
    todo = [entry]
    while todo:
        name = todo.pop()
        file = _file(name)
        if file is None or name in found or name in LEFT_OUT:
            continue
        found[name] = file
        for other in _imports(name, ast.parse(file.read_text(encoding="utf-8"))):
            if other == "mmlm" or other.startswith("mmlm."):
                parts = other.split(".")
                todo += [".".join(parts[: i + 1]) for i in range(len(parts))]
            elif (top := other.split(".")[0]) not in sys.stdlib_module_names:
                foreign.add(top)
    return found, foreign


def _file(name: str) -> Path | None:
    base = PACKAGE.joinpath(*name.split(".")[1:])
    return next((f for f in (base / "__init__.py", base.with_suffix(".py")) if f.is_file()), None)


def _imports(name: str, tree: ast.AST) -> list[str]:
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(node.module)
            if node.module.split(".")[0] == "mmlm":
                found += [f"{node.module}.{alias.name}" for alias in node.names]  # may be modules
    return found


def copy_code(target: Path) -> Path:
    """Write the package as the bundle needs it to `target`/mmlm and return that folder."""
    for file in modules()[0].values():
        where = target / file.relative_to(PACKAGE.parent)
        where.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, where)
        for folder in where.parents:
            if folder == target:
                break
            (folder / "__init__.py").touch()
    return target / "mmlm"


def requirements(extra: Collection[str] = ()) -> list[str]:
    """What prediction needs, pinned to what is installed here; local version labels such as +cpu are cut off. Of OPTIONAL
    only what `extra` names."""
    pinned = []
    needed = (modules()[1] | {"mlflow"}) - (OPTIONAL - set(extra))
    for package in sorted(DISTRIBUTIONS.get(p, p) for p in needed):
        try:
            version = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional reader, such as fsspec for remote media
        pinned.append(f"{package}=={version}")
    return pinned


def signature(adapters: bool = False, embedding: bool = False) -> Any:
    """Optional columns. Media are of any type: MLflow's `binary` refuses empty cells, ordinary input here. With an
    `embedding` head, the parameter `embed` asks for vectors instead of answers."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType, Array, Map

    inputs: list[Any] = [
        ColSpec(DataType.string, "text", required=False),
        ColSpec(AnyType(), "image", required=False),
        ColSpec(AnyType(), "audio", required=False),
        ColSpec(AnyType(), "fields", required=False),
        *([ColSpec(DataType.string, "adapter", required=False)] if adapters else []),
    ]
    outputs: list[Any] = [
        ColSpec(DataType.string, "answer", required=not embedding),
        ColSpec(DataType.double, "score", required=False),
        ColSpec(Map(DataType.double), "label_scores", required=not embedding),
        ColSpec(Array(DataType.string), "labels", required=False),
        ColSpec(DataType.double, "number", required=False),
        *([ColSpec(Array(DataType.double), "embedding", required=False)] if embedding else []),
        ColSpec(DataType.string, "error", required=False),
    ]
    params: Any = ParamSchema([ParamSpec("embed", DataType.boolean, False)]) if embedding else None
    return ModelSignature(Schema(inputs), Schema(outputs), params)


def log(mlflow: Any, checkpoint: Path, code: Path, *, example: Any, metadata: Mapping[str, Any]) -> Any:
    """Log the bundle under the active run. `code` is an empty folder for the copied package. Returns the ModelInfo."""
    from mmlm.train import adapted
    from mmlm.train.weights import FILES, load_config

    folder = code / CHECKPOINT
    folder.mkdir()
    extra = adapted.files(checkpoint)
    config = load_config(checkpoint)
    pretrained = getattr(config, "pretrained", None)
    held = (
        pretrained and pretrained.encoder,
        *(getattr(config, f"{kind}_encoder", None) for kind in ("image", "audio")),
    )
    packages = {"peft", "transformers"} if extra else {"transformers"} if any(held) else set()
    for name in (*FILES, *extra):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint / name, folder / name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return mlflow.pyfunc.log_model(
                name="model",
                python_model=str(PACKAGE / "publish" / "pyfunc_model.py"),
                artifacts={CHECKPOINT: str(folder)},
                code_paths=[str(copy_code(code))],
                pip_requirements=requirements(packages),
                signature=signature(bool(extra), bool(getattr(config, "embedding", None))),
                input_example=example,
                metadata=dict(metadata),
            )
    except OSError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LaunchError(
            f"MLflow did not take the model ({first[:200]})",
            cure="check the tracking server, then run the same command again",
        ) from error
