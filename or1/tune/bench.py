"""What all benches share: a candidate's run is timed with the device's own clock, under the candidate's options."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from or1.tune.accuracy import Outputs, error_of
from or1.tune.case import Case
from or1_kernels.engine.preference import cpu_gemms, prefer_cpu_gemms

# A shorter measurement is repeated, since a clock and a launch have their own noise.
_LEAST_S, _MOST_LOOPS = 0.02, 50
_WARM_BELOW_S = 0.1


class TorchBench(ABC):
    """A computation with several implementations, forward and backward.

    Only the upstream gradient of a few sampled positions is not zero. The exact result then needs only these positions,
    and it can be computed in fp64 on any device. A candidate computes all positions all the same.
    """

    def __init__(self, case: Case):
        self.case = case
        self.device = torch.device(case.device)
        self.random = torch.Generator(self.device).manual_seed(1)
        self._guesses: dict[str, float] = {}

    @abstractmethod
    def run(self, options: Mapping[str, Any]) -> None:
        """Run a candidate, forward and backward."""

    @abstractmethod
    def outputs(self) -> Outputs:
        """Return the results of the last run: values and gradients at the sampled positions."""

    @abstractmethod
    def exact(self, dtype: torch.dtype) -> Outputs:
        """Return what `outputs` should be, computed by plain torch in `dtype`."""

    @cached_property
    def _truth(self) -> tuple[Outputs, Outputs]:
        """The results of plain torch in the dtype of the case, and in fp64."""
        return self.exact(getattr(torch, self.case.dtype)), self.exact(torch.float64)

    def prepare(self) -> None:
        """Make the inputs and the exact results."""
        with self._room():
            _ = self._truth

    def check(self, options: Mapping[str, Any]) -> float:
        """Run once, and return the error in units of plain torch's; see `or1.tune.accuracy`."""
        plain, truth = self._truth
        with self._room(), using(options):
            self.run(options)
            return error_of(self.outputs(), plain, truth)

    def seconds(self, options: Mapping[str, Any]) -> float:
        """Return the seconds of one run: the mean of as many as a measurement needs."""
        name = json.dumps(options, sort_keys=True)
        guess = self._guesses.get(name, 0.0)
        with self._room(), using(options):
            if 0 < guess < _WARM_BELOW_S:
                # The candidate before this one has filled the caches. A first run follows the check of the same.
                self.run(options)
            loops = max(1, min(_MOST_LOOPS, math.ceil(_LEAST_S / guess))) if guess else 1
            self._guesses[name] = self._timed(options, loops)
        return self._guesses[name]

    def _timed(self, options: Mapping[str, Any], loops: int) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            for _ in range(loops):
                self.run(options)
            return (time.perf_counter() - began) / loops
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(loops):
            self.run(options)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / loops

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Free what a candidate that raised has left, or its memory would be missing from the next."""
        try:
            yield
        except BaseException:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise

    def sample(self, size: int, count: int) -> torch.Tensor:
        """Return at most `count` different positions below `size`, ascending, with the first and the last."""
        if size <= count:
            return torch.arange(size, device=self.device)
        inner = torch.randperm(size, generator=self.random, device=self.device)[: count - 2]
        ends = torch.tensor([0, size - 1], device=self.device)
        return torch.cat([inner, ends]).unique()

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Return normal random numbers in the dtype of the case."""
        numbers = torch.randn(*shape, generator=self.random, device=self.device)
        return (numbers * scale).to(getattr(torch, self.case.dtype))


@contextlib.contextmanager
def using(options: Mapping[str, Any]) -> Iterator[None]:
    """Set the threads and the CPU's GEMMs of a candidate, and restore the former ones."""
    threads, gemms = torch.get_num_threads(), cpu_gemms()
    torch.set_num_threads(options.get("threads", threads))
    prefer_cpu_gemms(options.get("cpu_gemms", gemms))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        prefer_cpu_gemms(gemms)
