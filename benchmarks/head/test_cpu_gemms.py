"""Targets for CPUs: the head against its bare GEMMs at N=4096, H=1024, V=32000.

    fp32             at most 1.05x of three GEMMs
    bf16 on AMX      at most 1.6x of three bf16 GEMMs, whose results are rounded to bf16
    scoring, fp32    at most 1.1x of one GEMM

The head and the GEMMs alternate, and the best round of each counts. CPU seconds decide, because other work on the
machine changes them less than wall seconds. On a busy machine, OMP_WAIT_POLICY=passive keeps waiting threads out of
them, and OMP_NUM_THREADS=1 gives the steadiest ratio.
"""

import pytest
import torch

from benchmarks.head.variants import VARIANTS
from benchmarks.lib import measure
from benchmarks.lib.load import Target
from benchmarks.lib.problems import Shape, make_problem
from or1_kernels import linear_logprob_entropy
from or1_kernels.engine import host

pytestmark = [pytest.mark.skipif(torch.cuda.is_available(), reason="targets for CPUs"), pytest.mark.timeout(900)]
DEVICE = torch.device("cpu")


def training(problem):
    """Return the policy loss with its backward, and the three GEMMs."""
    return VARIANTS["or1"].runner(problem, "policy"), measure.bare_gemms(problem.hidden, problem.weight)


def scoring(problem):
    """Return the log-probs and entropies alone, and GEMM 1."""

    @torch.no_grad()
    def run():
        linear_logprob_entropy(problem.hidden, problem.weight, problem.targets)

    return run, measure.bare_gemms(problem.hidden, problem.weight, only_logits=True)


@pytest.mark.parametrize(
    ("task", "dtype", "limit", "rounds"),
    [(training, torch.float32, 1.05, 6), (training, torch.bfloat16, 1.6, 6), (scoring, torch.float32, 1.1, 5)],
    ids=["fp32", "bf16", "scoring"],
)
def test_time_over_the_bare_gemms(task, dtype, limit, rounds, record, hold):
    """Add one row of the table and check its target."""
    if dtype == torch.bfloat16 and not host.has_wide_product():
        pytest.skip("no AMX, or a torch without MKL")
    problem = make_problem(Shape("target", 1024, 32000), 4096, dtype=dtype)
    runs = dict(zip(("or1", "gemms"), task(problem), strict=True))
    # Both clocks are read around the same calls.
    times = measure.interleaved(runs, DEVICE, rounds, timer=measure.wall_and_cpu_seconds)
    wall, cpu = ({name: min(t[clock] for t in times[name]) for name in runs} for clock in (0, 1))
    row = {"task": task.__name__, "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    row |= {f"{name}_s": wall[name] for name in runs} | {f"{name}_cpu_s": cpu[name] for name in runs}
    row |= {"wall_ratio": wall["or1"] / wall["gemms"], "cpu_ratio": cpu["or1"] / cpu["gemms"], "limit": limit}
    record("cpu_gemms", row)
    name = f"{task.__name__}, {row['dtype']}: CPU time over the bare GEMMs"
    hold([Target(name, row["cpu_ratio"], limit)], {n: [cpu_s for _, cpu_s in times[n]] for n in runs})
