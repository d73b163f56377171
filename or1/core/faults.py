"""Injected faults for crash tests: OR1_FAULT=point:rankR:stepS:action, several separated by commas.

    OR1_FAULT=ckpt.after_shard:rank1:step3:kill      SIGKILL rank 1 after it has written its shard of step 3
    OR1_FAULT=train.gradient:rank0:step2+:inf        from step 2 on, an infinity in rank 0's gradient

`rank*` means every rank. With OR1_FAULT unset, `hit` is one comparison with None.
"""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from or1.core.errors import FaultError

_FORM = re.compile(r"([a-z_.]+):rank(\d+|\*):step(\d+)(\+?):([a-z]+)")


class _Fault(NamedTuple):
    point: str
    rank: str
    step: int
    onwards: bool
    action: str

    def applies(self, point: str, step: int) -> bool:
        right_step = step >= self.step if self.onwards else step == self.step
        return self.point == point and right_step and self.rank in ("*", os.environ.get("RANK", "0"))


def _parse(text: str | None) -> tuple[_Fault, ...] | None:
    if not text:
        return None
    return tuple(_parse_one(part, text) for part in text.split(","))


def _parse_one(part: str, text: str) -> _Fault:
    if (found := _FORM.fullmatch(part)) is None:
        raise FaultError(f"OR1_FAULT = {text!r} is not point:rankR:stepS:action; unset it for a run without faults")
    point, rank, step, onwards, action = found.groups()
    return _Fault(point=point, rank=rank, step=int(step), onwards=bool(onwards), action=action)


_FAULTS = _parse(os.environ.get("OR1_FAULT"))
_sent: set[_Fault] = set()
_step = 0


def at_step(step: int) -> None:
    """Set the step that `hit` compares with."""
    global _step
    _step = step


def hit(point: str, step: int | None = None) -> str | None:
    """Carry out the fault placed at this point, if any; return its action if the caller must act, else None.

    kill, term and hang happen here. enospc raises OSError as a full disk does, oom raises torch.OutOfMemoryError. Any
    other action is returned.
    """
    if _FAULTS is None:
        return None
    for fault in _FAULTS:
        if fault.applies(point, _step if step is None else step) and fault not in _sent:
            return _act(fault)
    return None


def poison(point: str, tensors: Iterable[Any]) -> None:
    """Overwrite one element of the first non-empty tensor with infinity, in place, if `point` has the action inf."""
    if hit(point) == "inf":
        next(tensor for tensor in tensors if tensor.numel()).view(-1)[0] = math.inf


def _act(fault: _Fault) -> str:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            # Only once: a step may pass the point several times, and a second SIGTERM ends the process at once.
            _sent.add(fault)
            os.kill(os.getpid(), signal.SIGTERM)
        case "hang":
            while True:
                time.sleep(1)
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "oom":
            # Only once unless the fault is permanent: the retry in shorter rows must succeed.
            if not fault.onwards:
                _sent.add(fault)
            raise _out_of_memory()
    return fault.action


def _out_of_memory() -> RuntimeError:
    import torch

    return torch.OutOfMemoryError("out of memory (OR1_FAULT)")
