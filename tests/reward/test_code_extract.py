"""Which fenced block of a response is the program, and what is no fence."""

from __future__ import annotations

import time

import pytest

from or1.reward.code.extract import last_python_block

DOCSTRING = 'def f():\n    """\n    ```\n    f()\n    ```\n    """\n'
SPANS = 's = "See ```x``` and ```"\nt = 1\n'
FENCE_IN_TEXT = "s = '''\n```\n'''\n"


@pytest.mark.parametrize(
    "mark",
    [
        'python title="a b.py"',
        "{.python .numberLines}",
        "{#here .python}",
        "{python}",
        "python:main.py",
        "main.py",
        " PYTHON3.11",
        "python {linenos=true}",
        "python,linenos",
        "py3",
        "",
        'title="x"',
        "solution",
        "pythonic",
    ],
)
@pytest.mark.parametrize("fence", ["```", "~~~", "`````"])
def test_a_block_marked_as_python_or_as_nothing_known_is_a_program(mark: str, fence: str) -> None:
    assert last_python_block(f"So:\n{fence}{mark}\nx = 1\n{fence}\nDone.") == "x = 1\n"


@pytest.mark.parametrize("mark", ["cpp", "Text", "python-repl", "pycon", " bash", "{.json}", "c++"])
def test_a_block_marked_as_something_else_is_no_program(mark: str) -> None:
    assert last_python_block(f"```{mark}\nx = 1\n```") is None
    assert last_python_block(f"```\nx = 1\n```\nprints\n```{mark}\n5\n```") == "x = 1\n"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\nx = 1\n```\nprints\n```\n5\n```", "x = 1\n"),
        ("```\nx = 1\n```\nor\n```\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\n```\n```python\nx = 2", "x = 1\n"),
        ("```python\nx = 1\n```python\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\n```cpp\nint x;\n```", "x = 1\n"),
        ("```\nx = 1", None),
        ("```\n\n```", None),
        ("```python\nprint(1)```", None),
    ],
)
def test_the_last_closed_block_counts(text: str, program: str | None) -> None:
    assert last_python_block(text) == program


@pytest.mark.parametrize("program", [DOCSTRING, SPANS, "```x``` = 1\n", "x = 1 # ```\n"])
def test_a_fence_inside_a_line_does_not_cut_the_program(program: str) -> None:
    assert last_python_block(f"```python\n{program}```\nIt prints 1.") == program
    assert last_python_block(f"```\n{program}```\nIt prints 1.") == program


@pytest.mark.parametrize("fence", ["~~~", "````"])
def test_a_fence_of_another_kind_or_of_fewer_characters_closes_nothing(fence: str) -> None:
    assert last_python_block(f"{fence}python\n{FENCE_IN_TEXT}{fence}") == FENCE_IN_TEXT


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("Use ```x``` here:\n```python\nx = 1\n```", "x = 1\n"),
        ("Here: ```python\nx = 1\n```", "x = 1\n"),
        ("1. So:\n   ```python\n   if x:\n       y\n\n   ```", "if x:\n    y\n\n"),
        ("- ```python\n  if x:\n      y\n  ```", "if x:\n    y\n"),
        ("  ```python\nif x:\n    y\n```", "if x:\n    y\n"),
        ("```python\r\nx = 1\r\n```\r\n", "x = 1\r\n"),
    ],
)
def test_blocks_within_other_text_lose_its_indentation(text: str, program: str) -> None:
    assert last_python_block(text) == program


@pytest.mark.parametrize(
    "unit",
    [
        "`",
        "~",
        " ",
        "\n",
        "```",
        "``` ",
        "```\n",
        "~~~\n",
        "```python\n",
        "```python\n```",
        "`\n",
        "- ",
        "> ",
        "a=",
        "``` a=",
        "```py ~~~\n",
        ".",
        "{.",
    ],
)
def test_extraction_is_linear_in_hostile_text(unit: str) -> None:
    flood = unit * (200_000 // len(unit))
    began = time.process_time()
    for text in (flood, f"```python\n{flood}\n```", f"```{flood[:150]}\nx\n```", f"```\n```py{flood}"):
        last_python_block(text)
    # A quadratic search of 200 kB takes many minutes.
    assert time.process_time() - began < 20
