"""Faults on purpose, for the tests of what a run survives: OR1_FAULT=point:rankR:stepS:action, several with commas.

    OR1_FAULT=ckpt.after_shard:rank1:step3:kill      SIGKILL rank 1 when it has written its shard of step 3
    OR1_FAULT=train.gradient:rank0:step2+:inf        from step 2 on, an infinity in rank 0's gradient

`rank*` is every rank. Unset, `hit` is one comparison with None.
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
    matches = [_FORM.fullmatch(part) for part in text.split(",")]
    if None in matches:
        raise FaultError(f"OR1_FAULT = {text!r} is not point:rankR:stepS:action; unset it for a run without faults")
    return tuple(_Fault(m[1], m[2], int(m[3]), bool(m[4]), m[5]) for m in matches)


_FAULTS = _parse(os.environ.get("OR1_FAULT"))
_sent: set[_Fault] = set()
_step = 0


def at_step(step: int) -> None:
    """Say which step the run is in."""
    global _step
    _step = step


def hit(point: str, step: int | None = None) -> str | None:
    """Pass a point where a fault may be placed; returns the action if it is one that the caller carries out.

    kill, term and hang happen here; enospc raises OSError as a full disk does, oom what torch raises out of memory.
    """
    if _FAULTS is None:
        return None
    for fault in _FAULTS:
        if fault.applies(point, _step if step is None else step) and fault not in _sent:
            return _act(fault)
    return None


def _act(fault: _Fault) -> str:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            # Once: a point may be passed several times in a step, and a second SIGTERM means something else.
            _sent.add(fault)
            os.kill(os.getpid(), signal.SIGTERM)
        case "hang":
            while True:
                time.sleep(1)
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "oom":
            # Once, unless it is to last: the smaller row that comes next should fit.
            if not fault.onwards:
                _sent.add(fault)
            raise _out_of_memory()
    return fault.action


def _out_of_memory() -> RuntimeError:
    import torch

    return torch.OutOfMemoryError("out of memory (OR1_FAULT)")


def poison(point: str, gradients: Iterable[Any]) -> None:
    """Write an infinity into the first gradient that is not empty, if fault `point` is due with action "inf"."""
    if hit(point) == "inf":
        next(gradient for gradient in gradients if gradient.numel()).view(-1)[0] = math.inf
