"""The shard sets of a search: where trials differ in settings of their data, each distinct combination has one of its own.

They lie below `search/data/`, each in a folder named after its settings, and are made by the ordinary verbs, so that a
set that is there is not made again and one that was begun goes on. Sets that differ in `shard` alone share a manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmlm import story as stories
from mmlm.artifacts import Artifact, ArtifactConflict
from mmlm.config import identity
from mmlm.corpus.config import KeypadSource, ScanConfig
from mmlm.corpus.scan import listing
from mmlm.errors import ConfigError, DataError
from mmlm.features.text import FILE as TOKENIZER
from mmlm.progress import Progress, tell
from mmlm.search_space import TrialSettings
from mmlm.storage import sha256_file, sha256_json
from mmlm.story import Places, Story
from mmlm.train.config import TrainConfig

FOLDER = "data"
"""Of the sets, below the search's."""


@dataclasses.dataclass(frozen=True)
class DataSets:
    """What makes them. `search`: the folder of the search; `child` gives the tracking of a set, by the title of its run and
    its folder."""

    story: Story
    places: Places
    search: Path
    child: Callable[[str, Path], Any]

    def corpora(self, trials: Iterable[TrialSettings]) -> dict[str, str]:
        """What lies in the raw corpora now, for each settings of `scan`: by it a search knows what it was made of.

        Raises DataError where none of them can be read; where some cannot, that is left to their trials.
        """
        found, errors = dict[str, str](), list[DataError]()
        for trial in trials:
            name = _name_of_scan(trial.scan)
            if name in found:
                continue
            try:
                found[name] = listing(trial.scan, self.places.data)
            except DataError as error:
                errors.append(error)
                found[name] = "unreadable"
        if len(errors) == len(found):
            raise errors[0]
        return found

    def make(self, trials: Mapping[int, TrialSettings]) -> Iterator[tuple[list[int], Artifact | str]]:
        """The shard set of each combination, or why it cannot be made, with the numbers of its trials."""
        groups: dict[str, list[int]] = {}
        for number in sorted(trials):
            groups.setdefault(trials[number].data_identity, []).append(number)
        for at, numbers in enumerate(groups.values(), start=1):
            trial = trials[numbers[0]]
            named = ", ".join(f"{key}={value}" for key, value in trial.of_data.items())
            if not Progress.quiet:
                tell(f"data {at} of {len(groups)}: {named}")
            made: Artifact | str
            try:
                made = self._shards(trial)
            except (ConfigError, DataError) as error:
                tell(f"data {at} of {len(groups)} cannot be made, its trials fail: {error}")
                made = str(error)
            yield numbers, made

    def _shards(self, trial: TrialSettings) -> Artifact:
        """The story's own set where it has these settings, else one below `search`."""
        manifest, data = self._manifest(trial)
        beside = self.places.out / stories.NOUNS["scan"] == manifest.path
        if beside and identity(trial.shard) == identity(self.story.shard):
            with contextlib.suppress(ArtifactConflict):  # what other settings made there stays
                return stories.perform(self.story, "shard", self.places)[0]
        return self._perform(trial, "shard", trial.data_identity[:12], manifest=manifest.path, data=data)

    def _manifest(self, trial: TrialSettings) -> tuple[Artifact, Path | str]:
        """Likewise; and where the raw corpora lie that it names."""
        if identity(trial.scan) == identity(self.story.scan):
            with contextlib.suppress(ArtifactConflict):
                return stories.perform(self.story, "scan", self.places)[0], self.places.data
        name = _name_of_scan(trial.scan)
        data = self._raw(trial.scan, self.search / FOLDER / name)
        return self._perform(trial, "scan", name, data=data), data

    def _perform(self, trial: TrialSettings, verb: str, name: str, **places: Any) -> Artifact:
        """The noun of `verb` in the folder `name` of the sets. What an older version made there is set aside."""
        out = self._place(name)
        story = dataclasses.replace(self.story, scan=trial.scan, shard=trial.shard)
        there = dataclasses.replace(self.places, out=out, tracker=self.child(f"{verb}-{name}", out), **places)
        made: Artifact = stories.settle(functools.partial(stories.perform, story, verb, there))[0]
        return made

    def _place(self, name: str) -> Path:
        """The folder of a set. One that a search left which was set aside since is taken over: it need not be made again
        because other trials, or another metric, are asked for."""
        place = self.search / FOLDER / name
        left = list(self.search.parent.glob(f".aside/{self.search.name}-*/{FOLDER}/{name}"))
        if left and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            max(left, key=lambda path: len(list(path.glob("*/artifact.json")))).rename(place)
        return place

    def _raw(self, scan: ScanConfig, place: Path) -> Path | str:
        """Where the raw corpora of a set lie: the built-in one is written for its settings, and the story's stays as it is."""
        built_in = [source for source in scan.sources if isinstance(source, KeypadSource)]
        there = [source for source in self.story.scan.sources if isinstance(source, KeypadSource)]
        if not built_in or (built_in, scan.split) == (there, self.story.scan.split):
            return self.places.data
        if len(built_in) < len(scan.sources):
            raise ConfigError(
                "another keypad corpus, or another split of it, beside other sources",
                wanted="settings of scan that leave the keypad corpus as it is",
                cure="search them in a story without it",
            )
        return place / "raw"


