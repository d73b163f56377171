"""Sampling without training: what `or1 eval` and `or1 filter` share."""
