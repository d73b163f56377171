"""Bytes that autograd saves for a packed row, tensor by tensor, and the temporaries of a layer's backward.

The counts follow transformers' Llama, Qwen2 and Qwen3 layers with or1's packed attention.
tests/plan/test_memory.py compares the counts with the tensors that such models save.
"""

# Per token: H hidden, I intermediate, Q width of all query heads, K width of all key heads, e bytes of a scalar

from __future__ import annotations

from dataclasses import dataclass

from or1.plan.choices import Choices
from or1.plan.shapes import ModelShape

_INDEX = 8


@dataclass(frozen=True)
class Activations:
    """Bytes of a packed row.

    saved      on the device, from forward to backward
    host       in host memory
    layer      saved while one checkpointed layer is recomputed; 0 without checkpointing
    transient  gradients and temporaries of one layer's backward
    final      the last hidden states, which the head reads
    """

    saved: int
    host: int
    layer: int
    transient: int
    final: int

    @property
    def backward(self) -> int:
        """Peak during the backward pass of the layers."""
        return self.saved + self.layer + self.transient


def activations(shape: ModelShape, choices: Choices, tokens: int) -> Activations:
    """Return the activations of a packed row of `tokens` tokens."""
    e, h = choices.weight, shape.hidden
    inputs = e * h * tokens
    layer = layer_saved(shape, choices, tokens)
    outside = _outside(shape, choices, tokens)
    transient = _transient(shape, choices, tokens)
    if choices.checkpointing == "none":
        saved = shape.layers * layer + outside
        return Activations(saved=saved, host=0, layer=0, transient=transient, final=inputs)
    if choices.checkpointing == "selective":
        # The outputs of attention are there from the first forward on, so a layer that runs again saves the rest.
        kept = tokens * _attention_output(shape, choices)
        saved = shape.layers * (inputs + kept) + outside
        return Activations(saved=saved, host=0, layer=layer - kept, transient=transient, final=inputs)
    if choices.checkpointing == "offload" and choices.attention != "sdpa":
        # Two layer inputs are on the device: the current one, and the next one in transfer.
        saved, host = 2 * inputs + outside, shape.layers * inputs
    else:
        saved, host = shape.layers * inputs + outside, 0
    return Activations(saved=saved, host=host, layer=layer, transient=transient, final=inputs)


def layer_saved(shape: ModelShape, choices: Choices, tokens: int) -> int:
    """Return the bytes that one layer saves for its backward."""
    e, h, q, k = choices.weight, shape.hidden, shape.q_width, shape.kv_width
    norms = 2 * (_norm(h, 1, choices) + e * h)
    if shape.qk_norm:
        norms += _norm(q, shape.heads, choices) + _norm(k, shape.kv_heads, choices)
    own = 0 if choices.adapters is None else e * choices.adapters.saved_per_token(shape)
    return tokens * (norms + _attention(shape, choices) + own) + _mlp(shape, choices, tokens)


def _norm(width: int, groups: int, choices: Choices) -> int:
    """Return the bytes per token that an RMSNorm saves, without its output, which the next linear layer saves."""
    e = choices.weight
    if choices.liger:
        return e * width + 4 * groups
    # The input in fp32, the reciprocal root mean square, and the normalised input in the dtype of the weights.
    return 4 * width + 4 * groups + e * width


def _attention(shape: ModelShape, choices: Choices) -> int:
    """Return the bytes per token of queries, keys, values, output and its log-sum-exp."""
    e, q, k = choices.weight, shape.q_width, shape.kv_width
    kernel = e * (q + 2 * k) + _attention_output(shape, choices)
    # SDPA's output is padded by document. Unpadding saves a second copy and an index.
    return kernel if choices.attention != "sdpa" else kernel + 2 * e * q + _INDEX


def _attention_output(shape: ModelShape, choices: Choices) -> int:
    """Return the bytes per token of attention's output and its log-sum-exp."""
    return choices.weight * shape.q_width + 4 * shape.heads


def _mlp(shape: ModelShape, choices: Choices, tokens: int) -> int:
    if shape.experts is not None:
        return _experts(shape, choices, tokens)
    if 0 < choices.mlp_tile_tokens < tokens:
        return 0  # only the input is saved, which the norm counts as its output
    # gate, up, their product, and silu(gate) if it is a separate kernel.
    return (3 if choices.liger else 4) * choices.weight * shape.intermediate * tokens


def _experts(shape: ModelShape, choices: Choices, tokens: int) -> int:
    """Return the bytes that routing and the chosen experts save. Experts are never tiled."""
    assert shape.experts is not None
    e, copies = choices.weight, shape.experts.active
    # Per token and expert: its input and output, gate and up as one tensor, silu(gate), the product, indices.
    each = e * (2 * shape.hidden + 4 * shape.experts.width) + 3 * _INDEX
    routing = shape.experts.count * (e + 4)
    return tokens * (copies * each + routing)


def _outside(shape: ModelShape, choices: Choices, tokens: int) -> int:
    """Return the bytes outside the layers: token ids, rotary tables (saved by checkpointing too), the last norm."""
    rotary = 2 * choices.weight * shape.head_dim
    return tokens * (_INDEX + rotary + _norm(shape.hidden, 1, choices))


def _transient(shape: ModelShape, choices: Choices, tokens: int) -> int:
    e, h, i = choices.weight, shape.hidden, shape.mlp_width
    tile = choices.mlp_tile_tokens
    tiled = 0 < tile < tokens and shape.experts is None
    wide = min(tile, tokens) if tiled else tokens
    # Gradients of the MLP's wide tensors that exist at once; Liger writes two of them over its saved tensors.
    mlp = (1 if choices.liger else 2) * e * i * wide
    if tiled:
        # The forward of one tile, and the gradients of the weights, which are summed in fp32.
        mlp += (3 if choices.liger else 4) * e * i * wide
        mlp += 3 * h * i * (choices.arithmetic + e) if choices.adapters is None else 0
    if choices.adapters is not None:
        # The product of the adapter's second factor, and the same times its scale.
        mlp += 2 * e * i * wide
    # Gradients of the residual stream and of the MLP's output.
    return mlp + 2 * e * h * tokens
