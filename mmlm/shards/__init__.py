"""Manifest → ShardSet: plan, write, commit, verify; the Ray fan-out."""
