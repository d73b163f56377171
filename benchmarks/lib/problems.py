"""Inputs of the head benchmarks with realistic logits, the exact result, and the unavoidable work.

Legend: N rows, H hidden, V vocab, R rows of a sample.
"""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from or1_kernels import PolicyObjective, reference

OBJECTIVE = PolicyObjective(clip_low=0.2, clip_high=0.2)
ENTROPY_COEF = 0.01
# "policy": clipped loss with an entropy bonus; "policy, no entropy": the same without; "ce": sum of weight * -logp.
TASKS = ("policy", "policy, no entropy", "ce")
_SAMPLING_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's LM head."""

    name: str
    hidden: int
    vocab: int


MODELS = (Shape("1.5B", 1536, 151936), Shape("7B", 3584, 152064), Shape("32B", 5120, 152064))
# The shape in which peers give their own figures: 8192 tokens of it.
PUBLISHED = Shape("8B", 4096, 151936)
SMALL = Shape("small", 256, 16384)


@dataclass(frozen=True)
class Problem:
    """One batch of rows in documents of equal length, advantage constant within a document.

    hidden [N, H] and weight [V, H] of one dtype; targets i64[N], sampled from the row's own distribution; advantages,
    token_weight (0 on masked rows, else 1 / live rows) and old_logp f32[N].
    """

    shape: Shape
    logits: str
    masked: float
    documents: int
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor
    token_weight: Tensor
    old_logp: Tensor

    @property
    def live(self) -> Tensor:
        """Rows whose weight is not 0, i64[L]."""
        return self.token_weight.nonzero()[:, 0]

    @property
    def flops(self) -> int:
        """Floating-point operations of the three GEMMs over the unmasked rows."""
        return 6 * len(self.live) * self.hidden.shape[1] * self.weight.shape[0]

    def entropy_coef(self, task: str) -> float:
        """Return the entropy coefficient of a task."""
        return ENTROPY_COEF if task == "policy" else 0.0

    def sample(self, count: int) -> "Problem":
        """Return at most `count` live rows, evenly spread, as a problem of one document without masked rows."""
        live = self.live
        index_R = live[torch.linspace(0, len(live) - 1, min(count, len(live)), device=live.device).long()]
        rows = {name: getattr(self, name)[index_R] for name in ("hidden", "targets", "advantages", "old_logp")}
        # One advantage for the only document, because some peers take one advantage a sequence.
        rows["advantages"] = torch.full_like(rows["advantages"], 0.75)
        weight_R = torch.full_like(rows["old_logp"], 1 / max(1, len(index_R)))
        return replace(self, masked=0.0, documents=1, token_weight=weight_R, **rows)


