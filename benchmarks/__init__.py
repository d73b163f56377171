"""Benchmarks, one folder a subject; README.md lists commands, minutes and where results go."""
