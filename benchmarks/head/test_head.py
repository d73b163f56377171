"""The head beside its peers, one test for each setting and variant; and the targets for CPUs.

N = tokens, H = hidden, V = vocab. A round of the bare GEMMs precedes every round of a variant, so both see the same
machine load. The best round counts.
"""

import pytest
import torch

from benchmarks.head import cases as head
from benchmarks.head.variants import VARIANTS
from benchmarks.lib import measure
from benchmarks.lib.load import Target
from benchmarks.lib.problems import Shape, make_problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 3
_last: dict[head.Setting, object] = {}


def problem_of(setting):
    """Return the setting's inputs, cached until the next setting."""
    if setting not in _last:
        _last.clear()
        _last[setting] = setting.problem(DEVICE)
    return _last[setting]


def pytest_generate_tests(metafunc):
    """Give test_head every setting, variant and task; with --bench-real the sections of the file come first."""
    if "setting" not in metafunc.fixturenames:
        return
    real = metafunc.config.getoption("--bench-real")
    settings = (head.real_settings(real, DEVICE) if real else []) + head.settings(DEVICE)
    grid = [(setting, variant, task) for setting in settings for variant, task in head.cases(setting)]
    metafunc.parametrize(("setting", "variant", "task"), grid, ids=lambda x: getattr(x, "name", str(x)))


@pytest.mark.timeout(240)
def test_head(setting, variant, task, benchmark, record, skip_variant):
    """Add one row of the table."""
    why = head.why_skipped(variant, setting, DEVICE)
    if why is not None:
        skip_variant(variant.name, why)
    problem = problem_of(setting)
    error = head.error_of(variant, task, problem)
    why = head.why_wrong(
        variant, error, head.error_of(VARIANTS["naive torch"], task, problem), torch.finfo(setting.dtype).eps
    )
    # A peer that is wrong here is a result. or1 must never be.
    assert not (why and variant.name.startswith("or1")), why
    if why:
        skip_variant(variant.name, why)
    with measure.tf32(setting.tf32):
        run, gemms = variant.runner(problem, task), head.bare_gemms(problem)
        gemm_times = []

        def timed():
            run()
            measure.synchronize(DEVICE)

        benchmark.pedantic(
            timed,
            setup=lambda: gemm_times.append(measure.seconds(gemms, DEVICE)),
            rounds=ROUNDS,
            warmup_rounds=1,
            iterations=1,
        )
        times = list(benchmark.stats.stats.data)
        row = head.row(setting, variant, task, problem, times_s=times, gemm_times_s=gemm_times[1:], error=error)
    benchmark.group = str(setting)
    benchmark.extra_info.update({k: row[k] for k in ("task", "peak_extra_gib", "tflops", "to_gemms", "error")})
    record("head", row)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a target for CPUs")
@pytest.mark.timeout(1200)
def test_cpu_targets_time_and_memory(record, hold):
    """Check for fp32, N=4096, H=1024, V=32000 with entropy gradient: 2x faster than autograd, 1/8 of its memory.

    If the GEMMs take more than half of autograd's time, no head of three exact fp32 GEMMs is 2x faster. Then the head
    must be within 15 % of the bare GEMMs. The table shows which condition held.
    """
    problem = make_problem(Shape("target", 1024, 32000), 4096)
    runs = {name: VARIANTS[name].runner(problem, "policy") for name in ("or1", "naive torch")}
    fns = runs | {"gemms": measure.bare_gemms(problem.hidden, problem.weight)}
    times = measure.interleaved(fns, DEVICE, ROUNDS, warmup=0, timer=measure.wall_and_cpu_seconds)
    wall, cpu = ({name: min(t[clock] for t in times[name]) for name in fns} for clock in (0, 1))
    peaks = {name: measure.peak_extra_bytes(run, DEVICE) for name, run in runs.items()}
    for name in fns:
        record(
            "cpu_target",
            {"variant": name, "s": wall[name], "cpu_s": cpu[name], "peak_extra_mib": peaks.get(name, 0) / 2**20},
        )
    faster, smaller = wall["naive torch"] / wall["or1"], peaks["naive torch"] / peaks["or1"]
    record(
        "cpu_target",
        {
            "variant": "or1 against naive torch",
            "s": faster,
            "cpu_s": cpu["naive torch"] / cpu["or1"],
            "peak_extra_mib": smaller,
        },
    )
    # CPU time, because other work on the machine hardly changes it.
    over_gemms = Target("fp32: CPU time over the bare GEMMs", cpu["or1"] / cpu["gemms"], 1.15)
    twice = Target("fp32: time of naive torch over or1's", faster, 2, at_least=True)
    memory = Target("fp32: extra memory of naive torch over or1's", smaller, 8, at_least=True, timed=False)
    hold([memory, twice if twice.met else over_gemms], {name: [cpu_s for _, cpu_s in times[name]] for name in fns})


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a target for CPUs")
@pytest.mark.timeout(600)
def test_cpu_time_is_linear_in_tokens(record, hold):
    """Check that CPU time per token varies by less than half up to N = 65536 (H = 64, V = 2048)."""
    sizes = (4096, 8192, 16384, 32768, 65536)
    shape = Shape("linear", 64, 2048)
    runs = {str(n): VARIANTS["or1"].runner(make_problem(shape, n), "policy") for n in sizes}
    # Five rounds, because more rounds make an undisturbed one likelier.
    times = measure.interleaved(runs, DEVICE, rounds=5, timer=measure.cpu_seconds)
    per_token = {n: min(times[str(n)]) / n for n in sizes}
    for n in sizes:
        cpu_ms = 1e3 * min(times[str(n)])
        record("linear", {"tokens": n, "cpu_ms": cpu_ms, "us_per_token": 1e6 * per_token[n]})
    worst = max(per_token.values()) / min(per_token.values())
    hold([Target("CPU time a token, most over least of 4,096 to 65,536 tokens", worst, 1.5)], times)
