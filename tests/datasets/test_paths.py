"""Paths of data sets."""

from __future__ import annotations

import pytest

from jflow import datasets


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d: datasets.npz(d / "data.npz"),
            FileNotFoundError,
            "^npz: .*data.npz does not exist; jflow brings no data sets, pass the path of an .npz file",
            id="a file that is not there",
        ),
        pytest.param(
            lambda d: datasets.npz(d),
            ValueError,
            r"^npz: expected an \.npz file, as numpy\.savez writes it, got the folder ",
            id="a folder instead of a file",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path)
    # Not by a sub-class that means something else.
    assert caught.type is error
