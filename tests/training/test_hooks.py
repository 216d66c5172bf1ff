"""Hooks of a run."""

from __future__ import annotations

import pytest

from jflow.training import Profile
from tests.training import runs


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d, p: runs.train(p, d, hooks=[Profile(d, 8, 8)]),
            ValueError,
            "^last: expected a step after first = 8, got 8$",
            id="a trace of one step",
        ),
        pytest.param(
            lambda d, p: runs.train(p, hooks=print),
            TypeError,
            "^hooks: expected a sequence of hooks or functions of a row, got builtin_function_or_method$",
            id="a callback that is not in a list",
        ),
        pytest.param(
            lambda d, p: runs.train(p, d, hooks=[Profile(d, 4, 12)]),
            ValueError,
            "^last: expected at most total_steps = 8, got 12$",
            id="a trace that ends before it begins",
        ),
        pytest.param(
            lambda d, p: Profile(d, 0.5, 4),
            TypeError,
            r"^first: expected a whole number, got float 0\.5$",
            id="a trace of half steps",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path, problem):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path, problem)
    # Not by a sub-class that means something else.
    assert caught.type is error
