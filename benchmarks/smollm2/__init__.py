"""Learning curves of the runs of examples/smollm2."""
