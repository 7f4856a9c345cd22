"""A corpus for each modality with its undisturbed shards, a cell's stage, and a Ray cluster of two nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import corpus as corpora
from tests.faults.cluster import Cluster
from tests.faults.corpus import Corpus
from tests.faults.stage import Stage


@pytest.fixture(scope="session")
def corpus_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Corpus]:
    return functools.cache(lambda modality: corpora.make(tmp_path_factory.mktemp(modality), modality))


@pytest.fixture
def stage(corpus_of: Callable[[str], Corpus], modality: str, tmp_path: Path) -> Iterator[Stage]:
    made = Stage(corpus_of(modality), tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster.started(tmp_path_factory.mktemp("cluster")) as made:
        yield made
