"""GPU parts: the whole training step beside its peers, and the longest context before memory runs out."""

from collections.abc import Callable

from benchmarks.gpu.context import Context
from benchmarks.step import suite

_CASE_S = 150


def _part(name: str) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        def add(entry: dict) -> None:
            case, result = entry["case"], entry["result"]
            where = {"architecture": case["architecture"], "context": case["context"]}
            if case.get("documents"):
                where |= {"documents": case["documents"], "row": case["context"]}
            for engine in case["engines"]:
                found = result.get("engines", {}).get(engine["label"], {"error": result.get("error", "absent")})
                failed = {"ok": False} if "error" in found and _must_run(engine["name"], case["context"]) else {}
                context.add({**where, "engine": engine["label"], **found, **failed})

        # A row is added after each case, so a part that is stopped keeps what it measured.
        parts, out = ["cpu"] if context.rehearse else [name], context.out / f"step-{name}-cases.json"
        suite.run_parts(parts, out, _CASE_S, context.left(), quick=context.quick, done=add)

    return run


def _must_run(engine: str, context: int) -> bool:
    """Return True if a failure fails the part: or1 up to 32K tokens. Larger contexts and peers are measurements."""
    return engine == "or1" and context <= 32768


run_1_5b, run_7b = _part("1.5b"), _part("7b")
run_longest_1_5b, run_longest_7b = _part("longest-1.5b"), _part("longest-7b")
