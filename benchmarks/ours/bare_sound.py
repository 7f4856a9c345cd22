"""soundfile and our log-mel alone: read, decode, transform, nothing written. The ceiling for sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.clock import Watch, contest, files
from mmlm.features.audio import log_mel
from mmlm.features.spec import AudioSpec


def work(source: Path, out: Path, options: dict[str, Any], watch: Watch) -> dict[str, Any]:
    import soundfile

    found, spec, seconds = files(source, f".{options['ending']}"), AudioSpec(n_mels=80), 0.0
    with watch.lap("work"):
        for path in found:
            with soundfile.SoundFile(path) as sound:
                seconds += sound.frames / sound.samplerate
                log_mel(sound.read(dtype="float32"), spec)
    return {"items": len(found), "audio_seconds": seconds}


if __name__ == "__main__":
    contest(work)
