"""MosaicML streaming 0.13.0: MDSWriter → StreamingDataset → torch's DataLoader, as in its docs."""

# mypy: disable-error-code="import-not-found,import-untyped,misc"

from __future__ import annotations

from pathlib import Path
from typing import Any

from clock import Watch, contest
from decoding import collate, count, pairs, prepared, transform
from mosaic_mdswriter import stand_in_for_torchvision


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    stand_in_for_torchvision()
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    def make(folder: Path) -> None:
        with MDSWriter(out=str(folder / "mds"), columns={"jpeg": "bytes", "tokens": "ndarray:int32"}) as writer:
            for jpeg, tokens in pairs(source):
                writer.write({"jpeg": jpeg, "tokens": tokens})

    decode = transform(options["decoder"])

    class Pictures(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            row = super().__getitem__(index)
            return decode(row["jpeg"]), row["tokens"]

    clean_stale_shared_memory()
    folder = prepared(source, "mosaic", make) / "mds"
    dataset = Pictures(local=str(folder), shuffle=True, batch_size=options["batch"])
    return count(
        DataLoader(dataset, batch_size=options["batch"], num_workers=options["workers"], collate_fn=collate), watch
    )


if __name__ == "__main__":
    contest(work)
