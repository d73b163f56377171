"""Parse the ground truth of a data row: gold answers, or the tests of a program.

Only this module knows the formats of data sets. A row without a test is an error: a reward that passes an empty list
of tests would train the policy to answer anything.
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import math
import re
import struct
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from or1.core.errors import GroundTruthError, TestedError
from or1.core.types import CodeTests
from or1.reward.code.tested import complete

MAX_TEST_BYTES = 256 << 20
"""Largest unpacked size of the tests of one problem."""


def parse_ground_truth(truth: Any) -> tuple[str, ...] | CodeTests:
    """Return the gold answers of a maths row, or the tests of a code row.

    truth  text, a number, a list of equally good answers, or JSON text of a list of strings: gold answers.
           An object, or JSON text of one. Its keys that are not null select the format:
             inputs, outputs [, fn_name]             TACO, APPS: standard input and output, or calls of fn_name
             test_code [, import_prefix, entry_point], functional, test [, entry_point]   LeetCode, HumanEval: asserts
             assert_case, test_list [, test_setup_code]                                   lists of asserts, MBPP
             public_test_cases [, private_test_cases, metadata]                           LiveCodeBench
             input_output                                                                 any of the first, nested
           A list of objects, or JSON text of one: tests in the format of DeepCoder and rllm:
             input, output [, testtype or type, fn_name, metadata]                        one object per test

    Raises GroundTruthError for an empty value, a wrong type, or an object without tests.
    """
    value = _decoded(truth)
    if isinstance(value, Mapping):
        return _code_tests(value)
    return _test_list(value) if _has_objects(value) else plain_golds(value)


def parse_tests(truth: Any) -> CodeTests:
    """Return the tests in a column of tests, in any format of `parse_ground_truth`. Raises GroundTruthError."""
    value = _decoded(truth)
    if isinstance(value, Mapping):
        return _code_tests(value)
    if _has_objects(value):
        return _test_list(value)
    raise GroundTruthError(f"tests are {_shown(value)}, neither an object nor a list of objects")


def parse_golds(value: Any) -> tuple[str, ...]:
    """Return the gold answers in a column of answers: a value of `plain_golds`, or JSON text of a list of strings.

    Raises GroundTruthError.
    """
    found = _decoded(value)
    if not isinstance(value, str) or isinstance(found, Mapping):
        return plain_golds(value)
    if _has_objects(found):
        raise GroundTruthError("answer is a list of objects; tests of a program belong in a column 'ground_truth'")
    return plain_golds(found)


def plain_golds(value: Any) -> tuple[str, ...]:
    """Return one answer, or a list of equally good answers, as text. Raises GroundTruthError."""
    values = value if isinstance(value, list | tuple) else [value]
    golds = []
    for item in values:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise GroundTruthError(f"gold answer is a {type(item).__name__}, not text or a number")
        if isinstance(item, float) and not math.isfinite(item):
            raise GroundTruthError(f"gold answer is {item}")
        # str(1.5e-05) is "1.5e-05", which the verifier does not parse as a number.
        text = format(Decimal(repr(item)), "f") if isinstance(item, float) else str(item)
        golds.append(_clean(text).strip())
        if not golds[-1]:
            raise GroundTruthError("gold answer is empty")
    if not golds:
        raise GroundTruthError("list of gold answers is empty")
    return tuple(golds)


def _decoded(truth: Any) -> Any:
    if not isinstance(truth, str) or truth.lstrip()[:1] not in ("[", "{"):
        return truth
    try:
        value = json.loads(truth)
    except (ValueError, RecursionError):
        return truth
    # Only a list of strings is a list of golds: "[1, 2]" is an interval or a vector, and "{1, 2}" is a set.
    is_golds = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    return value if is_golds or isinstance(value, dict) or _has_objects(value) else truth


def _has_objects(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _clean(text: str) -> str:
    if "\0" in text:
        raise GroundTruthError("gold answer holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GroundTruthError(f"gold answer holds half a surrogate pair at character {error.start + 1}") from None
    return text


def _code_tests(truth: Mapping[str, Any]) -> CodeTests:
    # Columnar files fill the missing keys of a row with null. Such keys must not select the format.
    truth = {key: value for key, value in truth.items() if value is not None}
    for key, make in _FORMATS.items():
        if key in truth:
            return make(truth)
    if "question_id" in truth:
        raise GroundTruthError(
            "tests are named by 'question_id' only, in files that run code when they are read; "
            "use LiveCodeBench's rows with public_test_cases and private_test_cases"
        )
    raise GroundTruthError(
        f"ground truth has the keys {sorted(map(str, truth))}, none of which holds tests; known: {', '.join(_FORMATS)}"
    )


# --- pairs of input and output


def _pairs(truth: Mapping[str, Any]) -> CodeTests:
    inputs, outputs = _list_of(truth, "inputs"), _list_of(truth, "outputs")
    if len(inputs) != len(outputs):
        raise GroundTruthError(f"{len(inputs)} inputs but {len(outputs)} outputs")
    if not inputs:
        raise GroundTruthError("list of tests is empty")
    fn_name = truth.get("fn_name") or ""
    if not isinstance(fn_name, str):
        raise GroundTruthError(f"fn_name is a {type(fn_name).__name__}, not text")
    if not fn_name:
        return CodeTests("stdin", tuple(map(_joined, inputs)), tuple(map(_joined, outputs)))
    calls = [_call(given, expected) for given, expected in zip(inputs, outputs, strict=True)]
    return CodeTests("function", tuple(c[0] for c in calls), tuple(c[1] for c in calls), fn_name=fn_name)


def _joined(text: Any) -> str:
    lines = text if isinstance(text, list) else [text]
    if not all(isinstance(line, str) for line in lines):
        raise GroundTruthError("input or output of a program is not text")
    return "\n".join(lines)


def _call(given: Any, expected: Any) -> tuple[str, str]:
    """Return the arguments of a call as JSON lines, and its equally good results as JSON lines."""
    if not isinstance(given, str):
        if not isinstance(given, list):
            raise GroundTruthError("arguments of a call are neither JSON lines nor a list")
        # APPS gives lists and usually wraps the result in a list of one. A function may also return a list of one, so
        # the two cannot be distinguished. Like APPS's own checker, this accepts the element and the list.
        wrapped = isinstance(expected, list) and len(expected) == 1
        try:
            results = [json.dumps(value) for value in ([expected[0], expected] if wrapped else [expected])]
            return "\n".join(map(json.dumps, given)), "\n".join(results)
        except (TypeError, ValueError, RecursionError) as error:
            raise GroundTruthError(f"argument or result of a call is not JSON: {str(error)[:60]}") from None
    for line in [*given.split("\n"), expected]:
        try:
            json.loads(line)
        except (TypeError, ValueError, RecursionError):
            raise GroundTruthError(f"argument or result of a call is not JSON: {str(line)[:60]!r}") from None
    # A result over several lines must not be read as several results.
    return given, json.dumps(json.loads(expected)) if "\n" in expected else expected


def _live_code_bench(truth: Mapping[str, Any]) -> CodeTests:
    cases = [*_cases(truth["public_test_cases"]), *_cases(truth.get("private_test_cases", []))]
    return _tests_of_cases(cases, truth.get("metadata"))


def _test_list(cases: Sequence[Any]) -> CodeTests:
    """Return the tests of DeepCoder's and rllm's format: a list of objects, one per test."""
    for number, case in enumerate(cases, 1):
        if not isinstance(case, Mapping):
            raise GroundTruthError(
                f"list of tests holds an object and, as item {number}, {_shown(case)}; write one object for each test"
            )
        missing = [key for key in ("input", "output") if case.get(key) is None]
        if missing:
            keys = ", ".join(sorted(map(str, case))[:8]) or "none"
            raise GroundTruthError(
                f"list of objects, of which item {number} lacks {' and '.join(map(repr, missing))}; "
                f"a test needs both, and the item has the keys: {keys}"
            )
    return _tests_of_cases(cases, None)


def _tests_of_cases(cases: Sequence[Mapping[str, Any]], metadata: Any) -> CodeTests:
    """Return the tests of objects with input and output. metadata: the row's, which names LiveCodeBench's function."""
    pairs: dict[str, Any] = {
        "inputs": [case.get("input") for case in cases],
        "outputs": [case.get("output") for case in cases],
    }
    names = {_function_of(case) for case in cases}
    if names - {""} or any(map(_is_call, cases)):
        names = names - {""} or {_name_in(metadata)}
        if names == {""}:
            raise GroundTruthError("functional test cases without metadata.func_name or fn_name")
        if len(names) > 1 or not all(_function_of(case) or _is_call(case) for case in cases):
            raise GroundTruthError(
                f"tests of one row call different functions, or some call none: {', '.join(sorted(names))[:60]}"
            )
        pairs["fn_name"] = names.pop()
    return _pairs(pairs)


def _is_call(case: Mapping[str, Any]) -> bool:
    return case.get("testtype") == "functional" or case.get("type") == "function_call"


def _function_of(case: Mapping[str, Any]) -> str:
    """Return the name of the function in one test, or "" if the test has none."""
    name = case.get("fn_name")
    return name if isinstance(name, str) and name else _name_in(case.get("metadata"))


def _name_in(metadata: Any) -> str:
    metadata = _decoded(metadata)
    name = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    return name if isinstance(name, str) else ""


def _cases(value: Any) -> list[Mapping[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value if value.lstrip().startswith("[") else _unpacked(value))
        except (ValueError, RecursionError) as error:
            raise GroundTruthError(f"test cases are not JSON: {str(error)[:80]}") from None
    if not isinstance(value, list) or not all(isinstance(case, Mapping) for case in value):
        raise GroundTruthError("test cases are not a list of objects")
    return value


def _unpacked(text: str) -> str:
    """Return LiveCodeBench's private tests: base64 of zlib of a pickled str. Its bytes are read, never unpickled."""
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(text, validate=True), MAX_TEST_BYTES)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise GroundTruthError(f"private test cases cannot be unpacked: {error}") from None
    if inflate.unconsumed_tail:
        raise GroundTruthError(f"test cases unpack to more than {MAX_TEST_BYTES} bytes")
    data = re.sub(rb"^\x80.(\x95.{8})?", b"", data, count=1, flags=re.DOTALL)
    for opcode, length in ((b"\x8c", "<B"), (b"X", "<I"), (b"\x8d", "<Q")):
        if data.startswith(opcode):
            start = 1 + struct.calcsize(length)
            try:
                return data[start : start + struct.unpack_from(length, data, 1)[0]].decode("utf-8")
            except (struct.error, UnicodeDecodeError):
                break
    raise GroundTruthError("private test cases hold something other than one text")


