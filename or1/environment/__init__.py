"""Environments of the package verifiers: tasks, episodes of several turns, and their rewards."""
