"""LitData 0.2.76: `optimize` → StreamingDataset → StreamingDataLoader, as in its README."""

# mypy: disable-error-code="import-not-found,import-untyped,misc"

from __future__ import annotations

from pathlib import Path
from typing import Any

from clock import Watch, contest
from decoding import collate, count, pairs, prepared, transform

_held: list[Any] = []


def pick(number: int) -> dict[str, Any]:
    jpeg, tokens = _held[number]
    return {"jpeg": jpeg, "tokens": tokens}


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    def make(folder: Path) -> None:
        _held[:] = pairs(source)
        optimize(
            fn=pick, inputs=list(range(len(_held))), output_dir=str(folder / "data"), chunk_bytes="64MB", num_workers=1,
            start_method="fork",
        )  # fmt: skip

    decode = transform(options["decoder"])

    class Pictures(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            row = super().__getitem__(index)
            return decode(row["jpeg"]), row["tokens"]

    dataset = Pictures(str(prepared(source, "litdata", make) / "data"), shuffle=True, drop_last=False)
    loader = StreamingDataLoader(
        dataset, batch_size=options["batch"], num_workers=options["workers"], collate_fn=collate
    )
    return count(loader, watch)


if __name__ == "__main__":
    contest(work)
