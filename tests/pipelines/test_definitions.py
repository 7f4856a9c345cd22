"""The workflow: what Dagster loads, what the blocking check says, and that a failing one stops registration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from mmlm import artifacts
from mmlm.artifacts import Artifact
from mmlm.config import Config
from mmlm.errors import ConfigError, DataError
from mmlm.story import KINDS, NOUNS
from pipelines import resources
from pipelines.assets import score_table
from pipelines.checks import shortcomings
from pipelines.definitions import define
from pipelines.schedules import listing, new_files


def row(value: float) -> dict[str, Any]:
    return {"metric": "accuracy", "modalities": "text+image", "value": value, "low": value - 0.1, "high": value + 0.1}


HEADLINE = {"teacher": {"digit": row(0.9)}, "student": {"digit": row(0.8)}, "majority": {"digit": row(0.2)}}


def test_a_story_is_its_nouns_in_order() -> None:
    graph = define(resources.StoryRun(story="demo")).resolve_asset_graph()
    parents = {
        key.to_user_string(): {p.to_user_string() for p in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }
    assert parents == {
        "manifest": set(),
        "shards": {"manifest"},
        "model": {"shards"},
        "student": {"shards", "model"},
        "report": {"model", "student"},
        "registered": {"student", "report"},
    }


def test_schedule_sensor_and_job_are_there() -> None:
    repository = define(resources.StoryRun(story="demo")).get_repository_def()
    assert [s.name for s in repository.schedule_defs] == ["every_night"]
    assert [s.name for s in repository.sensor_defs] == ["new_files"]
    assert repository.get_job("whole_story")


def test_the_schedule_asks_for_a_run() -> None:
    from pipelines.schedules import every_night

    asked = every_night.evaluate_tick(dg.build_schedule_context())
    assert len(asked.run_requests or []) == 1


def test_what_keeps_a_model_out() -> None:
    assert shortcomings(HEADLINE, "student", None) == []
    assert shortcomings(HEADLINE, "student", 0.8) == []
    assert shortcomings(HEADLINE, "student", 0.81) == ["digit: accuracy 0.800 is below the threshold 0.810"]
    worse = {**HEADLINE, "student": {"digit": row(0.1)}}
    assert "below the majority answer's 0.200" in shortcomings(worse, "student", None)[0]
    assert shortcomings({}, "student", None) == ["the report has no scores of the student"]


def test_the_score_table_is_markdown_with_intervals() -> None:
    lines = score_table(HEADLINE).splitlines()
    assert lines[0] == "| model | digit, accuracy (text+image) |"
    assert "| student | 0.800 [0.700, 0.900] |" in lines


def test_a_changed_file_changes_the_listing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    before = listing(tmp_path)
    assert listing(tmp_path) == before
    (tmp_path / "b.txt").write_text("b")
    assert listing(tmp_path) != before


def test_files_that_come_during_a_run_ask_for_one_afterwards(tmp_path: Path) -> None:
    """Else the run that is asked for meets the one that is going, fails, and the files wait for the next that come."""
    run = resources.StoryRun(story="demo", data=str(tmp_path))
    with dg.DagsterInstance.ephemeral() as instance:

        def look(cursor: str) -> Any:
            with dg.build_sensor_context(instance=instance, cursor=cursor, resources={"run": run}) as context:
                return new_files(context)

        assert len(look("before").run_requests) == 1
        job = define(run).resolve_job_def("whole_story")
        going = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
        waiting = look("before")
        assert isinstance(waiting, dg.SkipReason) and "is going" in str(waiting.skip_message)
        instance.report_run_canceled(going)
        assert len(look("before").run_requests) == 1


def test_an_error_of_the_disk_is_a_sentence_and_the_run_did_not_go_well(tmp_path: Path) -> None:
    (tmp_path / "manifest").write_text("a file in the place of the folder")
    run = resources.StoryRun(story="demo", out=str(tmp_path), tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(dg.Failure, match="is a file, or lies below one"):
        run.perform("scan")
    assert isinstance(run._error, OSError)


def test_a_threshold_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMLM_THRESHOLD", "90%")
    with pytest.raises(ConfigError, match="MMLM_THRESHOLD is '90%'; wanted a number"):
        resources.from_environment()


class Nothing(Config):
    """The config of the small nouns below."""


def small_nouns(out: Path, done: list[str]) -> Callable[..., tuple[Artifact, dict[str, Artifact]]]:
    """In place of the six verbs: each writes its noun, real ones at rest, with the report's headline above."""

    def perform(story: Any, verb: str, places: Any) -> tuple[Artifact, dict[str, Artifact]]:
        done.append(verb)
        if verb == "register":
            raise DataError("the registry was reached")
        work = artifacts.begin(out / NOUNS[verb], KINDS[verb], recipe=1, config=Nothing())
        (work.path / "x").write_text(verb)
        extra = {"headline": HEADLINE} if verb == "evaluate" else None
        return work.artifact or work.finish(counts={"records": 3}, digest_of=["x"], extra=extra), {}

    return perform


@pytest.mark.parametrize(("threshold", "reached"), [(0.95, False), (0.5, True)])
def test_a_failing_check_stops_registration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float, reached: bool
) -> None:
    done: list[str] = []
    monkeypatch.setattr(resources.stories, "perform", small_nouns(tmp_path, done))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = resources.StoryRun(story="demo", out=str(tmp_path), tracking_uri=uri, threshold=threshold)
    with dg.DagsterInstance.ephemeral() as instance:
        result = define(run).resolve_job_def("whole_story").execute_in_process(instance=instance, raise_on_error=False)
        made = [noun for noun in NOUNS.values() if instance.get_latest_materialization_event(dg.AssetKey(noun))]
    assert not result.success
    assert done[:5] == ["scan", "shard", "train", "distill", "evaluate"]
    assert ("register" in done) is reached
    assert made == ["manifest", "shards", "model", "student", "report"]
    check = result.get_asset_check_evaluations()[0]
    assert check.passed is reached
    if reached:  # an error for people arrives as its sentence
        failure = result.failure_data_for_node("registered")
        assert failure is not None
        assert failure.user_failure_data is not None
        assert failure.user_failure_data.description == "the registry was reached"


def test_no_folder_is_made_of_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = resources.StoryRun(story="demo", out="s3://bucket/run")
    with pytest.raises(dg.Failure, match="is an address"):
        run.perform("scan")
    assert not list(tmp_path.iterdir())
