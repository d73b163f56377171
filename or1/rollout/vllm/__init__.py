"""vLLM as an engine: inside the trainer's process, or as a server."""
