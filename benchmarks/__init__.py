"""Benchmarks of the LM head, its row passes and the packer, beside their peers: `pytest benchmarks/`.

`python -m benchmarks.gpu OUT_DIR` runs everything that needs a GPU and writes one JSON file a part.
"""
