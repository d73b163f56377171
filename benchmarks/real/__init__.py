"""Inputs of a real model: hidden states on real text and on its own responses, and what they say of the head."""
