"""The LM head beside its peers: time, memory and error. Run `pytest benchmarks/head`."""
