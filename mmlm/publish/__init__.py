"""bundle, register, gate, serve."""
