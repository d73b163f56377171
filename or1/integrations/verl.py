"""The fused head and the MAGIC loss inside verl; importing this module installs them.

In every worker:  actor_rollout_ref.model.external_lib=or1.integrations.verl
With the head:    actor_rollout_ref.model.use_fused_kernels=True   (fused_kernel_options.impl_backend torch or triton)
With MAGIC:       actor_rollout_ref.actor.policy_loss.loss_mode=magic

The controller measures the entropy of a rollout, and moves, once for all of its mini-batches and epochs
(TrainingWorker.train_mini_batch). Responses without advantage are left out of both, but their tokens stay in the number
that verl divides the loss by, as in the released code.

Other settings of the entropy controller: a module of your own that calls install(...), named as external_lib.
Legend: B sequences, T tokens, N tokens in a row, H hidden, V vocab, C response tokens.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """A verl, or a use of it, that cannot be served; the message names the remedy."""


def install(**controller: Any) -> EntropyController:
    """Put the fused head in place of verl's and register the policy loss "magic". Idempotent.

    controller: settings of or1.magic.entropy.EntropyController; none are the released recipe's (target 0.2 nats,
    delta 1e-4, coefficient in [0, 5e-3] from 0). Returns the controller of this process; a later call replaces it.
    Raises UnsupportedVerlError if this verl lacks what is replaced.
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
    """(log-probs, entropy), f32 and shaped as labels, with verl's arguments; any vocabulary size.

    hidden [..., H], weight [V, H], labels int[...]; temperature a float, or [...] as labels; dist_process_group: the
    tensor-parallel ranks that hold the vocabulary in equal parts.
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
    # FSDP averages gradients over its ranks; a weight gathered outside its hooks has to do the same.
    from torch.distributed.tensor import Partial

    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


def _fused_linear_for_ppo(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)


def _install_head() -> None:
    # The forwards of the models import both names when they run, so that these two cover every backend.
    from verl.utils.experimental import torch_functional
    from verl.utils.kernel import linear_cross_entropy as module

    for owner, name in ((torch_functional, "FusedLinearForPPO"), (module, "linear_cross_entropy")):
        if not hasattr(owner, name):
            raise UnsupportedVerlError(f"this verl has no {owner.__name__}.{name}; tested with verl {TESTED}")
    torch_functional.FusedLinearForPPO.forward = _fused_linear_for_ppo
    module.linear_cross_entropy = linear_cross_entropy
    # Megatron's forwards bind the name when they are imported.
    import sys

    for name in ("model_forward_fused", "model_forward_1f1b_overlap"):
        loaded = sys.modules.get(f"verl.models.mcore.{name}")
        if loaded is not None:
            loaded.linear_cross_entropy = linear_cross_entropy


class _Magic:
    """This process's controller, the rollout that it trains on, and whether verl is patched."""

    def __init__(self) -> None:
        self.controller = EntropyController()
        self.installed = False
        self.present: tuple[float, float] | None = None

    @contextlib.contextmanager
    def rollout(self, data: Any, group: ProcessGroup | None) -> Iterator[tuple[float, float]]:
        """Its entropy and the coefficient for all of its mini-batches; the controller moves once, at the end.

        Within a rollout it is the one at work. If nothing of a rollout has an advantage, its entropy is NaN, there is
        no bonus, and the controller stays where it is.
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
    """The clipped loss of MAGIC (report, Eq. 3.1) with verl's arguments: tensors [B, C], rollout_is_weights in `given`.

    A sum over tokens of -min(r A, clip(r) A) divided by the trained tokens of the whole mini-batch on all ranks, which
    is what verl's global "token-mean" is; no dual clip, no clamp. Raises UnsupportedVerlError for another
    loss_agg_mode.
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
        worker = getattr(importlib.import_module(name), "TrainingWorker", None)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("verl"):
            raise UnsupportedVerlError(f"this verl has no {error.name}; tested with verl {TESTED}") from error
        # Something that verl's workers need is not installed: no training can begin in this process.
        return
    if not hasattr(worker, "train_mini_batch"):
        raise UnsupportedVerlError(
            f"this verl has no {name}.TrainingWorker.train_mini_batch, which trains on a whole "
            f"rollout; tested with verl {TESTED}"
        )
    worker.train_mini_batch = _once_a_rollout(worker.train_mini_batch)


def _subclasses(cls: type) -> list[type]:
    return [c for direct in cls.__subclasses__() for c in (direct, *_subclasses(direct))]


def _uses_magic(loss_function: Any) -> bool:
    config = getattr(loss_function, "keywords", {}).get("config")
    # A critic has a config without a policy loss.
    return getattr(getattr(config, "policy_loss", None), "loss_mode", None) == LOSS_MODE


def _once_a_rollout(train_mini_batch: Any) -> Any:
    """Measure the entropy of a whole rollout before it is cut up, and move the controller after all of its parts."""

    @functools.wraps(train_mini_batch)
    def wrapped(self: Any, data: Any) -> Any:
        if not _uses_magic(self.loss_fn):
            return train_mini_batch(self, data)
        with _MAGIC.rollout(data, self.engine.get_data_parallel_group()):
            return train_mini_batch(self, data)

    return wrapped


def _with_coefficient(train_batch: Any) -> Any:
    """Set the entropy coefficient of a mini-batch, the same on all ranks, and reject what has no advantage."""
    from verl.utils.tensordict_utils import assign_non_tensor

    @functools.wraps(train_batch)
    def wrapped(self: Any, data: Any, loss_function: Any) -> Any:
        if not _uses_magic(loss_function):
            return train_batch(self, data, loss_function)
        # A mini-batch that comes alone is a rollout of its own.
        with _MAGIC.rollout(data, self.get_data_parallel_group()) as (entropy, alpha):
            # verl freezes its configs and reads this one in every micro-batch. It asks for entropies only where the
            # coefficient of its own config is not 0, and this one starts there.
            object.__setattr__(loss_function.keywords["config"], "entropy_coeff", alpha)
            assign_non_tensor(data, calculate_entropy=True)
            data["response_mask"] = kept_mask(data)
            outputs = train_batch(self, data, loss_function)
        if self.is_mp_src_rank_with_outputs():
            outputs["metrics"] |= {"actor/rollout_entropy": entropy, "actor/entropy_coeff": alpha}
        return outputs

    return wrapped


def kept_mask(data: Any) -> Tensor:
    """data["response_mask"] without responses whose advantages are all 0: those of equal rewards (report, section 3.1).

    Tensors [B, C], dense or nested as verl's engines have them. Such responses have no policy gradient, but the entropy
    bonus would act on them, which are solved or hopeless problems.
    """
    mask, advantages = data["response_mask"], data["advantages"]
    if not mask.is_nested:
        return mask * (advantages != 0).any(1, keepdim=True).to(mask.dtype)
    rows = zip(mask.unbind(), advantages.unbind(), strict=True)
    # Not from values and offsets: a tensor made so is padded to the length of all responses together.
    return torch.nested.as_nested_tensor([m * (a != 0).any().to(m.dtype) for m, a in rows], layout=torch.jagged)


def kept_entropy(data: Any, group: ProcessGroup | None = None) -> float:
    """e_k of Eq. 3.2 over the tokens of `kept_mask`, on all ranks of `group`; nats. NaN if there are none.

    data["old_log_probs"], data["advantages"] and data["response_mask"] are [B, C], dense or nested.
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
