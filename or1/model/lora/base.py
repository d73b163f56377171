"""The identity of a base model: adapters are a difference, so they are worth nothing on other weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from or1.model.folder import weight_files

# Files up to this size are read whole. Of larger ones a sample is read: other weights of the same architecture differ
# almost everywhere, and 15 GB would take a minute of every start.
_WHOLE = 64 << 20
_PIECES, _PIECE = 64, 256 << 10


def base_fingerprint(path: str) -> str:
    """Return a sha256 of the weights of a checkpoint: of small files whole, of large ones sizes and 64 samples.

    path  a folder, or a hub id in the cache. Names and places of the files do not count
    """
    digest = hashlib.sha256()
    for file in weight_files(path):
        digest.update(_of_file(file))
    return digest.hexdigest()


def _of_file(file: Path) -> bytes:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as handle:
        if size <= _WHOLE:
            while piece := handle.read(1 << 20):
                digest.update(piece)
            return digest.digest()
        for number in range(_PIECES):
            handle.seek(number * (size - _PIECE) // (_PIECES - 1))
            digest.update(handle.read(_PIECE))
    return digest.digest()
