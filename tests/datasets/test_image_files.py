"""Folders of images."""

from __future__ import annotations

import numpy as np
import pytest

from jflow import datasets
from jflow.training import image_grids


def images(folder, sizes, **options):
    pytest.importorskip("PIL")
    for name, size in sizes.items():
        (folder / name).parent.mkdir(exist_ok=True)
        image_grids.write_png(folder / name, np.zeros((*size, 3), np.uint8))
    return datasets.images(folder, **options)


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d: images(d, {}),
            ValueError,
            "^images: expected images .* in .*, found none$",
            id="a folder with no images",
        ),
        pytest.param(
            lambda d: images(d, {"a.png": (4, 4), "b.png": (4, 5)}),
            ValueError,
            r"^images: expected one size of image, or size=\.\.\., .*a\.png is 4x4 pixels, .*b\.png is 5x4$",
            id="images of two sizes",
        ),
        pytest.param(
            lambda d: images(d, {"a.png": (4, 4)}, channels=4),
            ValueError,
            "^channels: expected one of 1, 3, got 4$",
            id="images of four channels",
        ),
        pytest.param(
            lambda d: images(d, {"a.png": (4, 4)}, size=(32, 32)),
            TypeError,
            r"^size: expected a whole number, got tuple \(32, 32\)$",
            id="a size for each side",
        ),
        pytest.param(
            lambda d: [(d / "cat").mkdir(), images(d, {"dog/a.png": (4, 4)})],
            ValueError,
            "^images: expected images in every sub-folder, .*cat has none$",
            id="a class without images",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path)
    # Not by a sub-class that means something else.
    assert caught.type is error
