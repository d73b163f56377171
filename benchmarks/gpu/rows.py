"""GPU part: the GEMM forms that bound the head's time, and the row passes, against the machine's limits.

The head has three GEMMs with C rows a chunk. Logits are written as fp32 from bf16 inputs. dhidden reads bf16 gradients
that fill the first half of fp32 rows (row stride 2 V). dweight is accumulated in fp32. Each is timed beside the plain
bf16 form.
"""

import torch

from benchmarks.gpu.context import Context
from benchmarks.lib import measure
from benchmarks.lib.problems import MODELS
from or1_kernels.engine import gemms
from or1_kernels.rows import Transform, finish, resolve

_ROUNDS = 5


def run(context: Context) -> None:
    """Time the row passes, then the GEMM forms."""
    _passes(context)
    _gemm_forms(context)


def _gemm_forms(context: Context) -> None:
    chunks = (32,) if context.rehearse else (1024, 2048, 4096, 8192)
    for model in MODELS[1:2] if context.quick else MODELS:
        hidden, vocab = (model.hidden // 64, 1031) if context.rehearse else (model.hidden, model.vocab)
        for rows in chunks:
            if context.late():
                context.skip(f"GEMM forms {model.name}, {rows} rows", "the part's time is up")
                continue
            flops = 2 * rows * hidden * vocab
            for name, fn in _forms(context, rows, hidden, vocab).items():
                best = min(measure.interleaved({name: fn}, context.device, _ROUNDS)[name])
                context.add(
                    {
                        "gemm": name,
                        "shape": model.name,
                        "rows": rows,
                        "hidden": hidden,
                        "vocab": vocab,
                        "ms": 1e3 * best,
                        "tflops": flops / best / 1e12,
                    }
                )


def _forms(context: Context, rows: int, hidden: int, vocab: int):
    device = context.device
    h_CH = torch.randn(rows, hidden, device=device).bfloat16()
    w_VH = (torch.randn(vocab, hidden, device=device) / hidden**0.5).bfloat16()
    wide_CV = torch.zeros(rows, vocab, device=device)
    narrow_CV = torch.zeros(rows, vocab, device=device, dtype=torch.bfloat16)
    strided_CV = wide_CV.view(torch.bfloat16)[:, :vocab]
    dh_CH, dw_VH = torch.empty_like(h_CH), torch.empty_like(w_VH)
    dw32_VH = torch.zeros(vocab, hidden, device=device)
    # As the engine chooses for this device.
    engine = gemms.WideOut() if device.type == "cuda" else gemms.Residual()
    return {
        "logits bf16 -> bf16": lambda: torch.mm(h_CH, w_VH.T, out=narrow_CV),
        "logits bf16 -> fp32": lambda: engine.logits(h_CH, w_VH, wide_CV),
        "dhidden, contiguous": lambda: torch.mm(narrow_CV, w_VH, out=dh_CH),
        "dhidden, row stride 2V": lambda: torch.mm(strided_CV, w_VH, out=dh_CH),
        "dweight bf16 -> bf16": lambda: torch.mm(narrow_CV.T, h_CH, out=dw_VH),
        "dweight += fp32": lambda: engine.add_dweight(narrow_CV, h_CH, dw32_VH),
        "dweight += fp32, row stride 2V": lambda: engine.add_dweight(strided_CV, h_CH, dw32_VH),
    }


def _passes(context: Context) -> None:
    device, transform = context.device, Transform()
    rows, vocab = (64, 1031) if context.rehearse else (4096, 152064)
    logits = torch.randn(rows, vocab, device=device) * 4
    targets = torch.randint(0, vocab, (rows,), device=device)
    inv_tau = torch.ones(rows, device=device)
    slopes = (torch.ones_like(inv_tau), torch.full_like(inv_tau, 0.01))
    copy_to = torch.empty_like(logits)
    best = min(measure.interleaved({"copy": lambda: copy_to.copy_(logits)}, device, _ROUNDS)["copy"])
    context.add(
        {
            "pass": "copy",
            "impl": "torch",
            "rows": rows,
            "vocab": vocab,
            "ms": 1e3 * best,
            "gb_per_s": 2 * logits.nbytes / best / 1e9,
        }
    )
    for impl in ("native", "torch") if context.rehearse else ("triton", "torch"):
        backend = resolve(impl, device, torch.float32)
        stats = finish(backend.row_sums(logits, targets, inv_tau, transform), inv_tau)
        calls = {"row_sums": lambda b=backend: b.row_sums(logits, targets, inv_tau, transform)}
        for name, dtype in (("row_grads fp32", None), ("row_grads bf16", torch.bfloat16)):
            calls[name] = lambda b=backend, d=dtype, s=stats: b.row_grads_(
                copy_to, targets, inv_tau, transform, s, slopes, out_dtype=d
            )
        for name, call in calls.items():
            # The pass runs in place: restore the logits before every round, outside the timing.
            times = []
            for _ in range(_ROUNDS + 1):
                copy_to.copy_(logits)
                times.append(measure.seconds(call, device))
            moved = logits.nbytes * {"row_sums": 1, "row_grads fp32": 2, "row_grads bf16": 1.5}[name]
            context.add(
                {
                    "pass": name,
                    "impl": impl,
                    "rows": rows,
                    "vocab": vocab,
                    "ms": 1e3 * min(times[1:]),
                    "gb_per_s": moved / min(times[1:]) / 1e9,
                }
            )
