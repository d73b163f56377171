"""All GPU checks in one command. Run `python -m benchmarks.gpu OUT_DIR`."""
