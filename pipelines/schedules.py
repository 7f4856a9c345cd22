"""When a story runs by itself: every night, and when its raw data change."""

from __future__ import annotations

import os
from pathlib import Path

import dagster as dg

from mmlm import remote
from mmlm.storage import sha256_json
from mmlm.story import data_folder
from pipelines.resources import StoryRun

whole_story = dg.define_asset_job(
    "whole_story",
    selection=dg.AssetSelection.all(),
    executor_def=dg.in_process_executor,  # the stages start their own processes; one more import per step gains nothing
    description="All stages of the story in order; what is already there is left untouched.",
)

every_night = dg.ScheduleDefinition(
    name="every_night",
    job=whole_story,
    cron_schedule=os.environ.get("MMLM_CRON", "0 2 * * *"),
    description="The whole story at 02:00 (MMLM_CRON says otherwise). Turn it on in the page.",
)

_Status = dg.DagsterRunStatus
GOING = [_Status.QUEUED, _Status.NOT_STARTED, _Status.STARTING, _Status.STARTED, _Status.CANCELING]
"""Of a run that has not ended."""


@dg.sensor(
    job=whole_story, minimum_interval_seconds=60, description="A run whenever files of the raw data come or change."
)
def new_files(context: dg.SensorEvaluationContext, run: StoryRun) -> dg.SensorResult | dg.SkipReason:
    """The first look only remembers what is there. While a run is going, nothing is asked for, and nothing remembered: it may
    have looked before the last file came, and two at once would be in each other's way."""
    going = context.instance.get_runs(dg.RunsFilter(job_name=whole_story.name, statuses=GOING), limit=1)
    if going:
        return dg.SkipReason(f"run {going[0].run_id[:8]} is going; looked at again afterwards")
    story = run.load()
    folder = data_folder(story, run.data, run.folder(story))
    if isinstance(folder, Path) and not folder.is_dir():
        return dg.SkipReason(f"there is no {folder} yet")
    seen = listing(folder)
    if context.cursor == seen:
        return dg.SkipReason("nothing new")
    requests = [dg.RunRequest(run_key=seen)] if context.cursor else []
    return dg.SensorResult(run_requests=requests, cursor=seen)


def listing(folder: Path | str) -> str:
    """Hash of names, sizes and times (elsewhere: versions) of all files below `folder`, which may be an address."""
    if isinstance(folder, str):
        found = remote.below(folder.rstrip("/") + "/")
        return sha256_json([(uri, told.size, told.version) for uri in found for told in [remote.known(uri)]])
    return sha256_json(
        sorted(
            (str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns)
            for p in folder.rglob("*")
            if p.is_file()
        )
    )
