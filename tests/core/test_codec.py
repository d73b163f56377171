"""Groups as bytes: back bit for bit, and nothing that could not come back."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from safetensors.numpy import save

from or1.core import codec as wire
from or1.core import types
from or1.core.types import Group, Prompt, Response, Score, Status


def test_a_group_comes_back_bit_for_bit() -> None:
    prompt = Prompt("a:1", "a", "1+1", np.arange(3, dtype=np.int32), ("2",), row={"x": [1, None, {"y": 0.1}]})
    logp = np.array([-0.1, np.nan, -np.inf], np.float32)
    full = Response(np.array([5, 6, 1], np.int32), logp, "stop", 3, "2\u00e9", np.array([2, 3, 3], np.int32))
    empty = Response(np.empty(0, np.int32), np.empty(0, np.float32), "deadline", 3, "")
    group = Group(prompt, (full, empty), (Score(1.0, Status.OK), Score(math.nan, Status.TIMEOUT)))
    back = wire.loads(wire.dumps(((0, True, group), 0.1 + 0.2)))
    (index, flag, found), number = back
    assert (index, flag, number) == (0, True, 0.1 + 0.2)
    assert found.scores[0] == group.scores[0] and math.isnan(found.scores[1].reward)
    assert found.scores[1].status is Status.TIMEOUT
    assert found.prompt.golds == ("2",) and found.prompt.row["x"][2] == {"y": 0.1}
    for got, want in zip(found.responses, group.responses, strict=True):
        for field in dataclasses.fields(Response):
            a, b = getattr(got, field.name), getattr(want, field.name)
            if isinstance(b, np.ndarray):
                assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
            else:
                assert a == b


@pytest.mark.parametrize("value", [object(), {1: 2}, 1j, b"raw"])
def test_what_could_not_come_back_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be serialised"):
        wire.dumps((1, value))


@pytest.mark.parametrize(
    "tree",
    [
        {"enum": "__delattr__", "value": "Score"},
        {"enum": "Score", "value": "ok"},
        {"type": "Status", "value": "ok"},
        {"type": "np"},
        {"type": "dataclass", "cls": None},
        {"type": "field", "default": 1},
        {"type": ["Score"]},
        {"enum": "StrEnum", "value": "x"},
        {"type": "Score"},
        {"array": "0", "more": 1},
        {"array": "none"},
        {"dict": [1]},
        {"other": 1},
        {},
        {"array": "tree"},
    ],
)
def test_what_dumps_never_writes_is_refused_and_changes_nothing(tree: object) -> None:
    before = dict(vars(types))
    data = save({"tree": np.frombuffer(json.dumps([tree]).encode(), np.uint8), "0": np.zeros(1)})
    with pytest.raises(wire.WireError, match="run the same or1 on every rank"):
        wire.loads(data)
    assert dict(vars(types)) == before


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"9" * 5000, b"\xff"])
def test_bytes_that_are_no_tree_are_one_error(text: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.loads(save({"tree": np.frombuffer(text, np.uint8)}))
    with pytest.raises(wire.WireError):
        wire.loads(text)
