"""Packed rows in, hidden states out: loading, rows, attention, memory and export of the policy."""
