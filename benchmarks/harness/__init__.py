"""What the benchmarks share: environments of peers, inputs made on the spot, timing and rows."""
