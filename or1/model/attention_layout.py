"""The layout of a packed row, as attention needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from or1.model.rows import Microbatch


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Boundaries of the documents of a packed row.

    cu_q, cu_k    i32[S+1], cumulative query and key counts of the documents, from 0
    max_q, max_k  largest query and key count of a document
    kv_rows_U     i64[U], packed rows of all keys; None: every document's keys are its own tokens
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    kv_rows_U: Tensor | None = None

    @classmethod
    def of(cls, row: Microbatch) -> Layout:
        """Return the layout of a packed row."""
        return cls(
            cu_q=row.cu_seqlens, cu_k=row.cu_keys, max_q=row.max_seqlen, max_k=row.max_keys, kv_rows_U=row.kv_rows_U
        )

    def as_kwargs(self) -> dict[str, object]:
        """Return keyword arguments for a transformers decoder, which passes them to its attention."""
        return {
            "cu_seq_lens_q": self.cu_q,
            "cu_seq_lens_k": self.cu_k,
            "max_length_q": self.max_q,
            "max_length_k": self.max_k,
            "kv_rows": self.kv_rows_U,
        }

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> Layout:
        """Return the layout that `as_kwargs` has put among the keyword arguments of an attention call."""
        return cls(
            cu_q=kwargs["cu_seq_lens_q"],
            cu_k=kwargs["cu_seq_lens_k"],
            max_q=kwargs["max_length_q"],
            max_k=kwargs["max_length_k"],
            kv_rows_U=kwargs.get("kv_rows"),
        )
