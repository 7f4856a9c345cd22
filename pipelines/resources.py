"""The resource of all assets: which story runs, where, and the tracking that its stages share."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field, PrivateAttr

from mmlm import artifacts
from mmlm import story as stories
from mmlm.artifacts import Artifact
from mmlm.errors import Interrupted, MmlmError, explain_os_error
from mmlm.launch.local import choose
from mmlm.storage import local_folder
from mmlm.tracking import Tracker
from mmlm.train.control import number_of
from mmlm.world import apply_quiet_environment


class StoryRun(dg.ConfigurableResource):  # type: ignore[type-arg]
    """A story and its places. One Dagster run is one parent run in MLflow, its stages nested below."""

    story: str = Field(default="demo", description="A built-in story, or the folder of one.")
    out: str | None = Field(default=None, description="Where the nouns go; runs/STORY by default.")
    data: str | None = Field(default=None, description="Where the raw corpora lie.")
    overrides: list[str] = Field(default=[], description="verb.key=value, as with --set.")
    tracking_uri: str | None = Field(default=None, description="MLflow; sqlite in runs/ by default.")
    ranks: int | None = Field(default=None, description="Training processes; one a GPU, or 2 on a CPU.")
    workers: int | None = Field(default=None, description="Processes that make shards.")
    threshold: float | None = Field(default=None, description="Least headline score of a model that may be registered.")

    _tracker: Any = PrivateAttr(None)
    _error: BaseException | None = PrivateAttr(None)

    @contextlib.contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[StoryRun]:
        """Tracking is opened at the first stage that needs it and closed when the Dagster run ends."""
        try:
            yield self
        finally:
            if self._tracker is not None:
                self._tracker.close(self._error)

    def load(self) -> stories.Story:
        return stories.load(self.story, self.overrides)

    def folder(self, story: stories.Story) -> Path:
        return (local_folder(self.out) if self.out else Path("runs") / story.name).resolve()

    def noun(self, verb: str) -> Artifact:
        """The noun that `verb` made. Raises ArtifactError when it is not there."""
        return artifacts.read(self.folder(self.load()) / stories.NOUNS[verb], stories.KINDS[verb])

    def perform(self, verb: str) -> Artifact:
        """Run one verb as `mmlm run` does. An error that a person can mend becomes a Failure with its sentence; any other, and
        the end of the run by Dagster, goes on as it is, and the parent run in MLflow ends as what it was."""
        apply_quiet_environment()
        try:
            story = self.load()
            places = self._places(story)
            made: Artifact = stories.settle(lambda: stories.perform(story, verb, places)[0])
            return made
        except BaseException as error:
            self._error = error
            told = explain_os_error(error) if isinstance(error, OSError) else error
            if not isinstance(told, MmlmError):
                raise
            again = told.exit_code == Interrupted.exit_code  # the same stage goes on where it was
            raise dg.Failure(str(told), metadata={"kind": type(told).__name__}, allow_retries=again) from None

    def _places(self, story: stories.Story) -> stories.Places:
        out = self.folder(story)
        out.mkdir(parents=True, exist_ok=True)
        if self._tracker is None:
            self._tracker = Tracker.start(self.tracking_uri, story=story.name, out=out)
        return stories.Places(
            out=out,
            data=stories.data_folder(story, self.data, out),
            launch=choose(self.ranks),
            tracker=self._tracker,
            tracking_uri=self._tracker.uri,
            workers=self.workers,
        )


def from_environment() -> StoryRun:
    """The run that MMLM_STORY, MMLM_OUT, MMLM_DATA, MMLM_SET, MMLM_THRESHOLD and MLFLOW_TRACKING_URI describe.

    Raises ConfigError when MMLM_THRESHOLD is no number.
    """
    env = os.environ
    return StoryRun(
        story=env.get("MMLM_STORY", "demo"),
        out=env.get("MMLM_OUT"),
        data=env.get("MMLM_DATA"),
        overrides=shlex.split(env.get("MMLM_SET", "")),
        tracking_uri=env.get("MLFLOW_TRACKING_URI"),
        threshold=number_of("MMLM_THRESHOLD") if env.get("MMLM_THRESHOLD") else None,
    )
