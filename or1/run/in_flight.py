"""Responses that outlive their step, as checkpoint data: rollouts that are ready or in the making, and open groups."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from or1.core.types import Group, OpenGroup, Prompt, Response, Score, Status
from or1.reward.terms import UNVERIFIABLE
from or1.rollout.collect import Rollout

_PREFIX = "rollout."
_DTYPES = {"token_ids": np.int32, "logp": np.float32, "versions": np.int32}


@dataclass
class Begun:
    """A rollout in the making, as far as it has come.

    number, stage_index  of its step
    groups               in the order of the rollout; a Group once all of its responses have scores
    """

    number: int
    stage_index: int
    groups: list[Group | OpenGroup]


@dataclass
class InFlight:
    """Rollout data that a step passes to the next.

    ahead    the next step's rollout, if it was generated early
    carried  groups that continue under the next policy
    lost     number of groups in the checkpoint whose prompts are no longer in the data
    begun    rollouts in the making at the time of the checkpoint, in step order (rollout.max_staleness above 1)
    making   returns the rollouts that are in the making now, which `to_checkpoint` saves as `begun`. Collective
    """

    ahead: Rollout | None = None
    carried: list[OpenGroup] = field(default_factory=list)
    lost: int = 0
    begun: list[Begun] = field(default_factory=list)
    making: Callable[[], list[Begun]] | None = None

    def to_checkpoint(self, prompts: Sequence[Prompt]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return JSON data and tensors, both empty if nothing is in flight. Collective.

        prompts  all prompts of the run; groups refer to them by index
        """
        begun = self.begun if self.making is None else self.making()
        index = {id(prompt): i for i, prompt in enumerate(prompts)}
        groups: list[Group | OpenGroup] = [*(self.ahead.groups if self.ahead else []), *self.carried]
        groups += [group for each in begun for group in each.groups]
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
        state: dict[str, Any] = {
            "groups": [[index[id(g.prompt)], _members(g), _mark(g.prompt)] for g in groups],
            "closed": None,
        }
        if begun:
            state["begun"] = [[each.number, each.stage_index, len(each.groups)] for each in begun]
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
        """Rebuild from the results of `to_checkpoint`.

        A prompt may have moved within the data. A group whose prompt is gone is dropped and counted in `lost`.
        """
        if not state:
            return cls()
        arrays = {name: tensors[_PREFIX + name].numpy() for name in _DTYPES}
        places = {_mark(prompt): i for i, prompt in enumerate(prompts)}
        closed: int | None = state["closed"]
        done: list[Group] = []
        carried: list[OpenGroup] = []
        begun = [Begun(number, stage, []) for number, stage, _ in state.get("begun", [])]
        # For each group at the end of the list, the rollout in the making that it belongs to.
        owners = [each for each, (*_, size) in zip(begun, state.get("begun", []), strict=True) for _ in range(size)]
        others = len(state["groups"]) - len(owners)
        at = lost = 0
        for number, (index, members, *mark) in enumerate(state["groups"]):
            tokens = sum(member[0] for member in members)
            part = {name: array[at : at + tokens] for name, array in arrays.items()}
            at += tokens
            place = _place(index, mark, prompts, places)
            if place is None:
                lost += 1
            elif closed is not None and number < closed:
                scores = [score for score in _scores(members) if score is not None]
                done.append(Group(prompts[place], _responses(members, part, tokenizer), tuple(scores)))
            elif number >= others:
                open_group = OpenGroup(prompts[place], _responses(members, part, tokenizer), _scores(members))
                owners[number - others].groups.append(_closed(open_group))
            else:
                carried.append(OpenGroup(prompts[place], _responses(members, part, tokenizer), _scores(members)))
        # A rollout without any group left is generated again.
        if closed is None or (closed and not done):
            return cls(None, carried, lost, begun)
        generate_s, reward_s = state["seconds"]
        ahead = Rollout(done, generate_s=generate_s, reward_s=reward_s, open=list(carried))
        return cls(ahead, carried, lost, begun)

    def leave_stage(self, *, keep_open: bool) -> int:
        """Drop what a stage made for its next step, which now belongs to another stage. Return the number of groups.

        The next stage may sample at another temperature, with other limits and group sizes.

        keep_open  keep open groups, which the next step continues
        """
        dropped = len(self.ahead.groups) if self.ahead else 0
        self.ahead = None
        if not keep_open:
            dropped += len(self.carried)
            self.carried = []
        return dropped

    def take_begun(self, number: int) -> Begun | None:
        """Remove the rollout of a step from `begun` and return it; None without one."""
        found = next((each for each in self.begun if each.number == number), None)
        if found is not None:
            self.begun.remove(found)
        return found


def _closed(group: OpenGroup) -> Group | OpenGroup:
    """Return the group as a Group if all of its scores are known."""
    scores = [score for score in group.scores if score is not None]
    return Group(group.prompt, group.responses, tuple(scores)) if len(scores) == len(group.scores) else group


def _place(index: int, mark: list[str], prompts: Sequence[Prompt], places: Mapping[str, int]) -> int | None:
    """Return the index of a group's prompt in today's data, None if it is gone.

    mark  one fingerprint; none in a checkpoint of an older or1, which recorded the index alone
    """
    if index < len(prompts) and (not mark or _mark(prompts[index]) == mark[0]):
        # Checked before the fingerprints, because the same problem may occur twice.
        return index
    return places.get(mark[0]) if mark else None


def _responses(
    members: list[list[Any]], part: Mapping[str, np.ndarray], tokenizer: PreTrainedTokenizerBase
) -> tuple[Response, ...]:
    responses, at = [], 0
    for length, finish, version, _ in members:
        token_ids, logp, versions = (part[name][at : at + length].copy() for name in _DTYPES)
        at += length
        text = str(tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))
        mixed = None if (versions == version).all() else versions
        responses.append(Response(token_ids, logp, finish=finish, version=version, text=text, versions=mixed))
    return tuple(responses)


def _scores(members: list[list[Any]]) -> tuple[Score | None, ...]:
    return tuple(None if score is None else _score(*score) for *_, score in members)


def _written(score: Score) -> list[Any]:
    """Return the arguments of `_score`. Without the last two they are as older versions of or1 wrote and read them."""
    unverifiable = [UNVERIFIABLE] if score.cause == UNVERIFIABLE else []
    return [score.reward, score.status.value, *([score.parts] if score.parts or unverifiable else []), *unverifiable]


def _score(reward: float, status: str, parts: Sequence[tuple[str, float]] = (), cause: str = "") -> Score:
    return Score(reward, Status(status), cause, tuple((name, value) for name, value in parts))


def _mark(prompt: Prompt) -> str:
    """Return a short fingerprint of a prompt and its gold answers, independent of its place in the data."""
    # Not the prompt's id, which may be a line number.
    golds = "\0".join(prompt.golds).encode("utf-8", "surrogatepass")
    return hashlib.sha256(np.asarray(prompt.token_ids, np.int64).tobytes() + golds).hexdigest()[:24]


def _members(group: Group | OpenGroup) -> list[list[Any]]:
    return [
        [len(r.token_ids), r.finish, r.version, None if score is None else _written(score)]
        for r, score in zip(group.responses, group.scores, strict=True)
    ]
