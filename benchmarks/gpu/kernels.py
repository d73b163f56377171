"""GPU part: the Triton head against fp64, at the edges of fp32, for bitwise equality, and for host synchronisation.

The tolerance is that of tests/kernels: error against fp64 at most twice plain torch's in the same dtype.
Legend: N rows, H hidden, V vocab, R rows of a block.
"""

from itertools import cycle
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.lib.problems import Problem, Shape, make_problem
from or1_kernels import PolicyObjective, linear_logprob_entropy, linear_policy_loss, reference

IMPL = "triton"
OBJECTIVES = {
    "ppo": PolicyObjective(),
    "clip_higher": PolicyObjective(clip_high=0.28),
    "ppo_kl_is": PolicyObjective(kl_coef=0.05, is_cap=2.0),
    "cispo": PolicyObjective(kind="cispo", clip_low=1.0, clip_high=0.3),
    "cispo_kl": PolicyObjective(kind="cispo", kl_coef=0.1),
}
NEEDS = ((True, True), (True, False), (False, True), (False, False))
_FIELDS = ("logp", "entropy", "dhidden", "dweight")


def run(context: Context) -> None:
    """Run every group of checks. Each check adds a row."""
    for group in (_exactness, _extremes, _strided_upstream, _bitwise, _beyond_int32, _no_host_wait):
        if context.late():
            context.skip(group.__name__.strip("_"), "the part's time is up")
        else:
            group(context)


def constants(problem: Problem) -> dict[str, Tensor]:
    """Return the log-probs that an objective may read, drawn around old_logp."""
    gen = torch.Generator(device=problem.hidden.device).manual_seed(7)
    noise_2N = 0.25 * torch.randn(2, len(problem.targets), generator=gen, device=problem.hidden.device)
    return {
        "old_logp": problem.old_logp,
        "rollout_logp": problem.old_logp + noise_2N[0],
        "ref_logp": problem.old_logp + noise_2N[1],
    }


def plain(problem: Problem, objective: PolicyObjective, dtype: torch.dtype, block: int) -> SimpleNamespace:
    """Run the reference with full logits and autograd in `dtype`, `block` rows at a time."""
    hidden, weight = (x.to(dtype).requires_grad_() for x in (problem.hidden, problem.weight))
    wide = torch.promote_types(dtype, torch.float32)
    named = {k: v.to(wide) for k, v in constants(problem).items()}
    rows = []
    for start in range(0, len(problem.targets), block):
        r = slice(start, start + block)
        logp_R, entropy_R = reference.logprob_entropy(reference.logits(hidden[r], weight), problem.targets[r])
        loss, _ = reference.policy_loss(
            logp_R,
            entropy_R,
            problem.advantages[r].to(wide),
            token_weight_N=problem.token_weight[r].to(wide),
            objective=objective,
            entropy_coef=0.01,
            **{f"{k}_N": v[r] for k, v in named.items()},
        )
        loss.backward()
        rows.append((logp_R.detach(), entropy_R.detach()))
    empty = (hidden.new_zeros(0),) * 2
    logp, entropy = (torch.cat(x) for x in zip(*rows or [empty], strict=True))
    grads = (torch.zeros_like(x) if x.grad is None else x.grad for x in (hidden, weight))
    return SimpleNamespace(**dict(zip(_FIELDS, (logp, entropy, *grads), strict=True)))


def fused(problem: Problem, objective: PolicyObjective, needs=(True, True), **options) -> SimpleNamespace:
    """Run the head under test. Gradients that are not needed are None."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    hidden, weight = hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    loss, stats = linear_policy_loss(
        hidden,
        weight,
        problem.targets,
        problem.advantages,
        token_weight=problem.token_weight,
        objective=objective,
        entropy_coef=0.01,
        impl=IMPL,
        **constants(problem),
        **options,
    )
    if any(needs):
        loss.backward()
    return SimpleNamespace(logp=stats.logp, entropy=stats.entropy, dhidden=hidden.grad, dweight=weight.grad)


def excess(mine: Tensor, peer: Tensor, truth: Tensor) -> float:
    """Error over its limit, at most 1 when as exact as asked: the limit is twice the peer's error, plus rounding."""
    if not truth.numel():
        return 0.0
    floor = 2 * torch.finfo(mine.dtype).eps * truth.abs().max().item()
    error, same = ((x.double() - truth).abs().max().item() for x in (mine, peer))
    return error / max(2 * same + floor, torch.finfo(torch.float64).tiny)


