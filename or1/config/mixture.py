"""Names of `or1 data build`, for its parser, which imports no library."""

SCREENS = ("url", "figure", "proof", "choice", "no_reference")
"""Reasons that `--allow` turns off; the last is that of a programming problem without a reference program."""
