"""The whole training step beside its peers. Run `python -m benchmarks.step OUT_DIR`."""