def _exactness(context: Context) -> None:
    small = context.rehearse
    vocabs, counts = ((7, 5003), (0, 1, 17)) if small else ((7, 50257, 129920, 151936, 152064), (0, 1, 127, 4097))
    if context.quick and not small:
        vocabs, counts = (50257, 152064), (127, 4097)
    kinds, wants = cycle(OBJECTIVES.items()), cycle(NEEDS)
    for vocab in vocabs:
        for rows in counts:
            for dtype in (torch.bfloat16, torch.float32):
                name, objective = next(kinds)
                problem = make_problem(Shape("", 16 if small else 256, vocab), rows, dtype=dtype, device=context.device)
                truth, peer = plain(problem, objective, torch.float64, 256), plain(problem, objective, dtype, 1 << 14)
                # All combinations for few rows; for many rows the first and one other in turn.
                for needs in NEEDS if rows < 1000 else (NEEDS[0], next(wants)):
                    mine = fused(problem, objective, needs)
                    worst = {
                        f: excess(getattr(mine, f), getattr(peer, f), getattr(truth, f))
                        for f in _FIELDS
                        if getattr(mine, f) is not None
                    }
                    made = (mine.dhidden is not None, mine.dweight is not None)
                    context.check(
                        "error at most twice plain torch's",
                        made == needs and max(worst.values()) <= 1,
                        vocab=vocab,
                        rows=rows,
                        dtype=str(dtype),
                        objective=name,
                        needs=str(needs),
                        **worst,
                    )
                del truth, peer, mine


