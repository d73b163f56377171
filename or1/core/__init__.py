"""What every room speaks: types, errors, atomic files, codecs, faults and text. Imports nothing of or1."""
