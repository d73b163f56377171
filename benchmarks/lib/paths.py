"""Paths of the repository. Imports no torch: the parent process of `benchmarks.gpu` must not hold GPU memory."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
