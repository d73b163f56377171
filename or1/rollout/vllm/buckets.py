"""Weights as a stream of bytes in buckets of fixed size: few messages for a model, and little memory on both sides.

Trainer and server compute the same division from the names, types and shapes of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BUCKET = 512 * 2**20
"""Most bytes of a bucket. A model of 7B in bf16 takes 29 of them."""
_ALIGNED = 256

Form = tuple[str, str, list[int]]
"""Name of a weight, name of its dtype in torch, and its shape."""


class Piece(NamedTuple):
    """A part of a weight in a bucket, in bytes.

    weight  index of the weight
    at      where the part begins in the weight
    start   where the part begins in the bucket
    """

    weight: int
    at: int
    start: int
    size: int


class Bucket(NamedTuple):
    """A bucket: its pieces, in the order of the weights, and its bytes."""

    pieces: list[Piece]
    size: int


def divided(forms: Sequence[Form], limit: int = BUCKET) -> list[Bucket]:
    """Return the buckets of the weights, each of at most `limit` bytes. A larger weight takes several buckets."""
    buckets = [Bucket([], 0)]
    for index, (_, dtype, shape) in enumerate(forms):
        left = total = weight_bytes(dtype, shape)
        while left:
            pieces, used = buckets[-1]
            start = -(-used // _ALIGNED) * _ALIGNED
            if start >= limit:
                buckets.append(Bucket([], 0))
                continue
            size = min(left, limit - start)
            pieces.append(Piece(index, total - left, start, size))
            buckets[-1], left = Bucket(pieces, start + size), left - size
    return [bucket for bucket in buckets if bucket.pieces]


def weight_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a weight."""
    itemsize: int = getattr(torch, dtype).itemsize
    return math.prod(shape) * itemsize


def fill(weights: Iterable[tuple[str, Tensor]], buckets: Sequence[Bucket], space: Tensor) -> Iterator[Tensor]:
    """Yield the content of each bucket in turn, in the same memory; the next one overwrites it.

    weights  in the order of the buckets' forms
    space    u8[bytes of the largest bucket], on any device

    Every weight is taken from the iterator, even after the last bucket: taking a sharded weight is collective.
    """
    waiting = iter(enumerate(buckets))
    index, bucket = next(waiting, (-1, Bucket([], 0)))
    todo = iter(bucket.pieces)
    piece = next(todo, None)
    for number, (_, tensor) in enumerate(weights):
        while piece is not None and piece.weight == number:
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            space[piece.start : piece.start + piece.size].copy_(flat[piece.at : piece.at + piece.size])
            piece = next(todo, None)
            if piece is None:
                yield space[: buckets[index].size]
                index, bucket = next(waiting, (-1, Bucket([], 0)))
                todo = iter(bucket.pieces)
                piece = next(todo, None)


def drain(
    forms: Sequence[Form], buckets: Sequence[Bucket], receive: Callable[[int], Tensor], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights as soon as they are whole, each in memory of its own on `device`.

    receive  returns the content of bucket k, u8[size]; called once for each bucket, in order. What an earlier call
             returned may change with the next call
    """
    known = iter(range(len(buckets)))
    content, todo = torch.empty(0, dtype=torch.uint8), iter(list[Piece]())
    for index, (name, dtype, shape) in enumerate(forms):
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        flat, left = tensor.reshape(-1).view(torch.uint8), weight_bytes(dtype, shape)
        while left:
            piece = next(todo, None)
            if piece is None:
                bucket = next(known)
                content, todo = receive(bucket), iter(buckets[bucket].pieces)
                continue
            if piece.weight != index:
                raise ValueError(f"the weights arrive in another order than {name!r} needs")
            flat[piece.at : piece.at + piece.size].copy_(content[piece.start : piece.start + piece.size])
            left -= piece.size
        yield name, tensor
