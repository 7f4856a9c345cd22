"""Ours against peers, side by side in one run: `python -m benchmarks.NAME --json FILE`. See docs/benchmarks.md.

`sharding` (speed against other tools), `plan_scale` (planning up to 1e8 records); `harness`, `ours`, `peers` belong to them.
"""
