"""Responses that outlive their step, as data for a checkpoint: those generated one step ahead, and open groups."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from or1.core.types import Group, OpenGroup, Prompt, Response, Score, Status
from or1.rollout.collect import Rollout

_PREFIX = "rollout."
_DTYPES = {"token_ids": np.int32, "logp": np.float32, "versions": np.int32}


@dataclass
class InFlight:
    """What a step leaves to the next: `ahead`, the next step's rollout if it was generated early; `carried`, groups
    that go on under the next policy. `lost` counts groups of a checkpoint whose prompts are gone."""

    ahead: Rollout | None = None
    carried: list[OpenGroup] = field(default_factory=list)
    lost: int = 0

    def to_checkpoint(self, prompts: Sequence[Prompt]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain data and tensors; nothing of either where nothing is in flight. `prompts` are those of the run."""
        index = {id(prompt): i for i, prompt in enumerate(prompts)}
        groups: list[Group | OpenGroup] = [*(self.ahead.groups if self.ahead else []), *self.carried]
        if not groups and self.ahead is None:
            return {}, {}
        responses = [response for group in groups for response in group.responses]
        columns = {
            "token_ids": [r.token_ids for r in responses],
            "logp": [r.logp for r in responses],
            "versions": [r.token_versions for r in responses],
        }
        tensors = {
            _PREFIX + name: torch.from_numpy(np.concatenate([np.empty(0, _DTYPES[name]), *parts]).astype(_DTYPES[name]))
            for name, parts in columns.items()
        }
        state = {"groups": [[index[id(g.prompt)], _members(g), _mark(g.prompt)] for g in groups], "closed": None}
        if self.ahead is not None:
            state["closed"] = len(self.ahead.groups)
            state["seconds"] = [self.ahead.generate_s, self.ahead.reward_s]
        return state, tensors

    @classmethod
    def from_checkpoint(
        cls,
        state: dict[str, Any],
        tensors: Mapping[str, Tensor],
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
    ) -> InFlight:
        """The inverse of `to_checkpoint`. A prompt may be elsewhere now; a group whose prompt is gone is lost."""
        if not state:
            return cls()
        arrays = {name: tensors[_PREFIX + name].numpy() for name in _DTYPES}
        places = {_mark(prompt): i for i, prompt in enumerate(prompts)}
        closed = state["closed"]
        done, carried, at, lost = [], [], 0, 0
        for number, (index, members, *mark) in enumerate(state["groups"]):
            responses = []
            for length, finish, version, _ in members:
                part = {name: array[at : at + length].copy() for name, array in arrays.items()}
                at += length
                text = tokenizer.decode(part["token_ids"].tolist(), skip_special_tokens=True)
                mixed = None if (part["versions"] == version).all() else part["versions"]
                responses.append(Response(part["token_ids"], part["logp"], finish, version, text, mixed))
            scores = tuple(None if m[3] is None else Score(m[3][0], Status(m[3][1])) for m in members)
            # Without a mark the state is of an older or1, which had the place alone.
            place = places.get(mark[0]) if mark else index if index < len(prompts) else None
            # The same problem may come twice, and has its place then.
            if mark and index < len(prompts) and _mark(prompts[index]) == mark[0]:
                place = index
            if place is None:
                lost += 1
            elif closed is not None and number < closed:
                done.append(Group(prompts[place], tuple(responses), scores))
            else:
                carried.append(OpenGroup(prompts[place], tuple(responses), scores))
        # A rollout that lost all its groups is made anew.
        ahead = None if closed is None or (closed and not done) else Rollout(done, *state["seconds"], list(carried))
        return cls(ahead, carried, lost)


def _mark(prompt: Prompt) -> str:
    """Return a short name of what a response was written for, wherever the prompt is in the data."""
    # Not its id, which may be a line's number.
    golds = "\0".join(prompt.golds).encode("utf-8", "surrogatepass")
    return hashlib.sha256(np.asarray(prompt.token_ids, np.int64).tobytes() + golds).hexdigest()[:24]


def _members(group: Group | OpenGroup) -> list[list[Any]]:
    return [
        [len(r.token_ids), r.finish, r.version, None if score is None else [score.reward, score.status.value]]
        for r, score in zip(group.responses, group.scores, strict=True)
    ]
