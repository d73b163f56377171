"""The C++ packer beside simpler packers. Run `pytest benchmarks/packing`."""
