"""`or1 plan`: memory and time of a run, before any weight is loaded.

The plan is arithmetic on the shapes in config.json, without torch, so that the command answers at once. Memory is
counted from the allocations of the code; tests/plan/test_memory.py compares the counts with real tensors. Times
assume the shares of a device's peak that `devices.Efficiency` states, and are as accurate as these shares.
"""
