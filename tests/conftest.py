"""Small real nouns that several tests read; made once a session by the verbs themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmlm.artifacts import Artifact
from mmlm.world import apply_quiet_environment

apply_quiet_environment()


@pytest.fixture(scope="session")
def keypad_manifest(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """160 digits of the keypad corpus, scanned; the raw files lie in `raw` beside the manifest."""
    from mmlm.config import parse
    from mmlm.corpus.config import ScanConfig
    from mmlm.corpus.scan import scan

    out = tmp_path_factory.mktemp("keypad")
    config = {"sources": [{"kind": "keypad", "images": 160, "renderings": 2, "renderings_held_out": 1}]}
    config["split"] = {"val": 0.1, "test": 0.2}  # type: ignore[assignment]
    return scan(parse(ScanConfig, config, "test"), data=out / "raw", out=out / "manifest", tracker=None)


@pytest.fixture(scope="session")
def keypad_shards(keypad_manifest: Artifact) -> Artifact:
    """The same, sharded in this process."""
    from mmlm.config import parse
    from mmlm.shards.config import ShardConfig
    from mmlm.shards.shard import shard

    out: Path = keypad_manifest.path.parent
    features = {
        "tokenizer": {"vocab_size": 320},
        "max_len": 96,
        "image": {"size": 16, "patch": 8, "channels": 1},
        "audio": {"max_seconds": 0.8, "n_mels": 40},
    }
    config = parse(ShardConfig, {"features": features, "shard_records": 100, "ray_from": 10**9}, "test")
    return shard(config, keypad_manifest, data=out / "raw", out=out / "shards", workers=1, tracker=None)
