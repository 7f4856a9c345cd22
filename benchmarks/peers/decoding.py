"""What every peer of `loading` does with a picture and its tokens, and how its batches are counted. Standard library, numpy,
torch and Pillow (or simplejpeg and OpenCV) only."""

# mypy: disable-error-code="import-not-found,import-untyped,no-any-return"

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clock import Watch


def transform(decoder: str) -> Callable[[bytes], torch.Tensor]:
    """JPEG → (3, H, W) float32 whose mean is 0 and standard deviation about 1."""
    return {"pillow": by_pillow, "simplejpeg": by_simplejpeg}[decoder]


def by_pillow(jpeg: bytes) -> torch.Tensor:
    """As the documentations of the peers show it: Pillow, then torch."""
    from PIL import Image

    return standardise(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def standardise(picture: Any) -> torch.Tensor:
    """A picture of Pillow as torchvision's ToTensor makes a tensor of it, standardised."""
    x_CHW = torch.from_numpy(np.array(picture, np.uint8, copy=True)).permute(2, 0, 1).contiguous().float()
    return (x_CHW - x_CHW.mean()) / (x_CHW.std() + 1e-3 * 255)


def by_simplejpeg(jpeg: bytes) -> torch.Tensor:
    """What ours does, in the order of axes that suits it: no peer's documentation shows this."""
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)
    x_HWC = simplejpeg.decode_jpeg(jpeg, "RGB")
    flat = x_HWC.reshape(len(x_HWC), -1)
    counts = cv2.calcHist([flat], [0], None, [256], [0, 256]).ravel().astype(np.float64)
    values = np.arange(256.0)
    mean = counts @ values / flat.size
    deviation = np.sqrt(counts @ values**2 / flat.size - mean**2)
    table = ((values - mean) / (deviation + 1e-3 * 255)).astype(np.float32)
    return torch.from_numpy(cv2.LUT(flat, table[None]).reshape(x_HWC.shape))


def collate(samples: Sequence[tuple[torch.Tensor, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures stacked, tokens padded to the longest."""
    tokens = [torch.as_tensor(np.asarray(t), dtype=torch.int64) for _, t in samples]
    return torch.stack([x for x, _ in samples]), torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)


def count(batches: Iterable[Any], watch: Watch) -> dict[str, Any]:
    """Take all batches; the clock runs from the first of them on."""
    iterator = iter(batches)
    pictures, tokens = next(iterator)
    items, positions = 0, tokens.numel()
    assert pictures.dtype == torch.float32 and pictures[0].numel() == 224 * 224 * 3 and tokens.dtype == torch.int64
    assert abs(float(pictures[0].mean())) < 1e-3
    with watch.lap("work"):
        for pictures, tokens in iterator:
            items += len(pictures)
            positions += tokens.numel()
    return {"items": items, "positions": positions}


def pairs(source: Path) -> list[tuple[bytes, np.ndarray]]:
    """The pictures and tokens below `source`, in order."""
    found = sorted((source / "pairs").glob("*.jpg"))
    return [(path.read_bytes(), np.load(path.with_suffix(".npy"))) for path in found]


def prepared(source: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The corpus in a peer's own format, made by `make` if it is not there; no part of what is timed."""
    folder = source / "as" / name
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)
        (folder / "done").touch()
    return folder
