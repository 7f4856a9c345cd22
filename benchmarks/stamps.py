"""The stamps corpus: which category, from what is given; and picture, sound and caption finding each other.

`python -m benchmarks.stamps --data DIR --out DIR [--seconds 220] [--json FILE]`, where `--data` holds `stamps/`, as that of
`mmlm run stamps` does. Works for about `--seconds` at a time and goes on where it stopped when the same command is given
again; with everything done it prints the tables. About 12 minutes of one core.

Folds: five, by group (the same thing drawn twice is never on both sides). One small model a fold answers every set of given
modalities; the majority class and logistic regressions of the same stored features are fitted on the same four fifths,
and of pictures one of their gradient histograms and colours.
Retrieval: one model trained on the corpus' own train and val splits; linear CCA of the same features beside it.
Names: one model that reads names in eleven languages; which of the names of all test things belongs to a picture.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from benchmarks.ours import stamps as ours
from benchmarks.ours.stamps_tables import rows_of, tables


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stamps", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("runs/corpora"), help="where `stamps/manifest.jsonl` lies")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench/stamps"), help="shards, checkpoints and predictions, to go on from"
    )
    parser.add_argument("--seconds", type=float, default=220, help="about how long to work before stopping (220)")
    parser.add_argument(
        "--steps", type=int, default=300, help="steps of a fold (300); the other two models have a third more"
    )
    parser.add_argument("--json", type=Path, help="file for the rows")
    asked = parser.parse_args()
    if not (asked.data / "stamps" / "manifest.jsonl").exists():
        print(
            f"no stamps/manifest.jsonl in {asked.data}: nothing is measured; say where it is with --data",
            file=sys.stderr,
        )
        return 0
    until = time.monotonic() + asked.seconds
    shards = ours.make_shards(asked.data, asked.out)
    names, more = ours.make_names(asked.data, asked.out), asked.steps * 4 // 3
    folds = [(f"fold-{k}", shards, asked.steps) for k in range(ours.FOLDS)]
    for name, read, steps in [*folds, ("retrieval", shards, more), ("names", names, more)]:
        if not ours.train(name, read, asked.out, steps, until):
            print(f"{name} is not done yet: give the same command again to go on", file=sys.stderr)
            return 0
    found = rows_of(tables(shards, names, asked.out))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
