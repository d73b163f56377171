"""or1: a performance-first RL trainer for long chain-of-thought reasoning models with verifiable rewards."""

__version__ = "0.1.0"
