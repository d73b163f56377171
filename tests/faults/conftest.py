"""Fixtures of the fault tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from or1.reward.scorers import CustomScorer
from tests.helpers.attacks import Form
from tests.helpers.orders import FUNCTION
from tests.helpers.plain_user import PLAIN_USER, Grader

FORMS = ("bwrap, root", "namespaces, root", "bwrap, plain user", "namespaces, plain user")


@pytest.fixture(scope="module", params=[FORMS[0], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])])
def form(request: pytest.FixtureRequest) -> Iterator[Form]:
    choice, _, who = request.param.partition(", ")
    root = os.geteuid() == 0
    required = os.environ.get("OR1_REQUIRE_SANDBOXES") == "1"
    if who == "root" and not root:
        pytest.skip("needs root")
    grader = None
    try:
        grader = Grader(PLAIN_USER if who == "plain user" and root else None)
        kind = grader.ask(choice=choice)
    except (OSError, AssertionError) as error:
        if grader is not None:
            grader.close()
        if required:
            raise
        pytest.skip(f"{request.param}: {error}")
    yield Form(kind, grader)
    grader.close()


@pytest.fixture
def function(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text(FUNCTION)
    return f"{tmp_path / 'rewards.py'}:reward"


@pytest.fixture
def obeying(function: str, tmp_path: Path) -> Iterator[Callable[..., CustomScorer]]:
    """Return a function that makes scorers with one worker that obey orders."""
    made = []

    def make(**options) -> CustomScorer:
        made.append(CustomScorer(function, **{"workers": 1, "timeout_s": 10.0} | options))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()
