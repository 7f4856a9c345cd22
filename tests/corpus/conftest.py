"""A fixture that scans what a test wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.scan import scan
from tests.corpus.samples import Scan, Scanned


@pytest.fixture
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    """scanned(data, source, ...) → the manifest of one source, with a wide error budget unless said otherwise."""

    def make(data: Path, *sources: dict[str, Any], **settings: Any) -> Scanned:
        config = parse(ScanConfig, {"error_budget": 1.0, **settings, "sources": list(sources)}, "test")
        return Scanned(scan(config, data=data, out=tmp_path_factory.mktemp("manifest") / "m"))

    return make
