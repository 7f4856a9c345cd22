"""Plans the manifest in a folder (argument 1) after a warm-up on another one (argument 2); tells time and memory as JSON.

In a process of its own, so that the peak of memory is that of planning and nothing else.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from mmlm.features.config import FeaturesConfig
from mmlm.features.spec import FeatureSpec, ImageSpec, TaskSpec
from mmlm.shards.config import ShardConfig
from mmlm.shards.plan import plan


def main() -> None:
    image = ImageSpec(size=64, patch=16, channels=3)
    config = ShardConfig(features=FeaturesConfig(image=image))
    spec = FeatureSpec(
        vocab_size=16_384, tokenizer_digest="0" * 64, max_len=256, image=image, tasks=[TaskSpec(name="answer")]
    )
    plan(Path(sys.argv[2]), config, spec)
    before = _peak()
    cpu, start = time.process_time(), time.perf_counter()
    slots = plan(Path(sys.argv[1]), config, spec)
    told = {
        "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "slots": len(slots),
        "records": sum(slot.records for slot in slots), "peak_mb": _peak(), "before_mb": before,
    }  # fmt: skip
    print(json.dumps(told))


def _peak() -> float:
    """The most memory that this process has had so far, MB (2^20 bytes). getrusage would count that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) / 1024


if __name__ == "__main__":
    main()
