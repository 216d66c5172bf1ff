"""Configurations, as checkpoints keep them."""

from __future__ import annotations

import pytest

from tests.training import runs


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d, p: runs.train(p, d, config={"data": d}),
            TypeError,
            "^config: expected dictionaries, lists, strings, finite numbers and None only: .*PosixPath",
            id="a config with a path",
        ),
        pytest.param(
            lambda d, p: runs.again(p, d, config={"rate": 3e-3}),
            ValueError,
            r"^config: it differs from the checkpoint's:\n  rate: checkpoint 0\.01, now 0\.003$",
            id="resumed with another config",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path, problem):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path, problem)
    # Not by a sub-class that means something else.
    assert caught.type is error