def _name_of_scan(scan: ScanConfig) -> str:
    return sha256_json({"scan": identity(scan)})[:12]


def tell_differences(sets: Iterable[Artifact], metric: str, trials: Iterable[TrialSettings]) -> None:
    """Say so where the sets do not hold the same records, for no metric is of the same ones then; or where, for a metric in
    nats per token, one of them kept the tokenizer of an earlier set."""
    made = {each.path: each for each in sets}
    found = {(each.parents["manifest"], each.counts["samples"]) for each in made.values()}
    if len(found) > 1:
        least, *_, most = sorted(count for _, count in found)
        counted = f"{least:,} to {most:,} samples" if least < most else "in the same splits"
        tell(
            f"the shard sets do not hold the same records ({counted}): "
            "trials are compared by what they score on other ones, too"
        )
    same = len({sha256_file(path / TOKENIZER) for path in made}) < 2
    if not same and any(_per_token(metric, trial.train) for trial in trials):
        tell(
            f"the shard sets do not have the same tokenizer, and {metric} is in nats per token: "
            "give all of them one (shard.features.tokenizer.file), or another --metric"
        )


def require_comparable(metric: str, trials: Iterable[TrialSettings]) -> None:
    """Raises ConfigError where `metric` is in nats per token and the trials do not all have the same tokenizer."""
    trials = list(trials)
    if len({_tokens(trial) for trial in trials}) < 2 or not any(_per_token(metric, trial.train) for trial in trials):
        return
    raise ConfigError(
        f"the trials have other tokens, and {metric} is in nats per token: it says nothing of which one is better",
        wanted="a metric that is not, such as val/label_accuracy or val/loss_label",
        cure="--metric val/label_accuracy --mode max --set train.validation.every=100; or give all of them one tokenizer "
        "(shard.features.tokenizer.file)",
    )


def _tokens(trial: TrialSettings) -> str:
    """Of what its tokenizer is made: one that is trained depends on the records, too."""
    tokenizer = trial.shard.features.tokenizer
    records = None if tokenizer.file else identity(trial.scan)
    return sha256_json({"tokenizer": identity(tokenizer), "records": records})


def _per_token(metric: str, train: TrainConfig) -> bool:
    name = metric.removeprefix("val/")
    name = train.validation.metric if name == "best" else name
    if name == "loss":  # the sum of all terms
        return bool(train.loss.answer or train.loss.z)
    return name in ("loss_answer", "loss_z") or name.startswith("loss_given/")
