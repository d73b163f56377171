"""or1's head and its peers behind one interface: a variant runs a task's forward and backward on a problem.

Every peer is the installed package, called as its documentation shows. A peer that is not installed, or cannot run on
this device, gives a reason and is skipped by name. A peer that only scores gets its loss from problems.task_loss.
Legend: N rows, H hidden, V vocab.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.lib import imports
from benchmarks.lib.problems import OBJECTIVE, TASKS, Problem, task_loss
from or1_kernels import linear_logprob_entropy, linear_policy_loss
from or1_kernels.rows import resolve

# From hidden [N, H] and weight [V, H] with requires_grad: loss [], logp [N] or None, entropy [N] or None.
Forward = Callable[[Problem, str, Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Variant:
    """One way to compute a head.

    why_not      (device) -> reason why the variant cannot run there, or None
    tf32         True if its backward has fp32 GEMMs of bf16 inputs, which TF32 speeds up: measured with and without
    full_logits  True if it holds several [N, V] tensors
    factor       largest error allowed, as a multiple of plain torch's in the same dtype
    floor        error of gradients allowed in any case, for a variant that leaves out rows on purpose
    """

    name: str
    forward: Forward
    tasks: tuple[str, ...]
    why_not: Callable[[torch.device], str | None]
    tf32: bool = False
    full_logits: bool = False
    factor: float = 16.0
    floor: float = 0.0

    def runner(self, problem: Problem, task: str) -> Callable[[], SimpleNamespace]:
        """Return a function that runs one forward and backward and returns logp, entropy, dhidden and dweight."""
        if task not in self.tasks:
            raise ValueError(f"{self.name} has no task {task!r}; it has {self.tasks}")
        hidden, weight = (x.detach().requires_grad_() for x in (problem.hidden, problem.weight))

        def run() -> SimpleNamespace:
            loss, logp, entropy = self.forward(problem, task, hidden, weight)
            loss.backward()
            out = SimpleNamespace(
                logp=None if logp is None else logp.detach(),
                entropy=None if entropy is None else entropy.detach(),
                dhidden=hidden.grad,
                dweight=weight.grad,
            )
            hidden.grad = weight.grad = None
            return out

        return run


# Names on the package index of the modules that are not named like their package.
_PACKAGES = {"liger_kernel": "liger-kernel", "quack": "quack-kernels", "cut_cross_entropy": "cut-cross-entropy"}
_PACKAGES |= {"cutlass": "nvidia-cutlass-dsl"}


def _not_installed(package: str) -> str | None:
    if package in sys.modules or importlib.util.find_spec(package) is not None:
        return None
    return f"not installed: pip install {_PACKAGES.get(package, package)}"


def _anywhere(device: torch.device) -> str | None:
    return None


def _installed(module: str, *bare: str, gpu: bool = False) -> Callable[[torch.device], str | None]:
    """Return why_not of a peer in `module`. Its packages `bare` are imported without running their __init__."""

    def why_not(device: torch.device) -> str | None:
        if gpu and device.type != "cuda":
            return "needs a GPU, on which its kernels run"
        if missing := _not_installed(module.split(".")[0]):
            return missing
        try:
            imports.load(module, *bare)
        # A package built for another torch or CUDA raises more than ImportError.
        except Exception as error:  # noqa: BLE001
            return f"cannot import {module}: {error}"
        return None

    return why_not


def _or1(**options) -> Forward:
    def forward(p: Problem, task: str, hidden: Tensor, weight: Tensor):
        # The packer already has the index of the trained rows, so computing the index is not timed.
        rows = p.live if p.masked else None
        if task == "ce":  # on-policy with an advantage of 1: the gradient of -logp
            ones = torch.ones_like(p.advantages)
            loss, stats = linear_policy_loss(
                hidden, weight, p.targets, ones, token_weight=p.token_weight, rows=rows, **options
            )
        else:
            loss, stats = linear_policy_loss(
                hidden,
                weight,
                p.targets,
                p.advantages,
                token_weight=p.token_weight,
                old_logp=p.old_logp,
                objective=OBJECTIVE,
                entropy_coef=p.entropy_coef(task),
                rows=rows,
                **options,
            )
        return loss, stats.logp, stats.entropy

    return forward


def _or1_scores(stash: bool) -> Forward:
    def forward(p: Problem, task: str, hidden: Tensor, weight: Tensor):
        budget = 4 * hidden.shape[0] * weight.shape[0] if stash else 0
        logp, entropy = linear_logprob_entropy(hidden, weight, p.targets, stash_bytes=budget)
        return task_loss(p, task, logp, entropy), logp, entropy

    return forward


def _naive(p: Problem, task: str, hidden: Tensor, weight: Tensor):
    logp_NV = (hidden @ weight.T).float().log_softmax(-1)
    logp = logp_NV.gather(1, p.targets[:, None])[:, 0]
    entropy = None if task == "ce" else -(logp_NV.exp() * logp_NV).sum(-1)
    return task_loss(p, task, logp, entropy), logp, entropy


def _trl_default_functions() -> tuple[Callable, Callable]:
    try:
        utils = imports.load("trl.trainer.utils")
        return utils.selective_log_softmax, utils.selective_log_softmax_and_entropy
    except ImportError:  # The trainer's dependencies are missing; its GPU kernels need none of them.
        both = imports.load("trl.kernels.logprob_entropy", "trl", "trl.kernels").selective_log_softmax_and_entropy
        return lambda logits, index: both(logits, index)[0], both


def _why_not_trl_default(device: torch.device) -> str | None:
    if missing := _not_installed("trl"):
        return missing
    try:
        _trl_default_functions()
    except ImportError as error:
        return f"cannot import trl.trainer.utils: {error}"
    return None


def _trl_default(p: Problem, task: str, hidden: Tensor, weight: Tensor):
    only_logp, both = _trl_default_functions()
    logits_1NV = (hidden @ weight.T)[None]
    if task == "ce":
        logp_1N, entropy = only_logp(logits_1NV, p.targets[None]), None
    else:
        logp_1N, entropy_1N = both(logits_1NV, p.targets[None])
        entropy = entropy_1N[0]
    return task_loss(p, task, logp_1N[0], entropy), logp_1N[0], entropy


def _trl_chunked(p: Problem, task: str, hidden: Tensor, weight: Tensor):
    head = imports.load("trl.kernels.chunked_logprob", "trl", "trl.kernels").ChunkedLogProbFunction
    keep = p.live if p.masked else None
    rows, targets = (hidden, p.targets) if keep is None else (hidden[keep], p.targets[keep])
    outputs = () if task == "ce" else ("entropy",)
    # Positions of its arguments: bias, targets, temperature, chunk_size, final softcap, logit scale, outputs.
    logp, entropy, *_ = head.apply(rows, weight, None, targets, 1.0, 8192, None, 1.0, outputs)
    if keep is not None:
        logp, entropy = (
            None if x is None else x.new_zeros(len(p.targets)).index_copy(0, keep, x) for x in (logp, entropy)
        )
    return task_loss(p, task, logp, entropy), logp, entropy


def _liger_grpo(p: Problem, task: str, hidden: Tensor, weight: Tensor):
    loss_class = imports.load("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    # Compiling the loss on a CPU takes seconds of C++ build and changes little.
    head = loss_class(
        beta=0.0,
        use_ref_model=False,
        epsilon_low=OBJECTIVE.clip_low,
        epsilon_high=OBJECTIVE.clip_high,
        loss_type="dapo",
        temperature=1.0,
        compiled=hidden.is_cuda,
    )
    shape = (p.documents, len(p.targets) // p.documents)
    mask = (p.token_weight != 0).float().view(shape)
    loss, _ = head(
        hidden.view(*shape, -1),
        weight,
        p.targets.view(shape),
        mask,
        p.advantages.view(shape)[:, 0],
        old_per_token_logps=p.old_logp.view(shape),
    )
    return loss, None, None


def _liger_flce(accum_dtype: torch.dtype | None) -> Forward:
    def forward(p: Problem, task: str, hidden: Tensor, weight: Tensor):
        head = imports.load("liger_kernel.transformers.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyLoss
        targets = p.targets.masked_fill(p.token_weight == 0, -100)
        return head(accum_dtype=accum_dtype)(weight, hidden, targets), None, None

    return forward


def _verl_torch(p: Problem, task: str, hidden: Tensor, weight: Tensor):
    head = imports.load("verl.utils.experimental.torch_functional", "verl", "verl.utils").FusedLinearForPPO()
    logp, entropy = head(hidden, weight, p.targets, 1.0)
    return task_loss(p, task, logp, entropy), logp, entropy


def _verl_triton(p: Problem, task: str, hidden: Tensor, weight: Tensor):
    # Its forward imports the kernels, so load them first, without verl's own __init__.
    imports.load("verl.utils.kernel.kernels", "verl", "verl.utils")
    head = imports.load("verl.utils.kernel.linear_cross_entropy", "verl", "verl.utils").linear_cross_entropy
    logp, entropy = head(hidden, weight, p.targets, 1.0, "none", None)
    return task_loss(p, task, logp, entropy), logp, entropy


def _cce(p: Problem, task: str, hidden: Tensor, weight: Tensor):
    head = imports.load("cut_cross_entropy").linear_cross_entropy
    targets = p.targets.masked_fill(p.token_weight == 0, -100)
    nll = head(hidden, weight, targets, reduction="none", impl="cce")
    return (p.token_weight * nll).sum(), -nll, None


def _liger_scaled(p: Problem, task: str, hidden: Tensor, weight: Tensor):
    # Liger's scoring head: CuTe kernels on Hopper, else chunks in torch.
    head = imports.load("liger_kernel.ops.fused_linear_scaled_cross_entropy").LigerFusedLinearScaledCrossEntropyFunction
    out = head.apply(hidden, weight, p.targets, return_entropy=task != "ce")
    nll, entropy = (out, None) if task == "ce" else out
    return task_loss(p, task, -nll, entropy), -nll, entropy


def _why_not_liger_cute(device: torch.device) -> str | None:
    return _installed("cutlass.cute", gpu=True)(device) or _installed(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    )(device)


def _quack(p: Problem, task: str, hidden: Tensor, weight: Tensor):
    head = imports.load("quack.linear_cross_entropy").chunked_linear_cross_entropy
    targets = p.targets.masked_fill(p.token_weight == 0, -100)
    return head(hidden, weight, targets), None, None


def _why_not_or1_quack(device: torch.device) -> str | None:
    try:
        resolve("quack", device, torch.bfloat16)
    except RuntimeError as error:
        return str(error)
    return None


def _torch_fused(p: Problem, task: str, hidden: Tensor, weight: Tensor):
    # With options torch works in chunks; without, it makes all logits.
    options = torch.nn.LinearCrossEntropyOptions()
    targets = p.targets.masked_fill(p.token_weight == 0, -100)
    loss = torch.nn.functional.linear_cross_entropy(hidden, weight, targets, options=options)
    return loss, None, None


def _why_not_torch_fused(device: torch.device) -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions") and hasattr(torch.nn.functional, "linear_cross_entropy"):
        return None
    return f"torch {torch.__version__} has no linear_cross_entropy"


def or1_variant(name: str, **options) -> Variant:
    """Return or1's head with the options of linear_policy_loss, as a variant of all tasks."""
    return Variant(name, _or1(**options), TASKS, _anywhere, factor=2)


