"""Speed of the rewards. Run `python -m benchmarks.rewards OUT_DIR`."""
