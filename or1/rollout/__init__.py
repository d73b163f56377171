"""Generation engines: what samples responses, and with which weights."""

from or1.rollout.make import make_engine, serve

__all__ = ["make_engine", "serve"]
