"""GPU parts: the whole training step beside its peers, and the longest context before memory runs out."""

from collections.abc import Callable

from benchmarks.gpu.context import SOFT_LIMIT_S, Context
from benchmarks.step import suite

_CASE_S = 150


def _part(name: str) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        parts = ["cpu"] if context.rehearse else [name]
        for entry in suite.run_parts(parts, context.out / f"step-{name}.json", _CASE_S, SOFT_LIMIT_S):
            case, result = entry["case"], entry["result"]
            where = {"architecture": case["architecture"], "context": case["context"]}
            for engine in case["engines"]:
                found = result.get("engines", {}).get(engine["label"], {"error": result.get("error", "absent")})
                failed = {"ok": False} if "error" in found and _must_run(engine["name"], case["context"]) else {}
                context.add({**where, "engine": engine["label"], **found, **failed})

    return run


def _must_run(engine: str, context: int) -> bool:
    """Return True if a failure fails the part: or1 up to 32K tokens. Larger contexts and peers are measurements."""
    return engine == "or1" and context <= 32768


run_1_5b, run_7b = _part("1.5b"), _part("7b")
run_longest_1_5b, run_longest_7b = _part("longest-1.5b"), _part("longest-7b")
