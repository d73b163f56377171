"""`[model.lora]`: PEFT's adapters on a model, their merged weights, and their folder."""
