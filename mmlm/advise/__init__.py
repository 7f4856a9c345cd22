"""which model, what size and what settings, for these data on this machine: `mmlm advise`."""
