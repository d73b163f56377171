"""Idle ranks of a rollout: dealt before lengths are known, and taken by demand."""
