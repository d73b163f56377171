"""The public head: token log-probs, entropy and the policy loss from hidden states and the LM weight.

Legend: N rows (scored tokens), M selected rows, H hidden, V vocab.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, reference
from .engine import chunked, compiled
from .engine.host import scaled
from .engine.policy import PolicyRows, policy_pass
from .objective import PolicyObjective, as_objective, check_inputs, needs_sequences
from .options import HeadOptions, HeadOptionsDict, head_options
from .rows import RowStats

# (logp [N], entropy [N], implementation)
_Scores = tuple[Tensor, Tensor, str]
# (loss [], logp [N], entropy [N], ratio [N], clipped [N], left_out [] or None)
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class PolicyStats:
    """Statistics of one policy loss, detached; f64 for fp64 inputs.

    logp      f32[N], nats
    entropy   f32[N], nats
    ratio     f32[N] = exp(logp - old_logp), or the ratio of the row's sequence (gspo)
    clipped   bool[N]: the clip changed the row's gradient (ppo_clip, gspo) or weight (cispo)
    impl      implementation that ran
    left_out  with grad_row_eps, an upper bound on the L1 norm of the dropped part of dloss/dlogits, f32[]

    Rows that `rows` leaves out are 0.
    """

    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor
    impl: str
    left_out: Tensor | None = None


def linear_logprob_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options: Unpack[HeadOptionsDict]
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each target and the entropy of each row, both differentiable for any upstream gradient.

    Backward recomputes the logits unless stash_bytes keeps them. Under no_grad one GEMM runs and no tensor is kept for
    backward. Infinities and nans propagate.

    Args:
        hidden: [N, H], bf16, fp16, fp32 or fp64.
        weight: [V, H] of hidden's dtype, the LM head's.
        targets: i64[N], token ids.
        **options: the fields of HeadOptions: temperature, bias, softcap, logit_scale, impl, ...

    Returns:
        (logp, entropy), each f32[N] in nats; f64 for fp64 inputs.

    Raises:
        TypeError: a dtype, or an unknown option.
        ValueError: a shape, or a limit of HeadOptions.
        IndexError: a CPU target outside the vocabulary.
        RuntimeError: an explicit impl that cannot run.
    """
    return score(hidden, weight, targets, head_options(options))


def score(hidden: Tensor, weight: Tensor, targets: Tensor, head: HeadOptions) -> tuple[Tensor, Tensor]:
    """Run linear_logprob_entropy with its options as an object."""
    if head.grad_row_eps is not None:
        raise ValueError("grad_row_eps is set, but it needs the loss; use linear_policy_loss")
    head.check(hidden, weight, targets)
    inputs = head.row_inputs(hidden, weight, targets)
    if head.impl == "reference":
        return reference.logprob_entropy(_reference_logits(inputs, weight, head), targets)
    return _scores(inputs, weight, head)


