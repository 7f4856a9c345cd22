"""One short script for each peer, run by the peer's own interpreter: standard library and the peer, nothing of ours."""
