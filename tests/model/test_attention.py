"""Attention over packed rows: every backend that can run here against the equation, document by document."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from or1.core.errors import AttentionError
from or1.model import soft_attention
from or1.model.attention import Layout, _interface, packed_attention
from or1.model.attention_backends import Features, candidates
from or1.model.soft_attention import Scores
from tests.helpers.packed_attention import KEYS, Q_LENS, boundaries, layout_of, naive, soft_naive

GPU = torch.cuda.is_available()


def on_gpu(name: str) -> bool:
    return GPU and name in candidates(torch.device("cuda"), torch.bfloat16, Features(head_dim=32))


BACKENDS = [
    "sdpa",
    *(
        pytest.param(name, marks=pytest.mark.skipif(not on_gpu(name), reason=f"{name} cannot run on this machine"))
        for name in ("varlen", "cudnn", "flash", "flash3", "flash4")
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_each_backend_is_attention_per_document(backend: str, window: int | None, shared: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    device, dtype = ("cpu", torch.float64) if backend == "sdpa" else ("cuda", torch.bfloat16)
    tokens, tight = sum(Q_LENS), backend == "sdpa"
    inputs = [torch.randn(tokens, h, 8 if tight else 32, dtype=dtype, device=device) for h in (4, kv_heads, kv_heads)]
    weight = torch.randn_like(inputs[0])
    keys = KEYS if shared else list(torch.arange(tokens).split(Q_LENS))
    layout = layout_of(shared, device)

    def run(attend, cast: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(cast).requires_grad_() for x in inputs)
        out = attend(q, k, v)
        return [out, *torch.autograd.grad((out * weight.to(cast)).sum(), (q, k, v))]

    ours = run(lambda q, k, v: packed_attention(q, k, v, layout, window=window, backend=backend), dtype)
    truth = run(lambda q, k, v: naive(q, k, v, keys, window), torch.float64)
    plain = run(lambda q, k, v: naive(q, k, v, keys, window), dtype)
    for our, exact, same_dtype in zip(ours, truth, plain, strict=True):
        if tight:
            torch.testing.assert_close(our, exact, rtol=1e-10, atol=1e-12)
        else:
            allowed = 2 * (same_dtype - exact).abs().max() + 1e-6
            assert (our - exact).abs().max() <= allowed


@pytest.mark.gpu
@pytest.mark.skipif(not on_gpu("cudnn"), reason="cuDNN's attention needs a GPU")
def test_long_documents_run_in_cudnn() -> None:
    torch.manual_seed(0)
    lengths = [300, 2100, 40, 3000]
    cu = boundaries(lengths).cuda()
    layout = Layout(cu_q=cu, cu_k=cu, max_q=max(lengths), max_k=max(lengths))
    inputs = [torch.randn(sum(lengths), h, 64, dtype=torch.bfloat16, device="cuda") for h in (4, 2, 2)]
    weight = torch.randn_like(inputs[0])

    def run(backend: str, cast: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(cast).requires_grad_() for x in inputs)
        out = packed_attention(q, k, v, layout, backend=backend)
        return [out, *torch.autograd.grad((out * weight.to(cast)).sum(), (q, k, v))]

    results = run("cudnn", torch.bfloat16), run("sdpa", torch.float64), run("sdpa", torch.bfloat16)
    for our, exact, plain in zip(*results, strict=True):
        assert (our - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize(
    "extra",
    [{"dropout": 0.1}, {"position_bias": torch.zeros(4)}, {"indices": torch.zeros(4)}, {"sinks": torch.zeros(4)}],
)
def test_what_packed_attention_cannot_do_is_refused(extra: dict) -> None:
    x = torch.zeros(1, 4, 59, 8)
    with pytest.raises(AttentionError, match=next(iter(extra))):
        _interface("sdpa")(torch.nn.Identity(), x, x, x, None, **layout_of(False).as_kwargs(), **extra)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("softcap", "sinks"), [(1.5, False), (None, True), (1.5, True)])
@pytest.mark.parametrize("blocks", [1 << 24, 64])
def test_soft_caps_and_sinks_are_their_equations(
    softcap: float | None,
    sinks: bool,
    shared: bool,
    window: int | None,
    blocks: int,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(soft_attention, "_MAX_SCORES", blocks)
    torch.manual_seed(0)
    device, dtype = ("cpu", torch.float64) if backend == "sdpa" else ("cuda", torch.bfloat16)
    tight = backend == "sdpa"
    tokens, width = sum(Q_LENS), 8 if tight else 32
    inputs = [torch.randn(tokens, h, width, dtype=dtype, device=device) for h in (4, 2, 2)]
    sinks_Q = torch.randn(4, dtype=dtype, device=device) if sinks else None
    keys = KEYS if shared else list(torch.arange(tokens).split(Q_LENS))
    weight = torch.randn_like(inputs[0])

    def run(of, cast: torch.dtype, where: str) -> list[Tensor]:
        leaves = [x.to(where, cast).requires_grad_() for x in (*inputs, *([sinks_Q] if sinks else []))]
        out = of(*leaves[:3], Scores(softcap=softcap, sinks_Q=leaves[3] if sinks else None))
        return [out, *torch.autograd.grad((out * weight.to(where, cast)).sum(), leaves)]

    def naive_row(q: Tensor, k: Tensor, v: Tensor, extras: Scores) -> Tensor:
        rows = [torch.as_tensor(r) for r in keys]
        parts = zip(q.split(Q_LENS), rows, strict=True)
        return torch.cat([soft_naive(x, k[r], v[r], window, extras) for x, r in parts])

    layout = layout_of(shared, device)
    ours = run(
        lambda q, k, v, extras: packed_attention(q, k, v, layout, window=window, backend=backend, scores=extras),
        dtype,
        device,
    )
    for our, exact in zip(ours, run(naive_row, torch.float64, "cpu"), strict=True):
        if tight:
            torch.testing.assert_close(our, exact, rtol=1e-10, atol=1e-12)
        else:
            assert (our.cpu() - exact).abs().max() <= 0.03 * exact.abs().max() + 1e-3


@pytest.mark.parametrize("extra", [{"softcap": 1.5}, {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}])
def test_generation_has_soft_caps_and_sinks_too(extra: dict) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 7, 8, dtype=torch.float64) for h in (4, 2, 2))
    extras = Scores(softcap=extra.get("softcap"), sinks_Q=extra.get("s_aux"))
    attend = _interface("sdpa")
    want = torch.stack([soft_naive(*(x[i].transpose(0, 1) for x in (q, k, v)), None, extras) for i in range(2)])
    got, _ = attend(torch.nn.Identity(), q, k, v, None, **extra)
    torch.testing.assert_close(got, want)
    # The last token alone, against all keys, and with a mask of which the first row is padding.
    last, _ = attend(torch.nn.Identity(), q[:, :, -1:], k, v, None, **extra)
    torch.testing.assert_close(last, want[:, -1:])
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    mask[:, 0] = False
    masked, _ = attend(torch.nn.Identity(), q, k, v, mask[None, None], **extra)
    shorter = soft_naive(*(x[0, :, 1:].transpose(0, 1) for x in (q, k, v)), None, extras)
    torch.testing.assert_close(masked[0, 1:], shorter)
    assert masked.isfinite().all()
