"""Definitions: what Dagster loads. The story is MMLM_STORY (default demo)."""

from __future__ import annotations

import dagster as dg

from pipelines.assets import story_assets
from pipelines.checks import good_enough
from pipelines.resources import StoryRun, from_environment
from pipelines.schedules import every_night, new_files, whole_story


def define(run: StoryRun) -> dg.Definitions:
    """The workflow of one story."""
    return dg.Definitions(
        assets=story_assets(run.load()),
        asset_checks=[good_enough],
        jobs=[whole_story],
        schedules=[every_night],
        sensors=[new_files],
        resources={"run": run},
        executor=dg.in_process_executor,
    )


definitions = define(from_environment())
