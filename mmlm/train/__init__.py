"""the engine, the objectives, the loop, checkpoints; verb train."""
