"""What a run will need and how long a step will take, before any weight is loaded: `or1 plan`.

Arithmetic on the shapes in config.json; no torch, so that it answers at once. Memory is counted from what the code
allocates and held to real tensors by tests/unit/test_plan_memory.py; times rest on the stated shares of a device's peak
(`devices.Efficiency`) and are as good as those.
"""
