"""MosaicML streaming 0.13.0: MDSWriter, pictures by Pillow, as in its docs."""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from pathlib import Path
from typing import Any

from clock import Watch, contest, files
from pillow_shardwriter import shrink


def stand_in_for_torchvision() -> None:
    """torchvision of PyPI is built for CUDA and finds none of its operators beside a CPU build of torch. streaming imports
    it, and uses nothing of it here: it is given the names that it wants."""
    if _kept:
        return
    import torch

    operators = torch.library.Library("torchvision", "DEF")  # its fakes are registered while this one lives
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

    _kept.append(operators)


_kept: list[Any] = []


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    stand_in_for_torchvision()
    from streaming import MDSWriter

    found = files(source, ".jpg")
    columns = {"image": "bytes", "label": "str"}  # its `jpeg` column has one quality, 75
    with watch.lap("work"), MDSWriter(out=str(out / "mds"), columns=columns) as writer:
        for path in found:
            jpeg = shrink(path.read_bytes(), options["size"], options["quality"])
            writer.write({"image": jpeg, "label": path.parent.name})
    return {"items": len(found)}


if __name__ == "__main__":
    contest(work)
