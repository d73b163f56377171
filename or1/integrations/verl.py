"""The fused head and the MAGIC loss inside verl; importing this module installs them.

In every worker:  actor_rollout_ref.model.external_lib=or1.integrations.verl
With the head:    actor_rollout_ref.model.use_fused_kernels=True   (fused_kernel_options.impl_backend torch or triton)
With MAGIC:       actor_rollout_ref.actor.policy_loss.loss_mode=magic

The entropy of a rollout is measured once and the entropy controller updated once, for all mini-batches and epochs of
the rollout (TrainingWorker.train_mini_batch). Responses without advantage are excluded from the loss and the entropy.
Their tokens still count in verl's denominator of the loss, as in the released code.

For other settings of the entropy controller, name your own module as external_lib and call install(...) in it.
Legend: B sequences, T tokens, N tokens in a row, H hidden, V vocab, C response tokens.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from or1.magic.tensors import EntropyController, rollout_entropy
from or1_kernels import PolicyObjective, linear_logprob_entropy, token_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TESTED = "0.9.1"
LOSS_MODE = "magic"
STATE_FILE = "or1_entropy_controller.json"


class UnsupportedVerlError(RuntimeError):
    """A verl version or setting that is not supported; the message names the remedy."""


class ControllerDict(TypedDict, total=False):
    """The fields of or1.magic.entropy.EntropyController as keyword arguments."""

    coef: float
    gate: bool
    target: float
    delta: float
    coef_min: float
    coef_max: float
    variant: Literal["script", "paper"]
    control: Literal["none", "constant", "adaptive"]


def install(**controller: Unpack[ControllerDict]) -> EntropyController:
    """Replace verl's fused head and register the policy loss "magic".

    A later call replaces the controller and patches nothing twice.

    Args:
        **controller: the fields of or1.magic.EntropyController. The defaults are the released recipe's: target 0.2
            nats, delta 1e-4, coefficient in [0, 5e-3] from 0.

    Returns:
        This process's controller.

    Raises:
        UnsupportedVerlError: this verl lacks a name that is replaced.
        ValueError: a setting outside the controller's limits.
    """
    _MAGIC.controller = EntropyController(**controller)
    if not _MAGIC.installed:
        _install_head()
        _install_loss()
        _MAGIC.installed = True
    return _MAGIC.controller


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies for the arguments of verl's own function, at any vocabulary size.

    Args:
        hidden: [..., H].
        weight: [V, H], a tensor or a DTensor, which is gathered.
        labels: int[...], token ids.
        temperature: a float, or [...] like labels.
        reduction: "none".
        dist_process_group: tensor-parallel ranks that hold the vocabulary in equal parts; None: one rank holds all.

    Returns:
        (log-probs, entropy), each f32 in the shape of labels, nats.

    Raises:
        UnsupportedVerlError: another reduction.
    """
    if reduction != "none":
        raise UnsupportedVerlError(f"reduction is {reduction!r}; this head returns one value a token, reduction='none'")
    if isinstance(weight, DTensor):
        weight = _whole(weight)
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(labels.shape).reshape(-1)
    hidden_NH = hidden.reshape(-1, hidden.shape[-1]).to(weight.dtype)
    logp_N, entropy_N = linear_logprob_entropy(
        hidden_NH, weight, labels.reshape(-1).long(), temperature=temperature, group=dist_process_group
    )
    return logp_N.view(labels.shape), entropy_N.view(labels.shape)


def _whole(weight: DTensor) -> Tensor:
    # FSDP averages gradients over its ranks, so a weight gathered outside its hooks must do the same.
    from torch.distributed.tensor import Partial

    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


def _fused_linear_for_ppo(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)


def _install_head() -> None:
    # The models' forwards import both names at run time, so replacing these two covers every backend.
    from verl.utils.experimental import torch_functional
    from verl.utils.kernel import linear_cross_entropy as module

    for owner, name in ((torch_functional, "FusedLinearForPPO"), (module, "linear_cross_entropy")):
        if not hasattr(owner, name):
            raise UnsupportedVerlError(f"this verl has no {owner.__name__}.{name}; tested with verl {TESTED}")
    torch_functional.FusedLinearForPPO.forward = _fused_linear_for_ppo
    module.linear_cross_entropy = linear_cross_entropy
    # Megatron's forwards bind the name at import time.
    for name in ("model_forward_fused", "model_forward_1f1b_overlap"):
        loaded = sys.modules.get(f"verl.models.mcore.{name}")
        if loaded is not None:
            vars(loaded)["linear_cross_entropy"] = linear_cross_entropy


