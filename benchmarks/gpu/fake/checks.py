"""The checks of the rehearsal: head, decoder, optimizers, offload and checkpointing on fake CUDA tensors.

Shapes, dtypes, devices and strides are real; numbers are not, and nothing is timed. Legend: N rows, H hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.gpu.fake.machine import Log, machine
from benchmarks.gpu.needs import why_not
from benchmarks.lib.problems import MODELS
from or1_kernels import linear_logprob_entropy, linear_policy_loss

_ROWS, _TOKENS = 9001, 8192
# Settings of one update of the 7B model; each is a check of its own.
UPDATES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "stochastic weights, bf16 sums": {"weights": "stochastic", "grad_dtype": "bfloat16"},
    "optimizer offload": {"optimizer": "offload"},
    "checkpointing layer": {"checkpointing": "layer"},
    "checkpointing selective": {"checkpointing": "selective"},
    "checkpointing offload": {"checkpointing": "offload"},
    "shared prompts": {"checkpointing": "layer", "sharing": "on"},
}


def run(context: Context) -> None:
    """Run all checks. A check that raises is a row that failed, with the reason."""
    for name, options in HEAD_CALLS.items():
        _checked(context, f"head, {name}", lambda o=options: _policy_head(**o))
    _checked(context, "head, scores", _scoring_head)
    _checked(context, "head, scores without gradient", lambda: _scoring_head(grad=False))
    if why := why_not(("pydantic", "or1_kernels._native", "transformers")):
        context.skip("decoder, optimizers, checkpointing", why)
        return
    for name, options in UPDATES.items():
        _checked(context, f"7B update, {name}", lambda o=options: _update(**o))


def _checked(context: Context, name: str, check: Callable[[], dict[str, Any]]) -> None:
    try:
        found = check()
    except Exception as error:  # noqa: BLE001 - whatever a path raises is what the rehearsal looks for
        where = _place_of(error)
        context.check(name, False, error=f"{type(error).__name__} at {where}: {str(error).splitlines()[:1]}")
        return
    context.check(name, True, **found)


def _place_of(error: BaseException) -> str:
    frame = error.__traceback__
    place = ""
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if "/or1" in file and "site-packages" not in file:
            place = f"{file.rsplit('/', 1)[-1]}:{frame.tb_lineno}"
        frame = frame.tb_next
    return place


def _leaves(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden [N, H], weight [V, H], targets [N] and ones [N] of the 7B head."""
    hidden = torch.randn(_ROWS, MODELS[1].hidden, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(MODELS[1].vocab, MODELS[1].hidden, device="cuda", dtype=dtype, requires_grad=True)
    return hidden, weight, torch.zeros(_ROWS, dtype=torch.int64, device="cuda"), torch.ones(_ROWS, device="cuda")


def same_form(got: Tensor | None, want: Tensor, what: str) -> None:
    """Raise AssertionError unless `got` has the shape, dtype, device and strides of `want`."""
    if got is None:
        raise AssertionError(f"{what} is missing")
    forms = [(tuple(x.shape), x.dtype, x.device.type, tuple(x.stride())) for x in (got, want)]
    if forms[0] != forms[1]:
        raise AssertionError(f"{what} is {forms[0]}; it must be {forms[1]}")


def _launched(log: Log, rows: int) -> dict[str, Any]:
    """Return the number of launches. Raise AssertionError unless they covered the rows with CUDA tensors alone."""
    for kernel, grid, devices in log.launches:
        if devices != {"cuda"} or not grid or grid[0] < 1:
            raise AssertionError(f"{kernel} was launched with grid {grid} on tensors of {devices}")
    covered: dict[str, int] = {}
    for kernel, grid, _ in log.launches:
        covered[kernel] = covered.get(kernel, 0) + grid[0]
    if not covered or max(covered.values()) < rows:
        raise AssertionError(f"no Triton kernel covers {rows} rows; launched: {covered}")
    return {"launches": len(log.launches), "kernels": ", ".join(sorted(covered)), "matrices": sorted(log.matrices)}


HEAD_CALLS: dict[str, dict[str, Any]] = {
    "fast": {},
    "fast, no entropy": {"entropy_coef": 0.0},
    "lean": {"preset": "lean"},
    "main_grad": {"main_grad": True},
    "selected rows": {"selected": 5000},
    "fp16": {"dtype": torch.float16},
}


def _policy_head(*, dtype: torch.dtype = torch.bfloat16, selected: int = 0, main_grad: bool = False, **options: Any):
    with machine() as log:
        hidden, weight, targets, ones = _leaves(dtype)
        options.setdefault("entropy_coef", 0.01)
        total = torch.zeros(weight.shape, device="cuda")
        if main_grad:
            options["main_grad"] = total
        if selected:
            options["rows"] = torch.arange(selected, device="cuda")
        loss, stats = linear_policy_loss(hidden, weight, targets, ones, token_weight=ones, old_logp=ones, **options)
        loss.backward()
        for name in ("logp", "entropy", "ratio"):
            same_form(getattr(stats, name), ones, name)
        same_form(hidden.grad, hidden, "dhidden")
        if not main_grad:
            same_form(weight.grad, weight, "dweight")
        elif weight.grad is not None:
            raise AssertionError("main_grad was given, but weight.grad was filled")
        if log.host_reads:
            raise AssertionError(f"the host reads a device value: {log.host_reads}")
        return _launched(log, selected or _ROWS)


def _scoring_head(grad: bool = True) -> dict[str, Any]:
    with machine() as log, torch.set_grad_enabled(grad):
        hidden, weight, targets, ones = _leaves()
        logp, entropy = linear_logprob_entropy(hidden, weight, targets)
        for name, value in (("logp", logp), ("entropy", entropy)):
            same_form(value, ones, name)
        if grad:
            (logp + entropy).sum().backward()
            same_form(hidden.grad, hidden, "dhidden")
            same_form(weight.grad, weight, "dweight")
        elif logp.requires_grad:
            raise AssertionError("logp has a graph under no_grad")
        return _launched(log, _ROWS)


def _update(**options: Any) -> dict[str, Any]:
    """Run one update of the 7B model, with four of its layers, over rows of several documents."""
    from benchmarks.step.batch import ARCHITECTURES, ragged_batch
    from benchmarks.step.engines import Or1Engine

    name = "qwen2.5-7b, four layers"
    sequences = ragged_batch(_TOKENS, 1, 512, ARCHITECTURES[name]["vocab_size"])
    with machine() as log:
        engine = Or1Engine(name, sequences, torch.device("cuda"), row_tokens=2 * _TOKENS, **options)
        heads = engine.model.config
        if heads.num_key_value_heads == heads.num_attention_heads:
            raise AssertionError("the model has no grouped heads")
        before = [p.detach().clone() for p in engine.model.parameters()]
        seen: list[tuple[Tensor, Tensor]] = []
        real = engine.optimizer.step_if_finite

        def step(loss: Tensor) -> Any:
            grads, params = engine.optimizer.gradients(), dict(engine.model.named_parameters())
            seen.extend((grads[name], params[name]) for name in engine.optimizer.names)
            return real(loss)

        vars(engine.optimizer)["step_if_finite"] = step
        engine.step()
        wide = torch.bfloat16 if options.get("grad_dtype") == "bfloat16" else torch.float32
        for gradient, param in seen:
            same_form(gradient, param.to(wide), "a gradient sum")
        for old, new in zip(before, engine.model.parameters(), strict=True):
            same_form(new, old, "a parameter")
        found = _launched(log, sum(s.trained_tokens for s in sequences))
        return found | _states(engine.optimizer, options) | {"host_reads": len(log.host_reads), "params": len(seen)}


def _states(optimizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return where masters and moments are. Raise AssertionError if they are elsewhere than the settings say."""
    home = "cpu" if options.get("optimizer") == "offload" else "cuda"
    tensors = {k: t for k, t in optimizer.state_tensors().items() if not k.startswith(("master.", "step."))}
    if {t.device.type for t in tensors.values()} != {home} or {t.dtype for t in tensors.values()} != {torch.float32}:
        raise AssertionError(f"moments are on { ({t.device.type for t in tensors.values()}) }, not on {home}")
    masters = {m.device.type for m in optimizer.masters if m is not None}
    if masters != (set() if options.get("weights") == "stochastic" else {home}):
        raise AssertionError(f"masters are on {masters}, not on {home}")
    return {"moments": home}