def _scores(inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions) -> tuple[Tensor, Tensor]:
    """Return (logp, entropy) of the fused head, differentiable."""
    if torch.compiler.is_compiling() and head.traceable():
        rows = (inputs.targets, inputs.inv_tau)
        stats = compiled.logprob_entropy(inputs.hidden, weight_VH, head.bias, *rows, **head.scalars())
        return stats[0], stats[1]
    return _eager_logprob_entropy(inputs, weight_VH, head)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    token_weight: Tensor,
    old_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sequences: Tensor | None = None,
    objective: PolicyObjective | str | None = None,
    entropy_coef: float | Tensor = 0.0,
    rows: Tensor | str | None = None,
    **options: Unpack[HeadOptionsDict],
) -> tuple[Tensor, PolicyStats]:
    """Return the sum over rows of token_weight * (objective - entropy_coef * entropy), with statistics.

    This call computes the gradients, and backward only scales them: three GEMMs a chunk in all. "gspo" with old_logp
    needs all log-probs of a sequence before the first slope: backward computes the gradients, with a fourth GEMM a
    chunk unless stash_bytes keeps the logits. With N = 0 the loss is 0 and still connected to hidden and weight.

    Args:
        hidden, weight, targets: as in linear_logprob_entropy.
        advantages: f32[N], a constant.
        token_weight: f32[N], mask / denominator; the caller chooses every normaliser.
        old_logp: f32[N], nats. None means on-policy: the ratio is 1 and the clip has no effect.
        rollout_logp: f32[N], nats, of the engine that sampled; needed for objective.is_cap.
        ref_logp: f32[N], nats, of the reference model; needed for objective.kl_coef.
        sequences: i64[N], the number from 0 of a row's sequence, for "gspo" with old_logp. Weight 0 leaves a row out.
        objective: None is PPO's clip with both bounds 0.2; text such as "cispo" is PolicyObjective(kind="cispo").
        entropy_coef: factor of the entropy bonus, a float or f32[].
        rows: i64[M]; only these rows enter a GEMM. "live": rows with token_weight != 0; on a GPU the host waits for
            their number. None: all rows, and a nan in a row of weight 0 propagates.
        **options: the fields of HeadOptions.

    Returns:
        (loss, stats): f32[], f64 for fp64 inputs, and a PolicyStats.

    Raises:
        ValueError: an input that the objective needs is missing. Other errors are those of linear_logprob_entropy.
    """
    head, objective = head_options(options), _cheapest(as_objective(objective), old_logp)
    check_inputs(objective, rollout_logp, ref_logp)
    head.check(hidden, weight, targets)
    inputs, whole = head.row_inputs(hidden, weight, targets), needs_sequences(objective, old_logp)
    given = {"advantages": advantages, "token_weight": token_weight, "old_logp": old_logp}
    given |= {"rollout_logp": rollout_logp, "ref_logp": ref_logp}
    constants = PolicyRows(
        **checks.as_constants(given, inputs.inv_tau),
        objective=objective,
        entropy_coef=entropy_coef,
        sequences=checks.sequences(sequences, token_weight) if whole else None,
        grad_row_eps=head.grad_row_eps,
    )
    index_M = _row_index(rows, constants.token_weight)
    if index_M is not None:
        inputs, constants = inputs.rows(index_M), constants.pick(index_M)
    loss, stats = _implementation(head, whole)(inputs, weight, head, constants)
    return loss, _spread(stats, index_M, hidden.shape[0])


def _cheapest(objective: PolicyObjective, old_logp: Tensor | None) -> PolicyObjective:
    """Return an equal objective of tokens in place of one of sequences, where every ratio is 1."""
    if objective.kind == "gspo" and old_logp is None:
        return replace(objective, kind="ppo_clip")
    return objective


_PolicyRun = Callable[[chunked.RowInputs, Tensor, HeadOptions, PolicyRows], tuple[Tensor, PolicyStats]]


def _implementation(head: HeadOptions, whole: bool) -> _PolicyRun:
    """Return the function that computes the loss. whole: the loss of a row depends on other rows."""
    if head.impl == "reference":
        return partial(_torch_policy_loss, scores=_reference_scores)
    return partial(_torch_policy_loss, scores=_fused_scores) if whole else _fused_policy_loss


