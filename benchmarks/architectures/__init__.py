"""Architectures of transformers that or1 trains. Run `python -m benchmarks.architectures > docs/models.md`."""
