"""The calls of the attention libraries, which no machine without a GPU can run, against fakes with real signatures."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from or1.core.errors import AttentionError
from or1.core.types import TrainSequence
from or1.dist.world import World
from or1.model import attention_calls
from or1.model.attention import Layout, packed_attention
from or1.model.boundaries import boundaries as with_host_copy
from or1.model.boundaries import on_host
from or1.model.flash4_operator import flash_attention_4
from or1.model.rows import pack_indexed
from or1.model.slices import my_slice
from or1.model.soft_attention import Scores
from tests.helpers.attention_fakes import FAKES, Calls, fake_varlen_2_11, fake_varlen_2_13, forget, install
from tests.helpers.packed_attention import KEYS, Q_LENS, layout_of, naive, soft_naive

FLASH4 = ["flash4", "flash4 without its backward"]
SOFT = ["flash", "flash3", "flash3 with log-sum-exp", *FLASH4]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget()
    yield
    forget()


def backend_of(fake: str) -> str:
    return fake.split()[0]


def keys_of(shared: bool) -> list:
    return KEYS if shared else list(torch.arange(sum(Q_LENS)).split(Q_LENS))


def drawn(kv_heads: int = 2, width: int = 16) -> tuple[list[Tensor], Tensor]:
    """Return random q, k, v and a weight of the outputs, in bfloat16."""
    inputs = [torch.randn(sum(Q_LENS), heads, width, dtype=torch.bfloat16) for heads in (4, kv_heads, kv_heads)]
    return inputs, torch.randn_like(inputs[0])


def gradients(attend, inputs: list[Tensor], weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the output of `attend` and the gradient of each input."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out, *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)]


def agree(attend, equation, inputs: list[Tensor], weight: Tensor) -> None:
    """Assert that the error against fp64 is at most twice that of the equation in bfloat16, as a root mean square.

    A rounding of the result is allowed besides: the four gradients of sinks are few, and the equation may hit them by
    chance. One token with a wrong key is an error many times as large.
    """
    ours = gradients(attend, inputs, weight, torch.bfloat16)
    truth = gradients(equation, inputs, weight, torch.float64)
    plain = gradients(equation, inputs, weight, torch.bfloat16)
    for our, exact, same_dtype in zip(ours, truth, plain, strict=True):
        assert our.isfinite().all()
        assert (our - exact).norm() <= 2 * (same_dtype - exact).norm() + exact.norm() / 256 + 1e-6


def soft_rows(keys: list, window: int | None, softcap: float | None):
    def equation(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        rows = [torch.as_tensor(r) for r in keys]
        extras = Scores(softcap=softcap, sinks_Q=sinks)
        parts = zip(q.split(Q_LENS), rows, strict=True)
        return torch.cat([soft_naive(x, k[r], v[r], window, extras) for x, r in parts])

    return equation


@pytest.mark.parametrize("fake", FAKES)
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_each_library_is_called_for_attention_per_document(
    fake: str, window: int | None, shared: bool, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, layout, keys = install(fake, monkeypatch), layout_of(shared), keys_of(shared)
    inputs, weight = drawn(kv_heads)
    agree(
        lambda q, k, v: packed_attention(q, k, v, layout, window=window, backend=backend_of(fake)),
        lambda q, k, v: naive(q, k, v, keys, window),
        inputs,
        weight,
    )
    assert len(calls.made) == 1


@pytest.mark.parametrize("fake", SOFT)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_soft_caps_are_computed_by_the_library(
    fake: str, window: int | None, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, layout = install(fake, monkeypatch), layout_of(shared)
    inputs, weight = drawn()
    agree(
        lambda q, k, v: packed_attention(
            q, k, v, layout, window=window, backend=backend_of(fake), scores=Scores(softcap=1.5)
        ),
        soft_rows(keys_of(shared), window, 1.5),
        inputs,
        weight,
    )
    assert [call["softcap"] for call in calls.made] == [1.5]


@pytest.mark.parametrize("fake", FLASH4)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_sinks_are_computed_by_flash_attn_4_with_their_gradient(
    fake: str, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, layout = install(fake, monkeypatch), layout_of(True)
    inputs, weight = drawn()
    agree(
        lambda q, k, v, sinks: packed_attention(
            q, k, v, layout, window=window, backend="flash4", scores=Scores(softcap=softcap, sinks_Q=sinks)
        ),
        soft_rows(KEYS, window, softcap),
        [*inputs, torch.randn(4, dtype=torch.bfloat16)],
        weight,
    )
    assert len(calls.made) == 1


@pytest.mark.parametrize("fake", ["flash", "flash3", "varlen"])
def test_a_call_that_a_kernel_lacks_is_computed_by_another(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, layout = install(fake, monkeypatch), layout_of(False)
    inputs, weight = drawn()
    agree(
        lambda q, k, v, sinks: packed_attention(q, k, v, layout, backend=fake, scores=Scores(sinks_Q=sinks)),
        soft_rows(keys_of(False), None, None),
        [*inputs, torch.randn(4, dtype=torch.bfloat16)],
        weight,
    )
    assert not calls.made


def test_a_checkpointed_layer_can_keep_the_output_of_flash_attn_4(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, layout = install("flash4", monkeypatch), layout_of(True)
    inputs, weight = drawn()

    def contexts():
        return create_selective_checkpoint_contexts([torch.ops.or1.flash_attention_4.default])

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q.sin(), k.sin(), v.sin(), layout, backend="flash4").cos()

    def kept(*leaves: Tensor) -> Tensor:
        return checkpoint(layer, *leaves, use_reentrant=False, context_fn=contexts)

    for ours, plain in zip(
        gradients(kept, inputs, weight, torch.bfloat16), gradients(layer, inputs, weight, torch.bfloat16), strict=True
    ):
        assert torch.equal(ours, plain)
    # One forward in each of the two, none in the backward of the checkpoint.
    assert len(calls.made) == 2


def test_flash_attn_4_has_the_shapes_of_its_results_without_a_gpu() -> None:
    q, k, v = (torch.empty(7, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    out, lse = flash_attention_4(
        q, k, v, None, bounds, bounds, max_q=4, max_k=4, scale=None, window=None, softcap=0.0, deterministic=False
    )
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((4, 7), torch.float32)


def test_windows_are_written_as_each_library_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = drawn()
    wanted = {"flash": (-1, 0), "flash3": (-1, 0), "flash4": (None, None), "varlen": (-1, 0)}
    for backend, none in wanted.items():
        calls = install(backend, monkeypatch)
        for window in (None, 3, 100):
            packed_attention(*inputs, layout_of(False), window=window, backend=backend)
        # A window as long as the longest document is none.
        assert [call["window_size"] for call in calls.made] == [none, (2, 0), none]


@pytest.mark.parametrize("backend", ["flash", "flash3", "flash4"])
def test_the_scale_and_determinism_reach_the_library(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(backend, monkeypatch)
    inputs, _ = drawn()
    packed_attention(*inputs, layout_of(False), 0.25, backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        packed_attention(*inputs, layout_of(False), backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [(c["softmax_scale"], c["deterministic"]) for c in calls.made] == [(0.25, False), (None, True)]


@pytest.mark.parametrize("fake", FAKES)
def test_boundaries_of_another_type_are_an_error(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(fake, monkeypatch)
    inputs, _ = drawn()
    layout = layout_of(False)
    wide = Layout(cu_q=layout.cu_q.long(), cu_k=layout.cu_k, max_q=layout.max_q, max_k=layout.max_k)
    with pytest.raises(AttentionError, match=r"cu_q .* torch\.int64 on cpu.*torch\.int32"):
        packed_attention(*inputs, wide, backend=backend_of(fake))


@pytest.mark.parametrize("sharing", ["off", "on"])
def test_the_padding_of_a_slice_is_a_document_of_its_own(sharing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install("flash4", monkeypatch)
    random = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, 9, (6,), generator=random).int().numpy()
    sequences = []
    for length in (4, 5, 2):
        ids = torch.randint(0, 9, (length,), generator=random).int().numpy()
        sequences.append(TrainSequence(prompt, ids, ids * 0.0, 1.0))
    ((_, row),) = pack_indexed(sequences, 1 << 10, sharing=sharing)
    padded = -(-len(row.ids_T) // 4) * 4
    assert padded != len(row.ids_T)
    layout = Layout.of(my_slice(row, World(size=4, sequence_size=4)))
    # All ranks' tokens, as after the exchange of heads; the fake refuses rows that no document covers.
    inputs = [torch.randn(padded, heads, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (2, 1, 1)]
    out = packed_attention(*inputs, layout, backend="flash4")
    assert out.isfinite().all()
    whole = packed_attention(*(x[: len(row.ids_T)] for x in inputs), Layout.of(row), backend="flash4")
    torch.testing.assert_close(out[: len(row.ids_T)], whole)


@contextlib.contextmanager
def no_kernel(backends: list, set_priority: bool = False) -> Iterator[None]:
    """Stand for sdpa_kernel, which refuses cuDNN on a CPU."""
    assert set_priority
    assert backends[0] == torch.nn.attention.SDPBackend.CUDNN_ATTENTION
    assert torch.nn.attention.SDPBackend.MATH not in backends
    yield


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let documents of 8 tokens count as long, and return the shapes of queries that SDPA gets."""
    shapes: list[tuple[int, ...]] = []
    real = attention_calls.scaled_dot_product_attention

    def recording(q: Tensor, *args, **kwargs) -> Tensor:
        shapes.append(tuple(q.shape))
        return real(q, *args, **kwargs)

    monkeypatch.setattr(attention_calls, "_LONG", 8)
    monkeypatch.setattr(attention_calls, "sdpa_kernel", no_kernel)
    monkeypatch.setattr(attention_calls, "scaled_dot_product_attention", recording)
    return shapes


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cudnn_computes_long_documents_one_by_one(
    window: int | None, shared: bool, kv_heads: int, dense: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, layout, keys = install("varlen", monkeypatch), layout_of(shared), keys_of(shared)
    inputs, weight = drawn(kv_heads)
    agree(
        lambda q, k, v: packed_attention(q, k, v, layout, window=window, backend="cudnn"),
        lambda q, k, v: naive(q, k, v, keys, window),
        inputs,
        weight,
    )
    if window == 3:
        assert (dense, len(calls.made)) == ([], 1)
    else:
        # Documents of 9 and 40 tokens, on either side of two short ones and after two others.
        assert dense == [(1, 4, 9, 16), (1, 4, 40, 16)]
        assert [call["max_q"] for call in calls.made] == [3, 4]


def test_a_row_of_short_documents_is_one_call(dense: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_calls, "_LONG", 41)
    calls = install("varlen", monkeypatch)
    packed_attention(*drawn()[0], layout_of(False), backend="cudnn")
    assert (dense, len(calls.made)) == ([], 1)


def test_long_documents_have_few_different_lengths() -> None:
    lengths = range(2048, 1 << 15)
    rounded = [attention_calls._rounded(n) for n in lengths]
    assert all(n <= r <= n * 1.13 for n, r in zip(lengths, rounded, strict=True))
    assert len(set(rounded)) <= 8 * 4 + 1


def test_the_fakes_have_the_parameters_of_the_installed_torch() -> None:
    from torch.nn.attention import varlen

    def shape(function) -> list[tuple]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    real = shape(varlen.varlen_attn)
    assert real in [shape(fake(Calls())) for fake in (fake_varlen_2_11, fake_varlen_2_13)]
    # Its own cuDNN branch refuses windows and grouped heads, and its backward does not fit the operator.
    assert not varlen._should_use_cudnn(0)


def test_boundaries_are_copied_to_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = with_host_copy([3, 1, 4], "cpu")
    assert packed.tolist() == on_host(packed) == [0, 3, 4, 8]
    assert packed.dtype == torch.int32
    other = torch.tensor([0, 2], dtype=torch.int32)
    assert on_host(other) == [0, 2]
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("a second copy"))
    assert on_host(other) == [0, 2]
    assert on_host(packed) == [0, 3, 4, 8]