@dataclass(frozen=True)
class _ScoreCall:
    """Arguments of _Score that are not differentiable."""

    targets_N: Tensor
    inv_tau_N: Tensor
    settings: chunked.Settings
    main_grad_VH: Tensor | None
    grad_enabled: bool


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, call):
        engine = chunked.Engine(weight_VH, bias_V, call.settings, len(hidden_NH))
        inputs = chunked.RowInputs(hidden_NH, call.targets_N, call.inv_tau_N)
        stats, ctx.stash = chunked.score(engine, inputs, may_stash=call.grad_enabled and any(ctx.needs_input_grad))
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, *stats)
        ctx.call = call
        return stats.logp_C.clone(), stats.entropy_C.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp_N, dentropy_N):
        hidden_NH, weight_VH, bias_V, *stats = ctx.saved_tensors
        call = ctx.call
        engine = chunked.Engine(weight_VH, bias_V, call.settings, len(hidden_NH))
        inputs = chunked.RowInputs(hidden_NH, call.targets_N, call.inv_tau_N)
        slopes = chunked.Slopes(dlogp_N.contiguous(), dentropy_N.contiguous())
        slopes = engine.want_score_grads(ctx.needs_input_grad[:3], slopes, call.main_grad_VH)
        grads = chunked.score_backward(engine, inputs, RowStats(*stats), slopes, ctx.stash)
        dhidden, dweight, dbias = (None if x is None else x.to(weight_VH.dtype) for x in grads)
        return dhidden, None if call.main_grad_VH is not None else dweight, dbias, None


@dataclass(frozen=True)
class _PolicyCall:
    """Arguments of _PolicyLoss that are not differentiable; needs: which inputs want a gradient."""

    targets_N: Tensor
    inv_tau_N: Tensor
    settings: chunked.Settings
    rows: PolicyRows
    needs: tuple[bool, bool, bool]
    main_grad_VH: Tensor | None


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, call):
        engine = chunked.Engine(weight_VH, bias_V, call.settings, len(hidden_NH))
        inputs = chunked.RowInputs(hidden_NH, call.targets_N, call.inv_tau_N)
        loss, *per_row, grads = policy_pass(engine, inputs, call.rows, call.needs, call.main_grad_VH)
        ctx.save_for_backward(*grads)
        ctx.dtype, ctx.unit_upstream = weight_VH.dtype, call.main_grad_VH is not None
        ctx.mark_non_differentiable(*(x for x in per_row if x is not None))
        return loss, *per_row

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if ctx.unit_upstream:
            # Not a Python `if` on the value: the host would wait for a GPU.
            torch._assert_async(
                dloss == 1,
                "main_grad already holds the weight's gradient for dloss = 1, but the "
                "loss was scaled; put the factor into token_weight",
            )
        return *(None if x is None else scaled(x, dloss, ctx.dtype) for x in ctx.saved_tensors), None


@torch.compiler.disable
def _eager_logprob_entropy(inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions) -> tuple[Tensor, Tensor]:
    settings, grad_on = head.settings(weight_VH), torch.is_grad_enabled()
    call = _ScoreCall(inputs.targets, inputs.inv_tau, settings, main_grad_VH=head.main_grad, grad_enabled=grad_on)
    return _Score.apply(inputs.hidden, weight_VH, head.bias, call)


def _fused_policy_loss(
    inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions, rows: PolicyRows
) -> tuple[Tensor, PolicyStats]:
    def needed(x: Tensor | None) -> bool:
        return torch.is_grad_enabled() and x is not None and x.requires_grad

    settings = head.settings(weight_VH)
    needs = (needed(inputs.hidden), needed(weight_VH), needed(head.bias))
    run = _traced_policy_loss if torch.compiler.is_compiling() and head.traceable() else _eager_policy_loss
    loss, logp, entropy, ratio, clipped, left_out = run(inputs, weight_VH, head, rows, needs)
    return loss, PolicyStats(
        logp=logp,
        entropy=entropy,
        ratio=ratio,
        clipped=clipped,
        impl=settings.backend.name,
        left_out=None if head.grad_row_eps is None else left_out,
    )


@torch.compiler.disable
def _eager_policy_loss(
    inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions, rows: PolicyRows, needs: tuple[bool, bool, bool]
) -> _Outputs:
    call = _PolicyCall(
        targets_N=inputs.targets,
        inv_tau_N=inputs.inv_tau,
        settings=head.settings(weight_VH),
        rows=rows,
        needs=needs,
        main_grad_VH=head.main_grad if torch.is_grad_enabled() else None,
    )
    return _PolicyLoss.apply(inputs.hidden, weight_VH, head.bias, call)


