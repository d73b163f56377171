"""vLLM as the engine: in this process, in one of its own, or on a server; pushes of weights to it."""
