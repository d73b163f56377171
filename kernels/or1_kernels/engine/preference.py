"""A process-wide preference of one GEMM implementation where several are exact, set by whoever measured them."""

CPU_GEMMS = ("auto", "bf16", "fp32")
_wanted = "auto"


def prefer_cpu_gemms(name: str) -> str:
    """Set how a CPU multiplies bf16 weights, and return the former value.

    auto  bf16 where the CPU has instructions for it and the matrices are large, else fp32
    bf16  bf16 where the CPU has instructions for it
    fp32  always fp32

    Results differ within the accuracy of bf16 inputs. Raises ValueError for another name.
    """
    global _wanted
    if name not in CPU_GEMMS:
        raise ValueError(f"the GEMMs of a CPU are {name!r}; choose one of {CPU_GEMMS}")
    former, _wanted = _wanted, name
    return former


def cpu_gemms() -> str:
    """Return the name that prefer_cpu_gemms set."""
    return _wanted