# --- scripts of asserts


def _script(truth: Mapping[str, Any]) -> CodeTests:
    key = next(key for key in ("test_code", "functional", "test") if key in truth)
    script, setup = _text(truth, key), _text(truth, "import_prefix") if "import_prefix" in truth else ""
    entry_point = _text(truth, "entry_point") if "entry_point" in truth else ""
    tree = _parsed(script, key)
    if entry_point and re.fullmatch(r"[A-Z]\w*\.\w+", entry_point):
        entry_point = entry_point.replace(".", "().")  # a method needs an instance
    on_top = [n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)]
    used = {n.id for node in on_top for n in ast.walk(node) if isinstance(n, ast.Name)}
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    if entry_point and "check" in defined and "check" not in used:
        script = f"{script.rstrip()}\n\ncheck({entry_point})\n"
    elif entry_point and "candidate" in used and "check" not in defined:
        script = f"candidate = {entry_point}\n{script}"
    return _asserts(truth, script, setup, entry_point=entry_point, prelude=key != "test")


def _assert_list(truth: Mapping[str, Any]) -> CodeTests:
    key = "assert_case" if "assert_case" in truth else "test_list"
    cases = _list_of(truth, key)
    if not cases or not all(isinstance(case, str) for case in cases):
        raise GroundTruthError("list of tests is empty" if not cases else f"'{key}' holds something other than text")
    script = "\n".join(textwrap.dedent(case).strip() for case in cases)
    _parsed(script, key)
    setup = _text(truth, "test_setup_code") if "test_setup_code" in truth else ""
    if "test_imports" in truth:
        setup = "\n".join([*map(str, _list_of(truth, "test_imports")), setup])
    entry_point = _text(truth, "entry_point") if "entry_point" in truth else ""
    return _asserts(truth, script, setup, entry_point=entry_point)