def _scored(logits_NV: Tensor, targets_N: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return logp, entropy and dlogits of sum(logp + 0.5 entropy) for exact logits: hidden is the identity."""
    weight = logits_NV.T.contiguous().requires_grad_()
    eye = torch.eye(len(logits_NV), dtype=logits_NV.dtype, device=logits_NV.device)
    logp, entropy = linear_logprob_entropy(eye, weight, targets_N, impl=impl)
    (logp + 0.5 * entropy).sum().backward()
    return logp.detach(), entropy.detach(), weight.grad.T


def _extremes(context: Context) -> None:
    device, vocab = context.device, 1000
    gap = torch.tensor([16.0, 20.0, 25.0], device=device)
    logits = torch.zeros(3, vocab, device=device)
    logits[:, 17] = gap + torch.tensor(999.0).log()
    weight = logits.T.contiguous().requires_grad_()
    target = torch.full((3,), 17, device=device)
    logp, _ = linear_logprob_entropy(torch.eye(3, device=device), weight, target, impl=IMPL)
    logp.sum().backward()
    odds = 999 * (-logits[:, 17].double()).exp()
    worst = (weight.grad[17].double() / (odds / (1 + odds)) - 1).abs().max().item()
    context.check("p_y -> 1: gradient within 1 %", worst <= 0.01, relative_error=worst)
    gen = torch.Generator(device=device).manual_seed(0)
    for depth in (79.0, 81.0, 200.0, 5000.0):
        deep = torch.randn(6, 300, generator=gen, device=device)
        deep[:, 4] -= depth
        target = torch.full((6,), 4, device=device)
        mine, want = _scored(deep, target, IMPL), _scored(deep.double(), target, "reference")
        worst = max(((a.double() - b).abs() / (1 + b.abs())).max().item() for a, b in zip(mine, want, strict=True))
        context.check(f"target {depth:.0f} nats below the maximum", worst <= 1e-4, relative_error=worst)
    base = torch.randint(-2000, 2000, (8, 400), generator=gen, device=device) / 256.0
    target = torch.arange(8, device=device)
    pairs = zip(_scored(base + 1e4, target, IMPL), _scored(base, target, IMPL), strict=True)
    worst = max((a - b).abs().max().item() for a, b in pairs)
    context.check("a common offset of 1e4 changes nothing", worst <= 2e-6, error=worst)
    masked = make_problem(Shape("", 16, 301), 33, device=device)
    masked.token_weight.zero_()
    out = fused(masked, PolicyObjective())
    context.check("all rows masked: zero gradients", not out.dhidden.any() and not out.dweight.any())


def _strided_upstream(context: Context) -> None:
    problem = make_problem(Shape("", 32, 301), 90, device=context.device)
    wide = torch.randn(90, 6, device=context.device)
    results = []
    for impl, upstream in (
        (IMPL, (wide[:, 2], wide.flip(1)[:, 1])),
        ("reference", (wide[:, 2].clone(), wide.flip(1)[:, 1].clone())),
    ):
        leaves = problem.hidden.detach().requires_grad_(), problem.weight.detach().requires_grad_()
        torch.autograd.backward(linear_logprob_entropy(*leaves, problem.targets, impl=impl), upstream)
        results.append([x.grad for x in leaves])
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))
    context.check("strided upstream gradients", worst <= 1e-5, relative_error=worst)


def _bitwise(context: Context) -> None:
    # Rows that fill whole chunks: cuBLAS may choose another kernel for a chunk of another length.
    shape, rows = (Shape("", 16, 1031), 48) if context.rehearse else (Shape("", 1536, 151936), 8192)
    problem = make_problem(shape, rows, dtype=torch.bfloat16, device=context.device)
    first, second = (fused(problem, PolicyObjective()) for _ in range(2))
    same = all(torch.equal(getattr(first, f), getattr(second, f)) for f in _FIELDS)
    context.check("run to run, bit for bit", same)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(5)).to(context.device)
    fields = ("hidden", "targets", "advantages", "token_weight", "old_logp")
    moved = Problem(**(vars(problem) | {f: getattr(problem, f)[order] for f in fields}))
    objective = PolicyObjective()
    got = fused(moved, objective)
    same = all(torch.equal(getattr(first, f)[order], getattr(got, f)) for f in ("logp", "entropy", "dhidden"))
    context.check("permuted rows, bit for bit", same)


def _beyond_int32(context: Context) -> None:
    """Check that a chunk of more than 2^31 logits gives the same result as smaller chunks."""
    shape, rows, whole = (Shape("", 16, 1031), 40, 40) if context.rehearse else (Shape("", 256, 152064), 16384, 16384)
    problem = make_problem(shape, rows, dtype=torch.bfloat16, device=context.device)
    one, many = (fused(problem, PolicyObjective(), chunk_rows=c) for c in (whole, whole // 8))
    worst = max(
        (a.float() - b.float()).abs().max().item() / max(b.float().abs().max().item(), 1e-30)
        for a, b in ((getattr(one, f), getattr(many, f)) for f in _FIELDS)
    )
    context.check("a chunk beyond 2^31 logits", worst <= 2**-7, elements=whole * shape.vocab, relative_error=worst)


def _no_host_wait(context: Context) -> None:
    if context.device.type != "cuda":
        context.skip("host synchronisation", "no GPU to wait for")
        return
    problem = make_problem(Shape("", 256, 50257), 4097, dtype=torch.bfloat16, device=context.device)
    rows = problem.live
    named = constants(problem)

    def step(**options) -> None:
        hidden, weight = problem.hidden.detach().requires_grad_(), problem.weight.detach().requires_grad_()
        loss, _ = linear_policy_loss(
            hidden,
            weight,
            problem.targets,
            problem.advantages,
            entropy_coef=0.01,
            token_weight=problem.token_weight,
            rows=rows,
            impl=IMPL,
            **named,
            **options,
        )
        loss.backward()
        logp, entropy = linear_logprob_entropy(hidden, weight, problem.targets, impl=IMPL)
        (logp + entropy).sum().backward()

    main_grad = torch.zeros(problem.weight.shape, device=context.device)
    for name, options in (("plain", {}), ("lean", {"preset": "lean"}), ("main_grad", {"main_grad": main_grad})):
        step(**options)  # Compiling and loading kernels may wait.
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        message = ""
        try:
            step(**options)
        except RuntimeError as error:
            message = str(error)[:300]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        context.check(f"no host synchronisation, {name}", not message, error=message)
