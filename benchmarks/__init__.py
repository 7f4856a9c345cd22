"""Ours against peers, side by side in one run: `python -m benchmarks.NAME --json FILE`. None is there yet."""
