"""The files of a run directory, and resuming from them."""
