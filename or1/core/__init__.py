"""Types, errors, atomic files, codecs, seeds, faults and text. Imports nothing else of or1."""
