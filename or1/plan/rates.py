"""Measured rates for the plan: what `or1 tune` kept for the planned device, in place of assumed shares of the peak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from or1.plan.devices import Device, listed_name
from or1.plan.shapes import ModelShape
from or1.tune.cache import records
from or1.tune.choice import Record

_SHARES = {"mlp": "matmul", "attention": "attention", "head": "head"}


def measured(device: Device, shape: ModelShape, dtype: str) -> Device:
    """Return the device with the shares that the newest fitting measurement found; as it is without one."""
    for record in records():
        if record.rates and _is_of(record.key, device, shape, dtype):
            break
    else:
        return device
    peak = device.tflops * 1e12
    shares = {share: record.rates[name] / peak for name, share in _SHARES.items() if name in record.rates}
    return replace(device, efficiency=replace(device.efficiency, **shares, source=_source(record)))


def _source(record: Record) -> str:
    what = {"mlp": "matrix products", "attention": "attention", "head": "LM head"}
    names = [text for name, text in what.items() if name in record.rates]
    return f"{', '.join(names)} (or1 tune, {record.key['device']['name']}, {record.made})"


def _is_of(key: dict[str, Any], device: Device, shape: ModelShape, dtype: str) -> bool:
    """Return whether a measurement was made on a device of this kind, with this width of model."""
    try:
        found, case = key["device"], key["case"]
        same = (case["hidden"], case["vocab"], case["dtype"]) == (shape.hidden, shape.vocab, dtype)
        if not device.is_gpu:
            return same and found["kind"] == "cpu"
        return same and found["kind"] == "cuda" and listed_name(str(found["name"])) == device.name
    except (LookupError, TypeError):
        return False
