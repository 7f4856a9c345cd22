"""lhotse 1.33.0: log-mel features of a CutSet, stored as its docs do: `LilcomChunkyWriter`, or exported to Shar tars.

The recordings' manifest is made before the clock starts, as ours is. torchaudio does not exist for this torch: files are
read by its soundfile backend, which the docs allow.
"""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from pathlib import Path
from typing import Any

from clock import Watch, contest, files


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import torch
    from lhotse import CutSet, Fbank, FbankConfig, LilcomChunkyWriter, Recording, RecordingSet
    from lhotse.features.whisper_fbank import WhisperFbank, WhisperFbankConfig

    torch.set_num_threads(1)
    found = files(source, f".{options['ending']}")
    recordings = RecordingSet.from_recordings(Recording.from_file(path) for path in found)
    cuts = CutSet.from_manifests(recordings=recordings).to_eager()
    if options["extractor"] == "Fbank":
        extractor = Fbank(FbankConfig(sampling_rate=16000, num_mel_bins=80))
    else:
        extractor = WhisperFbank(WhisperFbankConfig(num_filters=80))
    with watch.lap("work"):
        if options["storage"] == "shar":
            (out / "shar").mkdir()
            computed = cuts.map(_Computing(extractor))
            computed.to_shar(str(out / "shar"), fields={"mel": "lilcom"}, shard_size=options["per_shard"])
        else:
            made = cuts.compute_and_store_features(
                extractor=extractor, storage_path=str(out / "features"), num_jobs=1, storage_type=LilcomChunkyWriter
            )
            made.to_file(str(out / "cuts.jsonl.gz"))
    return {"items": len(found), "audio_seconds": float(sum(recording.duration for recording in recordings))}


class _Computing:
    """A cut with its features in memory, ready for `to_shar`."""

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor

    def __call__(self, cut: Any) -> Any:
        features = cut.compute_features(self.extractor)
        return cut.attach_tensor("mel", features, frame_shift=0.01, temporal_dim=0)


if __name__ == "__main__":
    contest(work)
