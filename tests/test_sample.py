"""Pictures of samples."""

from __future__ import annotations

import numpy as np
import pytest

from jflow.sample import picture

ROWS = np.ones((16, 3), np.float32)


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda: picture(ROWS),
            ValueError,
            r"^samples: expected images \[N, H, W, C\] or points \[N, 2\] for a picture, got \(16, 3\)",
            id="samples in three dimensions",
        ),
    ],
)
def test_refused_in_words(attempt, error, message):
    with pytest.raises(error, match=message) as caught:
        attempt()
    # Not by a sub-class that means something else.
    assert caught.type is error
