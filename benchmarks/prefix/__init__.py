"""Shared prompts: from which prompt length on sharing is faster. Run `python -m benchmarks.prefix OUT_DIR`."""
