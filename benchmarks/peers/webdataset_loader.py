"""webdataset 1.0.2: WebDataset → shuffle → decode → batched, read by WebLoader, as in its README."""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from clock import Watch, contest
from decoding import collate, count, pairs, prepared, standardise, transform


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import webdataset as wds

    def make(folder: Path) -> None:
        with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=options["per_shard"], verbose=0) as writer:
            for number, (jpeg, tokens) in enumerate(pairs(source)):
                writer.write({"__key__": f"{number:08d}", "jpg": jpeg, "npy": tokens})

    folder = prepared(source, "webdataset", make)
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(1000)
    if options["decoder"] == "pillow":
        dataset = dataset.decode("pil").to_tuple("jpg", "npy").map_tuple(standardise, np.asarray)
    else:
        dataset = dataset.to_tuple("jpg", "npy").map_tuple(transform("simplejpeg"), read_npy)
    dataset = dataset.batched(options["batch"], collation_fn=collate)
    return count(wds.WebLoader(dataset, batch_size=None, num_workers=options["workers"]), watch)


def read_npy(data: bytes) -> np.ndarray:
    array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array


if __name__ == "__main__":
    contest(work)
