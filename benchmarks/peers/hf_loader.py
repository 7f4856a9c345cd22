"""Hugging Face datasets 5.2.0: a data set on disk with an Image column, `with_transform`, torch's DataLoader, as in its docs."""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from pathlib import Path
from typing import Any

from clock import Watch, contest
from decoding import collate, count, pairs, prepared, standardise, transform


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    from datasets import Dataset, Features, Image, Sequence, Value, load_from_disk
    from torch.utils.data import DataLoader

    def make(folder: Path) -> None:
        found = pairs(source)
        columns = {
            "image": [{"bytes": jpeg, "path": None} for jpeg, _ in found],
            "tokens": [tokens.tolist() for _, tokens in found],
        }
        features = Features({"image": Image(), "tokens": Sequence(Value("int32"))})
        Dataset.from_dict(columns, features=features).save_to_disk(str(folder / "data"))

    dataset = load_from_disk(str(prepared(source, "datasets", make) / "data"))
    if options["decoder"] == "pillow":
        decode: Any = lambda picture: standardise(picture.convert("RGB"))  # noqa: E731
    else:
        fast = transform("simplejpeg")
        dataset = dataset.cast_column("image", Image(decode=False))
        decode = lambda picture: fast(picture["bytes"])  # noqa: E731

    def change(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"image": [decode(picture) for picture in rows["image"]], "tokens": rows["tokens"]}

    loader = DataLoader(
        dataset.with_transform(change), batch_size=options["batch"], shuffle=True, num_workers=options["workers"],
        collate_fn=lambda rows: collate([(row["image"], row["tokens"]) for row in rows]),
    )  # fmt: skip
    return count(loader, watch)


if __name__ == "__main__":
    contest(work)