def _traced_policy_loss(
    inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions, rows: PolicyRows, needs: tuple[bool, bool, bool]
) -> _Outputs:
    given = {
        "inv_tau": inputs.inv_tau,
        "advantages": rows.advantages,
        "token_weight": rows.token_weight,
        "old_logp": rows.old_logp,
        "rollout_logp": rows.rollout_logp,
        "ref_logp": rows.ref_logp,
    }
    per_row = {name: x for name, x in given.items() if x is not None}
    coef = torch.as_tensor(rows.entropy_coef, dtype=inputs.inv_tau.dtype, device=weight_VH.device)
    o = rows.objective
    loss, *others = compiled.policy_loss(
        inputs.hidden,
        weight_VH,
        head.bias,
        inputs.targets,
        torch.stack(list(per_row.values())),
        coef,
        names=",".join(per_row),
        kind=o.kind,
        low=o.clip_low,
        high=o.clip_high,
        kl_coef=o.kl_coef,
        is_cap=o.is_cap,
        is_floor=o.is_floor,
        is_mask=o.is_mask,
        eps=head.grad_row_eps,
        needs=list(needs),
        **head.scalars(),
    )
    logp, entropy, ratio, clipped, left_out = (x.detach() for x in others[:5])
    return loss, logp, entropy, ratio, clipped, left_out


def _torch_policy_loss(
    inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions, rows: PolicyRows, scores: Callable[..., _Scores]
) -> tuple[Tensor, PolicyStats]:
    """Return the loss of log-probs that autograd differentiates. scores: returns log-probs and entropies."""
    logp_N, entropy_N, impl = scores(inputs, weight_VH, head)
    loss, terms = reference.policy_loss(
        logp_N,
        entropy_N,
        rows.advantages,
        token_weight_N=rows.token_weight,
        objective=rows.objective,
        entropy_coef=rows.entropy_coef,
        old_logp_N=rows.old_logp,
        rollout_logp_N=rows.rollout_logp,
        ref_logp_N=rows.ref_logp,
        sequences_N=rows.sequences,
    )
    logp, entropy, ratio, clipped = (x.detach() for x in (logp_N, entropy_N, terms.ratio_N, terms.clipped_N))
    return loss, PolicyStats(logp, entropy, ratio, clipped, impl=impl)


def _reference_scores(inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions) -> _Scores:
    return *reference.logprob_entropy(_reference_logits(inputs, weight_VH, head), inputs.targets), "reference"


def _fused_scores(inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions) -> _Scores:
    if head.grad_row_eps is not None:
        raise ValueError('grad_row_eps is set, but an objective of whole sequences such as "gspo" uses every row')
    return *_scores(inputs, weight_VH, head), head.settings(weight_VH).backend.name


def _reference_logits(inputs: chunked.RowInputs, weight_VH: Tensor, head: HeadOptions) -> Tensor:
    acc = inputs.inv_tau.dtype
    return reference.logits(
        inputs.hidden.to(acc),
        weight_VH.to(acc),
        temperature=1 / inputs.inv_tau,
        bias_V=None if head.bias is None else head.bias.to(acc),
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )


def _row_index(rows: Tensor | str | None, token_weight_N: Tensor) -> Tensor | None:
    if isinstance(rows, str):
        if rows != "live":
            raise ValueError(f"rows is {rows!r}; it must be a tensor of row indices, 'live' or None")
        return token_weight_N.nonzero()[:, 0]
    return rows


def _spread(stats: PolicyStats, index_M: Tensor | None, num_rows: int) -> PolicyStats:
    if index_M is None:
        return stats
    logp, entropy, ratio, clipped = (
        x.new_zeros(num_rows).index_copy_(0, index_M, x)
        for x in (stats.logp, stats.entropy, stats.ratio, stats.clipped)
    )
    return replace(stats, logp=logp, entropy=entropy, ratio=ratio, clipped=clipped)
