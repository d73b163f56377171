"""Routers of a mixture-of-experts model: how evenly they use the experts, and the loss that keeps the load balanced."""

# T packed tokens of a row, N trained tokens of a row, E experts, K experts per token, L layers with a router

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from or1.core.errors import ModelError
from or1.dist.world import World
from or1.model.rows import Microbatch


class _Router(NamedTuple):
    """A module whose output, or element `place` of that, is router logits float[T, E]."""

    module: nn.Module
    place: int


class Routers:
    """The routers of a model. `with routers.row(batch):` around a forward collects what they decide.

    The statistics are over the tokens that predict trained tokens, as those of the policy loss. So they depend neither
    on packing and padding nor on shared prompts. The recomputation of a checkpointed layer is not counted again.

    coef   factor of the load-balancing loss; 0: no such loss
    top_k  experts of each token
    """

    def __init__(self, routers: list[_Router], coef: float, top_k: int):
        self.coef, self._top_k = coef, top_k
        self._places = {router.module: place for place, router in enumerate(routers)}
        self._rows_N: Tensor | None = None
        self._last_rows_N: Tensor | None = None
        self._logits: list[Tensor] = []
        self._share_E: Tensor | None = None
        self.begin()
        for router in routers:
            router.module.register_forward_hook(self._hook(router))

    def begin(self, share_E: Tensor | None = None) -> None:
        """Forget all tokens. share_E: result of `shares` over the same rows, for `loss`."""
        self._counts_LE: dict[int, Tensor] = {}
        self._entropy, self._tokens = torch.zeros((), dtype=torch.float64), 0
        self._share_E = share_E

    @contextmanager
    def row(self, batch: Microbatch) -> Iterator[None]:
        """Collect the decisions of all routers in a forward over `batch`."""
        self._rows_N, self._logits = batch.rows_N, []
        self._tokens += len(batch.rows_N)
        try:
            yield
        finally:
            self._rows_N, self._last_rows_N = None, batch.rows_N

    def loss(self) -> Tensor | None:
        """Return the part of the last row in the load-balancing loss of the update, f32[]; None without such a loss.

        The loss is coef * E * sum_e f_e P_e (Fedus et al. 2021, Eq. 4 to 6, as transformers sums it over all layers).
        f_e is the share of tokens that went to expert e, P_e the mean probability of e. Both are over all tokens of
        the update on all ranks, so the gradient does not depend on packing.
        """
        if self._share_E is None or not self._logits:
            return None
        total_E = torch.stack([_probability(each_TE[self._last_rows_N]).sum(0) for each_TE in self._logits]).sum(0)
        return self.coef * len(total_E) * (self._share_E.to(total_E) * total_E).sum()

    def shares(self, world: World) -> Tensor:
        """Return f_e / (L N) over all collected rows of all ranks, f64[E]: the weight of a token's probability of e.

        Collective.
        """
        counts_LE = self._all_counts(world)
        places = float(counts_LE.sum()) / self._top_k
        return counts_LE.sum(0) / max(places, 1.0) ** 2

    def metrics(self, world: World) -> dict[str, float]:
        """Return the metrics of all collected rows of all ranks, {} without a token. Collective."""
        counts_LE = self._all_counts(world)
        sums = world.sum(torch.stack([self._entropy.cpu(), torch.tensor(float(self._tokens), dtype=torch.float64)]))
        if not float(sums[1]):
            return {}
        layers, experts = counts_LE.shape
        load_LE = counts_LE / counts_LE.sum(1, keepdim=True).clamp(min=1)
        return {
            "router/entropy": float(sums[0]) / (float(sums[1]) * layers),
            "router/load_max": float(load_LE.max(1).values.mean()) * experts,
            "router/unused": float((counts_LE == 0).double().mean()),
        }

    def _all_counts(self, world: World) -> Tensor:
        """Return the number of tokens of each expert in each layer on all ranks, f64[L, E]."""
        counts_LE = torch.stack([self._counts_LE[place] for place in sorted(self._counts_LE)]).double().cpu()
        return world.sum(counts_LE.flatten()).view_as(counts_LE)

    def _hook(self, router: _Router) -> Any:
        def collect(module: nn.Module, _: object, output: Any) -> None:
            if self._rows_N is None:
                return
            logits_TE, chosen_TK = _decision(output, router.place, self._top_k)
            if self._share_E is not None and torch.is_grad_enabled():
                # Not its softmax: a layer that runs again would have to save the same tensors, and collects nothing.
                self._logits.append(logits_TE)
            with torch.no_grad():
                self._add(self._places[module], logits_TE[self._rows_N], chosen_TK[self._rows_N])

        return collect

    def _add(self, place: int, logits_NE: Tensor, chosen_NK: Tensor) -> None:
        chosen = chosen_NK.flatten()
        counts_E = torch.zeros(logits_NE.shape[1], dtype=torch.int64, device=chosen.device)
        counts_E.scatter_add_(0, chosen, torch.ones_like(chosen))
        self._counts_LE[place] = self._counts_LE.get(place, 0) + counts_E
        entropy = torch.special.entr(_probability(logits_NE)).sum(dtype=torch.float64)
        self._entropy = self._entropy + entropy


def _probability(logits_NE: Tensor) -> Tensor:
    return logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32)).softmax(-1)


def _decision(output: Any, at: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the logits float[T, E] and the chosen experts i64[T, K] of a router."""
    outputs = output if isinstance(output, tuple) else (output,)
    logits_TE = outputs[at].reshape(-1, outputs[at].shape[-1])
    # Some routers choose with a bias that is not in their logits; those return their choice too.
    chosen = [each for each in outputs if isinstance(each, Tensor) and each.dtype == torch.int64 and each.ndim > 1]
    chosen_TK = chosen[0].reshape(len(logits_TE), -1) if chosen else logits_TE.topk(top_k, dim=-1).indices
    return logits_TE, chosen_TK


def routers_of(model: PreTrainedModel, coef: float | None) -> Routers | None:
    """Return the routers of a model, None for a model without experts.

    coef  factor of the load-balancing loss; None: as config.json says, router_aux_loss_coef if output_router_logits is
          true, else 0

    Raises ModelError for a factor above 0 if transformers defines no such loss for the architecture.
    """
    found = [router for part in model.modules() if isinstance(part, PreTrainedModel) for router in _routers_in(part)]
    routers = list({router.module: router for router in found}.values())
    settings = model.config.get_text_config()
    own = getattr(settings, "router_aux_loss_coef", None)
    if coef is None:
        coef = float(own or 0.0) if routers and getattr(settings, "output_router_logits", False) else 0.0
    if coef and (own is None or not routers):
        raise ModelError(
            f"model.router_aux_coef = {coef:g}, but transformers defines no load-balancing loss for "
            f"{model.config.model_type!r}; remove the setting"
        )
    top_k = getattr(settings, "num_experts_per_tok", None)
    return Routers(routers, coef, int(top_k or 1)) if routers else None


def _routers_in(part: PreTrainedModel) -> Iterator[_Router]:
    """Yield the modules whose router logits transformers can record."""
    recorder = (getattr(type(part), "_can_record_outputs", None) or {}).get("router_logits")
    listed: list[Any] = recorder if isinstance(recorder, list) else [recorder]
    for each in listed:
        target = getattr(each, "target_class", None)
        if target is not None:
            yield from (_Router(module, each.index) for module in part.modules() if isinstance(module, target))
