"""The verbs of `or1`, one file a verb: parse, call, return the exit code."""
