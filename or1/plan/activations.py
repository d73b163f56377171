"""Bytes that autograd keeps of a packed row, tensor by tensor, and what a layer's backward needs besides.

Follows transformers' Llama, Qwen2 and Qwen3 layers with or1's packed attention; tests/unit/test_plan_memory.py counts
the tensors that such models really save.
"""

# Per token: H hidden, I intermediate, Q width of all query heads, K width of all key heads, e bytes of a scalar

from __future__ import annotations

from dataclasses import dataclass

from or1.plan.choices import Choices
from or1.plan.shapes import ModelShape

_INDEX = 8


@dataclass(frozen=True)
class Activations:
    """Bytes of a packed row. saved: kept on the device from forward to backward; host: kept in host memory.

    layer: what recomputing one checkpointed layer keeps, 0 without checkpointing. transient: gradients and temporaries
    of one layer's backward. final: the last hidden states, which the head reads.
    """

    saved: int
    host: int
    layer: int
    transient: int
    final: int

    @property
    def backward(self) -> int:
        """Peak while layers run backward."""
        return self.saved + self.layer + self.transient


def activations(shape: ModelShape, choices: Choices, tokens: int) -> Activations:
    """The activations of a packed row of `tokens` tokens."""
    e, h = choices.weight, shape.hidden
    inputs = e * h * tokens
    layer = layer_saved(shape, choices, tokens)
    outside = _outside(shape, choices, tokens)
    transient = _transient(shape, choices, tokens)
    if choices.checkpointing == "none":
        return Activations(shape.layers * layer + outside, 0, 0, transient, inputs)
    if choices.checkpointing == "offload" and choices.attention != "sdpa":
        # Two on the device: the one in use and the one on its way.
        return Activations(2 * inputs + outside, shape.layers * inputs, layer, transient, inputs)
    return Activations(shape.layers * inputs + outside, 0, layer, transient, inputs)


def layer_saved(shape: ModelShape, choices: Choices, tokens: int) -> int:
    """Bytes that one layer saves for its backward."""
    e, h, q, k = choices.weight, shape.hidden, shape.q_width, shape.kv_width
    norms = 2 * (_norm(h, 1, choices) + e * h)
    if shape.qk_norm:
        norms += _norm(q, shape.heads, choices) + _norm(k, shape.kv_heads, choices)
    return tokens * (norms + _attention(shape, choices)) + _mlp(shape, choices, tokens)


def _norm(width: int, groups: int, choices: Choices) -> int:
    """A token's share of what an RMSNorm keeps, its output left out: the linear that reads it keeps that."""
    e = choices.weight
    if choices.liger:
        return e * width + 4 * groups
    # The input in fp32, the reciprocal root mean square, and the normalised input in the weights' type.
    return 4 * width + 4 * groups + e * width


def _attention(shape: ModelShape, choices: Choices) -> int:
    """A token's share of queries, keys, values, output and its log-sum-exp."""
    e, q, k = choices.weight, shape.q_width, shape.kv_width
    kernel = e * (2 * q + 2 * k) + 4 * shape.heads
    # SDPA's output is padded by document; putting it back saves it once more, and an index.
    return kernel if choices.attention != "sdpa" else kernel + 2 * e * q + _INDEX


def _mlp(shape: ModelShape, choices: Choices, tokens: int) -> int:
    if 0 < choices.mlp_tile_tokens < tokens:
        return 0  # its input alone, which is the norm's output
    # gate, up, their product, and silu(gate) where it is a step of its own.
    return (3 if choices.liger else 4) * choices.weight * shape.intermediate * tokens


def _outside(shape: ModelShape, choices: Choices, tokens: int) -> int:
    """Token ids, the rotary tables (which checkpoints hold too), the last norm."""
    rotary = 2 * choices.weight * shape.head_dim
    return tokens * (_INDEX + rotary + _norm(shape.hidden, 1, choices))


def _transient(shape: ModelShape, choices: Choices, tokens: int) -> int:
    e, h, i = choices.weight, shape.hidden, shape.intermediate
    tile = choices.mlp_tile_tokens
    tiled = 0 < tile < tokens
    wide = min(tile, tokens) if tiled else tokens
    # Gradients of the MLP's wide tensors, less what its last linear has freed; Liger writes two over what it saved.
    mlp = (1 if choices.liger else 2) * e * i * wide
    if tiled:
        # A tile's own forward, and its weights' gradients, which are summed in fp32.
        mlp += (3 if choices.liger else 4) * e * i * wide + 3 * h * i * (choices.arithmetic + e)
    # Gradients of the residual stream and of the MLP's output.
    return mlp + 2 * e * h * tokens
