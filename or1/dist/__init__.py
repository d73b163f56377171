"""Ranks and shards, and what happens when one of them fails; the one place of raw collectives."""
