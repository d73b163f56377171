"""Ranks, sharding, and the handling of failed ranks. The only package with raw collectives."""
