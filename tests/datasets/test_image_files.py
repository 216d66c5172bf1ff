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


@pytest.mark.parametrize("channels", [1, 3])
def test_levels_are_kept_as_uint8_and_map_to_the_same_pixels(tmp_path, channels):
    pytest.importorskip("PIL")
    levels = np.arange(256, dtype=np.uint8).reshape(8, 32, 1).repeat(3, axis=2)
    image_grids.write_png(tmp_path / "a.png", levels)
    kept, scaled = (datasets.images(tmp_path, channels=channels, dtype=dtype)[0] for dtype in ("uint8", "float32"))
    assert kept.x1.dtype == np.uint8 and scaled.x1.dtype == np.float32 and kept.x1.flags.writeable
    np.testing.assert_array_equal(kept.x1, levels[..., :channels])
    np.testing.assert_array_equal(datasets.PIXELS.forward(kept.x1), scaled.x1)
    with pytest.raises(ValueError, match=r"^dtype: expected one of 'float32', 'uint8', got 'int8'$"):
        datasets.images(tmp_path, dtype="int8")