def _asserts(
    truth: Mapping[str, Any], script: str, setup: str, *, entry_point: str, prelude: bool = False
) -> CodeTests:
    """Return the tests of a script. The row decides the names under test, not the program."""
    texts = [truth.get(key) for key in ("code", "canonical_solution", "prompt")]
    code, solution, question = (text if isinstance(text, str) else "" for text in texts)
    try:
        found = complete(
            script, setup=setup, entry_point=entry_point, reference=code or solution, question=question, prelude=prelude
        )
    except TestedError as error:
        raise GroundTruthError(str(error)) from error
    return CodeTests("asserts", script=found.source, setup=setup, names=found.names)


def _parsed(script: str, key: str) -> ast.Module:
    try:
        tree = ast.parse(script)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise GroundTruthError(f"'{key}' is not Python: {str(error)[:80]}") from None
    if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        raise GroundTruthError(f"'{key}' asserts nothing")
    return tree


def _text(truth: Mapping[str, Any], key: str) -> str:
    if not isinstance(truth[key], str):
        raise GroundTruthError(f"'{key}' is a {type(truth[key]).__name__}, not text")
    return truth[key]


def _list_of(truth: Mapping[str, Any], key: str) -> list[Any]:
    value = truth.get(key)
    if not isinstance(value, list | tuple):
        raise GroundTruthError(f"'{key}' is a {type(value).__name__}, not a list")
    return list(value)


def _nested(truth: Mapping[str, Any]) -> CodeTests:
    value = _decoded(truth["input_output"])
    if not isinstance(value, Mapping) or "input_output" in value:
        raise GroundTruthError("'input_output' is not an object of inputs and outputs")
    return _code_tests(value)


_FORMATS = {
    "public_test_cases": _live_code_bench,
    "test_code": _script,
    "functional": _script,
    "inputs": _pairs,
    "assert_case": _assert_list,
    "test_list": _assert_list,
    "test": _script,
    "input_output": _nested,
}
