"""Budgets of the Triton passes, read from machine code that is compiled ahead of time: no GPU is needed."""

from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from benchmarks.head import instructions  # noqa: E402

# (instructions a column, MUFU a column, registers a thread) at most, by pass.
BUDGETS = {
    "pass 1": (16, 1.1, 48),
    "pass 2, fp32": (12, 1.1, 48),
    "pass 2, bf16": (12, 1.1, 48),
    "two sweeps, bf16": (16, 1.15, 64),
    "one sweep, bf16": (16, 1.1, 64),
}

pytestmark = pytest.mark.skipif(
    not Path(triton.knobs.nvidia.nvdisasm.path).exists(), reason="this triton wheel has no disassembler"
)


def test_every_pass_has_a_budget():
    assert BUDGETS.keys() == instructions.passes().keys()


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("target", instructions.TARGETS)
def test_the_loops_keep_their_budget(target, name):
    kernel, constants, out = instructions.passes()[name]
    code = instructions.machine_code(kernel, target, constants, out)
    most, exps, registers = BUDGETS[name]
    assert code.spilled == 0
    assert code.registers <= registers
    assert code.loops
    loop = code.loops[0]
    assert code.accesses(0) <= {"LDG.E.128", "STG.E.128", "STG.E.64"} and code.per_column(0, "LDG.E.128") == 1 / 4
    assert code.per_column(0) <= most, loop
    assert code.per_column(0, "MUFU") <= exps


def test_the_count_sees_a_second_exponential():
    code = instructions.Code(1, 0, instructions._loops(SASS), columns=2)
    assert code.loops == [
        ["FADD R1, R1, R2", "MUFU.EX2 R1, R1", "LDG.E.128 R4, desc[UR10][R4.64]", "@P0 BRA `(.L_x_1)"]
    ]
    assert (code.per_column(0), code.per_column(0, "MUFU"), code.accesses(0)) == (2.0, 0.5, {"LDG.E.128"})


SASS = """
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   FADD R1, R1, R2 ;
        /*0020*/                   MUFU.EX2 R1, R1 ;
        /*0030*/                   LDG.E.128 R4, desc[UR10][R4.64] ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
"""
