"""What the Triton passes cost in instructions and registers: read from machine code, without a GPU.

    python -m benchmarks.head.instructions

compiles every pass ahead of time for the vocabulary of Qwen2 and disassembles it with the tools of the triton wheel.
The test of the budgets is tests/kernels/test_budgets.py.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = {"sm_80": 80, "sm_90a": 90, "sm_100a": 100}

# Types of the kernels' arguments, as the launcher finds them for fp32 logits. Others are constexpr.
_TYPES = {
    "targets_C": "*i64",
    "stride": "i32",
    "out_stride": "i32",
    "num_rows": "i32",
    "vocab": "i32",
    "scale": "fp32",
    "softcap": "fp32",
    "low": "fp32",
    "high": "fp32",
    "kl_coef": "fp32",
    "is_floor": "fp32",
    "is_cap": "fp32",
}
# The launcher finds these divisible by 16: the head pads its rows, and the vocabularies of Qwen2 are.
_ALIGNED = ("stride", "out_stride", "vocab")


class Code(NamedTuple):
    """Machine code of one pass.

    registers  a thread
    spilled    bytes of registers in memory
    loops      the instructions of each innermost loop, in order
    columns    columns of a row that a thread handles in one round of a loop
    """

    registers: int
    spilled: int
    loops: list[list[str]]
    columns: int

    def per_column(self, loop: int, word: str = "") -> float:
        """Return the number of instructions with `word` in a loop, a column of the row."""
        return sum(word in x for x in self.loops[loop]) / self.columns

    def accesses(self, loop: int) -> set[str]:
        """Return the kinds of global loads and stores in a loop, such as LDG.E.128."""
        return {m[0] for x in self.loops[loop] if (m := re.search(r"(LDG|STG)[\w.]*", x))}


def compile_pass(kernel: Any, capability: Any, constants: dict[str, Any], out: str = "*fp32") -> Any:
    """Return one pass as the launcher compiles it; capability is a GPUTarget."""
    import triton
    from triton.compiler import ASTSource

    from or1_kernels.rows import triton_kernel

    known = {"BLOCK": triton_kernel.BLOCK, "LANES": triton_kernel.LANES} | constants
    constants = {name: known[name] for name in kernel.arg_names if name in known}
    pointers = [name for name in kernel.arg_names if name not in _TYPES and name not in constants]
    types = _TYPES | dict.fromkeys(constants, "constexpr") | dict.fromkeys(pointers, "*fp32") | {"out_CV": out}
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in _ALIGNED
    }
    options = {"num_warps": triton_kernel.NUM_WARPS, "enable_fp_fusion": True}
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=capability, options=options)


def machine_code(kernel: Any, target: str, constants: dict[str, Any], out: str = "*fp32") -> Code:
    """Return the disassembled code of one pass for a name in TARGETS."""
    import triton
    from triton.backends.compiler import GPUTarget

    from or1_kernels.rows import triton_kernel

    binary = compile_pass(kernel, GPUTarget("cuda", TARGETS[target], 32), constants, out)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(binary.asm["cubin"])
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name)
        text = _output(triton.knobs.nvidia.nvdisasm.path, "-c", cubin.name)
    found = {word: int(m[1]) for word in ("REG", "STACK", "LOCAL") if (m := re.search(rf"\b{word}:(\d+)", usage))}
    columns = triton_kernel.BLOCK // triton_kernel.LANES
    return Code(found["REG"], found["STACK"] + found["LOCAL"], _loops(text), columns)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loops(text: str) -> list[list[str]]:
    """Return the instructions from each label to the last branch back to the label, without loops around loops."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1].strip())
    ends: dict[int, int] = {}
    for i, instruction in enumerate(code):
        branch = re.search(r"BRA.*`\((\.L_\w+)\)", instruction)
        if branch and labels[branch[1]] < i:
            ends[labels[branch[1]]] = i + 1
    spans = list(ends.items())
    inner = [s for s in spans if not any(s[0] <= t[0] and t[1] <= s[1] and s != t for t in spans)]
    return [code[a:b] for a, b in sorted(inner)]


def passes() -> dict[str, tuple[Any, dict[str, Any], str]]:
    """Return kernel, constants and dtype of the result by the name of each pass."""
    from or1_kernels.rows import triton_kernel as t
    from or1_kernels.rows import triton_policy as p

    plain = {"CAPPED": False, "KIND": 0, "HAS_OLD": True, "CAP": 0, "HAS_KL": False}
    return {
        "pass 1": (t.row_sums_kernel, plain, "*fp32"),
        "pass 2, fp32": (t.row_grads_kernel, plain, "*fp32"),
        "pass 2, bf16": (t.row_grads_kernel, plain, "*bf16"),
        "two sweeps, bf16": (p.two_sweeps_kernel, plain, "*bf16"),
        "one sweep, bf16": (p.one_sweep_kernel, plain, "*bf16"),
    }


def main() -> None:
    """Print a table of all passes and targets."""
    print("| pass | target | registers | spilled | loop | instructions a column | MUFU a column | loads and stores |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (kernel, constants, out) in passes().items():
        for target in TARGETS:
            code = machine_code(kernel, target, constants, out)
            for i in range(len(code.loops)):
                access = " ".join(sorted(code.accesses(i)))
                costs = f"{code.per_column(i):.1f} | {code.per_column(i, 'MUFU'):.2f} | {access}"
                print(f"| {name} | {target} | {code.registers} | {code.spilled} | {i + 1} | {costs} |")


if __name__ == "__main__":
    main()
