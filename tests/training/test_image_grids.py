"""Grids of images, pixel by pixel."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jflow.training import image_grids


def test_pixels_and_places():
    images = np.full((5, 2, 3, 3), -1.0, np.float32)
    images[1, 0, 0] = [1.0, 0.0, -1.0]
    images[4] = 0.5
    grid = image_grids.tile(images, columns=3, gap=1)
    assert (grid.shape, grid.dtype) == ((2 * 3 - 1, 3 * 4 - 1, 3), np.uint8)
    # The second image begins after one gap, the fifth in the second row.
    assert grid[0, 4].tolist() == [255, 128, 0]
    assert grid[1, 5].tolist() == [0, 0, 0]
    assert np.all(grid[3:5, 4:7] == 191)
    # Gaps, and the place that is left over.
    assert (
        np.all(grid[2] == image_grids.GREY)
        and np.all(grid[:, 3] == image_grids.GREY)
        and np.all(grid[3:, 8:] == image_grids.GREY)
    )


def test_the_grid_is_about_square():
    assert image_grids.tile(np.zeros((10, 4, 4, 1)), gap=0).shape == (12, 16, 3)
    assert image_grids.tile(np.zeros((9, 4, 4, 1)), gap=2).shape == (16, 16, 3)
    assert image_grids.tile(np.zeros((1, 4, 5, 1))).shape == (4, 5, 3)


def test_grey_is_repeated_and_values_are_clipped():
    column = jnp.asarray([-7.0, -1.0, -0.5, 0.0, 1.0, 7.0], jnp.bfloat16).reshape(1, 6, 1, 1)
    grid = image_grids.tile(column)
    assert grid[:, 0, 0].tolist() == [0, 0, 64, 128, 255, 255]
    assert np.all(grid == grid[:, :, :1])


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.zeros((4, 4, 1)), {}, "images"),
        (np.zeros((1, 4, 4, 2)), {}, "images"),
        (np.zeros((0, 4, 4, 1)), {}, "images"),
        (np.zeros((1, 4, 4, 1), np.uint8), {}, "images.*uint8"),
        (np.full((1, 4, 4, 1), np.nan), {}, "finite"),
        (np.zeros((1, 4, 4, 1)), {"columns": 0}, "columns"),
        (np.zeros((1, 4, 4, 1)), {"gap": -1}, "gap"),
    ],
)
def test_refusals_name_the_argument(images, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        image_grids.tile(images, **options)


def test_png_is_read_back(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    path = tmp_path / "grid.png"
    for expected in (image, image[:, ::-1]):
        image_grids.write_png(path, expected)
        with image_grids.pillow().open(path) as read:
            np.testing.assert_array_equal(np.asarray(read), expected)
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    image_grids.write_png(path, np.zeros((2, 2, 3), np.uint8))
    before = path.read_bytes()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(image_grids.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        image_grids.write_png(path, np.ones((2, 2, 3), np.uint8))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="image"):
        image_grids.write_png(path, np.zeros((2, 2), np.uint8))
    with pytest.raises(TypeError, match="uint8"):
        image_grids.write_png(path, np.zeros((2, 2, 3)))


PIXELS = np.zeros((4, 8, 8, 1), np.float32)


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda d: image_grids.tile(np.zeros((4, 8, 8, 3), np.uint8)),
            TypeError,
            "^images: expected floating-point arrays, got dtype uint8$",
            id="pixels as bytes",
        ),
        pytest.param(
            lambda d: image_grids.tile(PIXELS[0]),
            ValueError,
            r"^images: expected an array of shape \(any, any, any, any\), got \(8, 8, 1\)$",
            id="one image",
        ),
        pytest.param(
            lambda d: image_grids.tile(np.repeat(PIXELS, 2, axis=3)),
            ValueError,
            r"^images: expected \[N, H, W, C\] with C = 1 or 3 .*, got \(4, 8, 8, 2\)$",
            id="images of two channels",
        ),
        pytest.param(
            lambda d: image_grids.write_png(d / "a.png", PIXELS[0].repeat(3, axis=2)),
            TypeError,
            "^image: expected uint8, got float32$",
            id="a picture of floats",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        attempt(tmp_path)
    # Not by a sub-class that means something else.
    assert caught.type is error
