"""A rehearsal of the CUDA paths without a GPU: fake CUDA tensors. Run `python -m benchmarks.gpu OUT_DIR --fake`."""
