"""A pinned environment for each peer, made when it is first wanted below `~/.cache/mmlm-bench` (or $MMLM_BENCH)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

READY = "ready.txt"
"""Written last into an environment: its requirements, and what pip made of them."""


@dataclass(frozen=True)
class Environment:
    """`first` is installed by a call of pip of its own, and holds in the next one, which installs `requirements`."""

    requirements: tuple[str, ...]
    first: tuple[str, ...] = ()
    """torch, where a peer wants it: a CPU build that lies at hand, before pip would fetch gigabytes for CUDA."""


TORCH = ("torch==2.13.0",)
VISION = "torchvision==0.28.0"
"""The one for that torch: any other would replace it."""
DECODERS = ("pillow==13.0.0", "simplejpeg==1.9.0", "opencv-python-headless==5.0.0.93")
"""Pillow, which the documentations of loaders show, and what ours decodes with."""
PEERS: Mapping[str, Environment] = MappingProxyType(
    {
        "img2dataset": Environment(("img2dataset==1.47.0",)),
        "raydata": Environment(("ray[data]==2.60.0", "pillow==13.0.0", "webdataset==1.0.2")),
        "litdata": Environment(("litdata==0.2.76", "pillow==13.0.0", VISION), TORCH),
        "streaming": Environment(("mosaicml-streaming==0.13.0", VISION), TORCH),
        "webdataset-loading": Environment(("webdataset==1.0.2", *DECODERS), TORCH),
        "litdata-loading": Environment(("litdata==0.2.76", *DECODERS), TORCH),
        "streaming-loading": Environment(("mosaicml-streaming==0.13.0", VISION, *DECODERS), TORCH),
        "datasets-loading": Environment(("datasets==5.2.0", *DECODERS), TORCH),
        "pillow": Environment(("pillow==13.0.0", "webdataset==1.0.2")),
        "pyvips": Environment(("pyvips[binary]==3.2.0",)),
        "lhotse": Environment(
            (
                "lhotse==1.33.0",
                "soundfile==0.14.0",
                "lilcom==1.8.2",
                "urllib3==2.5.0",
                "requests==2.34.2",
                "librosa==0.11.0",
            ),
            TORCH,
        ),
        "transformers": Environment(
            ("transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0", "deepspeed==0.19.8", "numpy==2.4.6"),
            TORCH,
        ),
        "datatrove": Environment(("datatrove[io,processing]==0.10.1", "tokenizers==0.23.3", "spacy==3.8.18")),
    }
)


class PeerUnavailable(Exception):
    """The environment of a peer cannot be made; the message says why."""


def home() -> Path:
    """Where environments, inputs and working files lie; all of it can be removed at any time."""
    return Path(os.environ.get("MMLM_BENCH") or Path.home() / ".cache" / "mmlm-bench").expanduser()


def interpreter(name: str) -> str:
    """The Python of the environment of peer `name`, made now if it is not there. Raises PeerUnavailable."""
    wanted = PEERS[name]
    key = hashlib.sha256(repr((wanted, sys.version_info[:2])).encode()).hexdigest()[:8]
    folder = home() / "environments" / f"{name}-{key}"
    python = folder / "bin" / "python"
    if (folder / READY).is_file():
        return str(python)
    print(f"making the environment of {name} in {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        _run([sys.executable, "-m", "venv", str(folder)])
        for requirements in (wanted.first, wanted.first + wanted.requirements):
            if requirements:
                _run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *requirements])
        frozen = _run([str(python), "-m", "pip", "freeze"])
    except (OSError, PeerUnavailable) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise PeerUnavailable(f"{name} cannot be installed: {error}") from None
    (folder / READY).write_text(f"{wanted}\n{frozen}")
    return str(python)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise PeerUnavailable(lines[-1] if lines else f"{command[0]} ended with {done.returncode}")
    return done.stdout