class _Magic:
    """State of this process: the controller, whether verl is patched, and the current rollout.

    present  (entropy, coefficient) of the rollout in training; None between rollouts
    """

    def __init__(self) -> None:
        self.controller = EntropyController()
        self.installed = False
        self.present: tuple[float, float] | None = None

    @contextlib.contextmanager
    def rollout(self, data: Any, group: ProcessGroup | None) -> Iterator[tuple[float, float]]:
        """Yield the rollout's entropy and the coefficient for its mini-batches, then update the controller.

        A nested call yields the outer rollout's numbers. If no response has an advantage, the entropy is NaN, the
        coefficient is 0, and the controller is not updated.
        """
        if self.present is not None:
            yield self.present
            return
        entropy = kept_entropy(data, group)
        alpha = 0.0 if math.isnan(entropy) else self.controller.alpha(entropy)
        self.present = entropy, alpha
        try:
            yield self.present
        finally:
            self.present = None
        if not math.isnan(entropy):
            self.controller.update(entropy)


_MAGIC = _Magic()


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    **given: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Return MAGIC's clipped loss (report, Eq. 3.1) and metrics, for the arguments of verl's policy losses.

    The loss sums -min(r A, clip(r) A) over tokens. Its denominator is the trained tokens of the mini-batch on all
    ranks, as in verl's global "token-mean". There is no dual clip and no clamp.

    Args:
        old_log_prob: [B, C], nats, under the policy that the clip compares with.
        log_prob: [B, C], nats, under the current policy.
        advantages: [B, C].
        response_mask: [B, C], 1 for the tokens that count.
        loss_agg_mode: "token-mean".
        config: verl's ActorConfig, for clip_ratio, clip_ratio_low, clip_ratio_high and global_batch_info.
        **given: rollout_is_weights [B, C], or nothing.

    Returns:
        (loss [], metrics actor/pg_clipfrac and actor/ppo_kl).

    Raises:
        UnsupportedVerlError: another loss_agg_mode.
    """
    from verl.trainer.ppo.core_algos import agg_loss

    if loss_agg_mode != "token-mean":
        raise UnsupportedVerlError(
            f'actor.loss_agg_mode is {loss_agg_mode!r}; MAGIC divides by trained tokens, set "token-mean"'
        )
    low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
    objective = PolicyObjective(clip_low=low, clip_high=high)
    shape = log_prob.shape
    terms = token_loss(objective, log_prob.reshape(-1), advantages.reshape(-1), old_logp_N=old_log_prob.reshape(-1))
    loss_BC = terms.loss_N.view(shape)
    weights = given.get("rollout_is_weights")
    if weights is not None:
        loss_BC = loss_BC * weights
    mask = response_mask.to(loss_BC.dtype)
    tokens = mask.sum().clamp(min=1)
    loss = agg_loss(loss_mat=loss_BC, loss_mask=mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    clipped = (terms.clipped_N.view(shape) * mask).sum() / tokens
    kl = ((old_log_prob - log_prob.detach()) * mask).sum() / tokens
    return loss, {"actor/pg_clipfrac": float(clipped), "actor/ppo_kl": float(kl)}


def _install_loss() -> None:
    from verl.trainer.ppo.core_algos import register_policy_loss
    from verl.workers.engine.base import BaseEngine

    _install_worker()
    register_policy_loss(LOSS_MODE)(policy_loss)
    BaseEngine.train_batch = _with_coefficient(BaseEngine.train_batch)
    for engine in _subclasses(BaseEngine):
        for name, wrap in (("save_checkpoint", _saving), ("load_checkpoint", _loading)):
            if name in vars(engine):
                setattr(engine, name, wrap(vars(engine)[name]))


def _install_worker() -> None:
    name = "verl.workers.engine_workers"
    try:
        worker: Any = getattr(importlib.import_module(name), "TrainingWorker", None)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("verl"):
            raise UnsupportedVerlError(f"this verl has no {error.name}; tested with verl {TESTED}") from error
        # A dependency of verl's workers is not installed, so this process cannot train.
        return
    if not hasattr(worker, "train_mini_batch"):
        raise UnsupportedVerlError(
            f"this verl has no {name}.TrainingWorker.train_mini_batch, which trains on a whole "
            f"rollout; tested with verl {TESTED}"
        )
    worker.train_mini_batch = _once_a_rollout(worker.train_mini_batch)


def _subclasses(cls: type) -> list[type]:
    direct: list[type] = cls.__subclasses__()
    return [c for child in direct for c in (child, *_subclasses(child))]


def _uses_magic(loss_function: Any) -> bool:
    config = getattr(loss_function, "keywords", {}).get("config")
    # A critic has a config without a policy loss.
    return getattr(getattr(config, "policy_loss", None), "loss_mode", None) == LOSS_MODE


def _once_a_rollout(train_mini_batch: Any) -> Any:
    """Measure the entropy of a rollout before its first mini-batch, and update the controller after the last."""

    @functools.wraps(train_mini_batch)
    def wrapped(self: Any, data: Any) -> Any:
        if not _uses_magic(self.loss_fn):
            return train_mini_batch(self, data)
        with _MAGIC.rollout(data, self.engine.get_data_parallel_group()):
            return train_mini_batch(self, data)

    return wrapped


def _with_coefficient(train_batch: Any) -> Any:
    """Set the entropy coefficient of a mini-batch, equal on all ranks, and mask responses without advantage."""
    from verl.utils.tensordict_utils import assign_non_tensor

    @functools.wraps(train_batch)
    def wrapped(self: Any, data: Any, loss_function: Any) -> Any:
        if not _uses_magic(loss_function):
            return train_batch(self, data, loss_function)
        # A mini-batch outside train_mini_batch counts as a rollout of its own.
        with _MAGIC.rollout(data, self.get_data_parallel_group()) as (entropy, alpha):
            # verl freezes its configs, hence object.__setattr__. Every micro-batch reads this field. verl computes
            # entropies only if its own coefficient is not 0; MAGIC's may be 0, so ask for entropies explicitly.
            object.__setattr__(loss_function.keywords["config"], "entropy_coeff", alpha)
            assign_non_tensor(data, calculate_entropy=True)
            data["response_mask"] = kept_mask(data)
            outputs = train_batch(self, data, loss_function)
        if self.is_mp_src_rank_with_outputs():
            outputs["metrics"] |= {"actor/rollout_entropy": entropy, "actor/entropy_coeff": alpha}
        return outputs

    return wrapped


def kept_mask(data: Any) -> Tensor:
    """Return the mask of a batch without responses whose advantages are all 0 (report, section 3.1).

    Such responses come from groups of equal rewards: solved or hopeless problems. They have no policy gradient, but the
    entropy bonus would act on them.

    Args:
        data: holds response_mask and advantages, [B, C], dense or nested as in verl's engines.

    Returns:
        A mask of the form of data["response_mask"].
    """
    mask, advantages = data["response_mask"], data["advantages"]
    if not mask.is_nested:
        return mask * (advantages != 0).any(1, keepdim=True).to(mask.dtype)
    rows = zip(mask.unbind(), advantages.unbind(), strict=True)
    # Not from values and offsets: padding such a tensor gives rows as long as all responses together.
    return torch.nested.as_nested_tensor([m * (a != 0).any().to(m.dtype) for m, a in rows], layout=torch.jagged)


def kept_entropy(data: Any, group: ProcessGroup | None = None) -> float:
    """Return e_k of the report's Eq. 3.2 over the tokens of `kept_mask`.

    Args:
        data: holds old_log_probs (nats), advantages and response_mask, [B, C], dense or nested.
        group: ranks to average over; None: all.

    Returns:
        Nats a token; nan without a token.
    """
    logp, mask = (x.values() if x.is_nested else x for x in (data["old_log_probs"], kept_mask(data)))
    kept = mask.sum(dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(kept, group=group)
    return rollout_entropy(logp, mask, group) if kept > 0 else math.nan


def _saving(save_checkpoint: Any) -> Any:
    @functools.wraps(save_checkpoint)
    def wrapped(self: Any, local_path: str, *args: Any, **kwargs: Any) -> Any:
        result = save_checkpoint(self, local_path, *args, **kwargs)
        if not dist.is_initialized() or dist.get_rank() == 0:
            Path(local_path).mkdir(parents=True, exist_ok=True)
            (Path(local_path) / STATE_FILE).write_text(json.dumps(_MAGIC.controller.state()), encoding="utf-8")
        return result

    return wrapped


def _loading(load_checkpoint: Any) -> Any:
    @functools.wraps(load_checkpoint)
    def wrapped(self: Any, local_path: str, *args: Any, **kwargs: Any) -> Any:
        result = load_checkpoint(self, local_path, *args, **kwargs)
        path = None if local_path is None else Path(local_path) / STATE_FILE
        if path is not None and path.is_file():
            _MAGIC.controller.restore(json.loads(path.read_text(encoding="utf-8")))
        return result

    return wrapped


install()
