"""transformers' search for packed sequences, which is left out where or1 has the layout of the row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers import masking_utils

_left_out: ContextVar[bool] = ContextVar("or1_mask_check_left_out", default=False)
_search: Any = masking_utils.find_packed_sequence_indices


def _find(position_ids: Any) -> Any:
    return None if _left_out.get() else _search(position_ids)


# Models call the function through its module.
masking_utils.find_packed_sequence_indices = _find


@contextmanager
def without_mask_check() -> Iterator[None]:
    """Leave out the search within the block. or1's attention ignores masks, and the search makes the host wait."""
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)