_SCORED = ("policy", "ce")
VARIANTS = {
    v.name: v
    for v in (
        Variant("or1", _or1(), TASKS, _anywhere, factor=2),
        Variant("or1 lean", _or1(preset="lean"), TASKS, _anywhere, factor=2),
        Variant(
            "or1 grad_row_eps=1e-4", _or1(grad_row_eps=1e-4), ("policy, no entropy",), _anywhere, factor=2, floor=1e-2
        ),
        Variant("or1 quack", _or1(impl="quack"), ("policy, no entropy", "ce"), _why_not_or1_quack, factor=2),
        Variant("or1 scores", _or1_scores(stash=False), _SCORED, _anywhere, factor=2),
        Variant("or1 scores, stashed", _or1_scores(stash=True), _SCORED, _anywhere, full_logits=True, factor=2),
        Variant("naive torch", _naive, TASKS, _anywhere, full_logits=True),
        Variant("TRL default", _trl_default, _SCORED, _why_not_trl_default, full_logits=True),
        Variant(
            "TRL chunked",
            _trl_chunked,
            _SCORED,
            _installed("trl.kernels.chunked_logprob", "trl", "trl.kernels"),
            tf32=True,
        ),
        Variant(
            "verl torch",
            _verl_torch,
            ("policy",),
            _installed("verl.utils.experimental.torch_functional", "verl", "verl.utils"),
            tf32=True,
        ),
        Variant(
            "verl Triton",
            _verl_triton,
            ("policy",),
            _installed("verl.utils.kernel.kernels", "verl", "verl.utils", gpu=True),
        ),
        Variant(
            "Liger FL-GRPO", _liger_grpo, ("policy, no entropy",), _installed("liger_kernel.chunked_loss"), tf32=True
        ),
        Variant(
            "Liger FLCE",
            _liger_flce(None),
            ("ce",),
            _installed("liger_kernel.transformers.fused_linear_cross_entropy", gpu=True),
        ),
        Variant(
            "Liger FLCE, fp32 dW",
            _liger_flce(torch.float32),
            ("ce",),
            _installed("liger_kernel.transformers.fused_linear_cross_entropy", gpu=True),
        ),
        Variant("Liger scores, CuTe", _liger_scaled, _SCORED, _why_not_liger_cute),
        Variant("QuACK", _quack, ("ce",), _installed("quack.linear_cross_entropy", gpu=True)),
        Variant("torch linear_cross_entropy", _torch_fused, ("ce",), _why_not_torch_fused),
        Variant("CCE", _cce, ("ce",), _installed("cut_cross_entropy", gpu=True)),
    )
}