def make_problem(
    shape: Shape,
    tokens: int,
    *,
    logits: str = "peaked",
    masked: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """Return a problem of `tokens` rows, a fraction `masked` of which are prompt rows without loss.

    logits  "peaked": most rows nearly certain, a few undecided between two tokens, 0.3 nats on average, as in a trained
            policy; "flat": log V - 0.5 nats, as in an untrained model

    Raises ValueError for another name.
    """
    if logits not in ("peaked", "flat"):
        raise ValueError(f"logits is {logits!r}; it must be 'peaked' or 'flat'")
    gen = torch.Generator(device=device).manual_seed(seed)
    draw = {"generator": gen, "device": device}
    weight = torch.randn(shape.vocab, shape.hidden, **draw).div_(shape.hidden**0.5).to(dtype)
    if logits == "flat":
        hidden = torch.randn(tokens, shape.hidden, **draw)
    else:
        hidden = _between_two_tokens(tokens, weight, draw)
    hidden = hidden.to(dtype)
    targets, logp = _sampled_targets(hidden, weight, gen)
    documents = math.gcd(tokens, 8)
    length = max(1, tokens // documents)
    advantages = torch.randn(documents, **draw).repeat_interleave(length)[:tokens]
    live = torch.arange(tokens, device=device) % length >= round(masked * length)
    token_weight = live.float() / live.sum().clamp_min(1)
    # Ratios of 0.61, 1 and 1.65, far from the clip bounds: there rounding of logp alone would decide the gradient.
    moved = torch.rand(tokens, **draw)
    old_logp = logp + 0.5 * ((moved < 0.1).float() - (moved > 0.9).float())
    return Problem(
        shape=shape,
        logits=logits,
        masked=masked,
        documents=documents,
        hidden=hidden,
        weight=weight,
        targets=targets,
        advantages=advantages,
        token_weight=token_weight,
        old_logp=old_logp,
    )


def truth(problem: Problem, task: str) -> SimpleNamespace:
    """Return logp, entropy [N], dhidden [N, H] and dweight [V, H] in fp64, from the stored inputs."""
    hidden, weight = (x.double().requires_grad_() for x in (problem.hidden, problem.weight))
    logp, entropy = reference.logprob_entropy(reference.logits(hidden, weight), problem.targets)
    task_loss(problem, task, logp, entropy).backward()
    return SimpleNamespace(logp=logp.detach(), entropy=entropy.detach(), dhidden=hidden.grad, dweight=weight.grad)


def task_loss(problem: Problem, task: str, logp_N: Tensor, entropy_N: Tensor | None) -> Tensor:
    """Return the task's loss from differentiable log-probs and entropies, as users of a scoring head write it."""
    dtype = torch.promote_types(logp_N.dtype, torch.float32)
    weight_N = problem.token_weight.to(dtype)
    if task == "ce":
        return -(weight_N * logp_N).sum()
    ratio_N = (logp_N - problem.old_logp.to(dtype)).exp()
    clipped_N = ratio_N.clamp(1 - OBJECTIVE.clip_low, 1 + OBJECTIVE.clip_high)
    advantages_N = problem.advantages.to(dtype)
    loss_N = -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    if task == "policy":
        loss_N = loss_N - ENTROPY_COEF * entropy_N
    return (weight_N * loss_N).sum()


def errors(got: SimpleNamespace, want: SimpleNamespace) -> dict[str, float | None]:
    """Return errors: largest absolute of logp and entropy in nats, relative Frobenius norm of dhidden and dweight.

    None means that the variant does not compute the value.
    """
    out: dict[str, float | None] = {}
    for name in ("logp", "entropy"):
        value = getattr(got, name)
        out[name] = None if value is None else (value.double() - getattr(want, name)).abs().max().item()
    for name in ("dhidden", "dweight"):
        exact = getattr(want, name)
        out[name] = ((getattr(got, name).double() - exact).norm() / exact.norm()).item()
    return out


def _between_two_tokens(tokens: int, weight_VH: Tensor, draw: dict) -> Tensor:
    """Return hidden states whose logit is `top` at one token, `top` - gap at another and near 0 elsewhere.

    E H = E over gaps of the binary entropy, 1.3 / spread nats for a half-normal gap, plus the tail's share.
    """
    vocab, width = weight_VH.shape
    margin, spread, top = 6.0, 5.0, math.log(vocab)
    for _ in range(20):  # The tail's logits have a variance of about top^2 / H, which increases its sum.
        top = math.log(vocab) + margin + min(top**2 / width, math.log(vocab))
    first_N, second_N = torch.randint(vocab, (2, tokens), **draw)
    gap_N = spread * torch.randn(tokens, **draw).abs()
    rest_N1 = (top - gap_N).clamp_min(0)[:, None]
    return top * weight_VH[first_N].float() + rest_N1 * weight_VH[second_N].float()


def _sampled_targets(hidden_NH: Tensor, weight_VH: Tensor, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    step = max(1, _SAMPLING_ELEMENTS // weight_VH.shape[0])
    targets, logps = [], []
    for rows_RH in hidden_NH.split(step):
        logp_RV = (rows_RH @ weight_VH.T).float().log_softmax(-1)
        # Gumbel-max: multinomial refuses vocabularies above 2^24 and copies the probabilities.
        noise_RV = torch.empty_like(logp_RV).exponential_(generator=gen).log_().neg_()
        target_R = noise_RV.add_(logp_RV).argmax(-1)
        targets.append(target_R)
        logps.append(logp_RV.gather(1, target_R[:, None])[:, 0])
    return torch.cat(targets), torch.cat(logps)
