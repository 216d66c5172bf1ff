"""The expectations of the checks: what passes, what fails, and the figure in the message."""

import numpy as np
import pytest

from jflow.testing import expect


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expect.true(0, "shape: expected ()"), r"shape: expected \(\)"),
        (lambda: expect.at_most("a", [0.5, 3.0, 2.0], [1.0, 2.0, 1.9], "why"), "a: got 3, expected at most 2: why"),
        (lambda: expect.at_most("a", [0.5, np.nan], 1.0, "why"), "a: got nan, expected at most 1: why"),
        (lambda: expect.above("a", [2.0, 0.5], 1.0, "why"), "a: got 0.5, expected more than 1: why"),
        (lambda: expect.above("a", np.nan, 1.0, "why"), "a: got nan"),
        (
            lambda: expect.close("a", 1.1, 1.0, meaning="why", rtol=0.05, atol=0.0),
            "a: error: got 0.1, .*at most 0.05: why",
        ),
        (lambda: expect.close("a", np.inf, np.inf, meaning="why", rtol=1.0, atol=1.0), "a: error: got nan"),
        (lambda: expect.finite("a", {"b": [1.0, np.inf]}, "why"), r"a\['b'\]\[1\]: got 1 of 1 entries .*: why"),
    ],
)
def test_failures_say_the_figure_and_the_limit(call, message):
    with pytest.raises(AssertionError, match=message):
        call()


def test_what_is_within_its_limits_passes():
    expect.require_x64()
    expect.true(True, "")
    expect.at_most("a", [1.0, 0.0], 1.0, "")
    expect.above("a", [1.1, 2.0], 1.0, "")
    expect.close("a", 1.04, 1.0, meaning="", rtol=0.05, atol=0.0)
    expect.finite("a", {"b": np.ones(2)}, "")
