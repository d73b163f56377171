"""Shared parts of the benchmarks: timing, tables and files, inputs of the head, imports of peers."""
