"""The tests of or1 and or1_kernels: one folder a room, and the helpers that they share."""
