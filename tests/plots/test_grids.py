"""Grids of images and of residuals."""

from __future__ import annotations

import numpy as np
import pytest

from jflow import diagnostics, plots

pytest.importorskip("matplotlib")
RESIDUALS = diagnostics.ResidualGrid(
    s=np.array([0.0, 0.5]),
    t=np.array([0.2, 0.4, 1.0]),
    tangent=np.array([0.3, 0.4]),
    eulerian=np.array([[1e-3, 0.0, 1e-1], [np.nan, np.nan, 1e-2]]),
    lagrangian=np.full((2, 3), np.nan),
    semigroup=np.full((2, 3), 2.0),
)


def axis():
    return plots.panels()[1][0, 0]


def test_images_lie_side_by_side_in_the_given_range():
    ax = axis()
    plots.image_grid(np.array([0.0, 0.5, 1.0]).reshape(3, 1, 1), columns=2, vmin=0.0, vmax=1.0, gap=0, ax=ax)
    plots.image_grid(np.array([0.0, 0.5, 1.0]).reshape(3, 1, 1), columns=2, vmin=1.0, vmax=0.0, gap=0, ax=ax)
    straight, negative = (image.get_array()[..., 0] for image in ax.images)
    np.testing.assert_array_equal(straight, [[0, 128], [255, 128]])
    np.testing.assert_array_equal(negative, [[255, 128], [0, 128]])


def test_a_label_lies_in_the_white_band_above_its_image():
    ax = axis()
    plots.image_grid(np.full((3, 8, 8, 1), -1.0), columns=2, labels=["gypsy", "a very long label indeed", 7], ax=ax)
    pixels = ax.images[0].get_array()
    for index, patch in enumerate(ax.patches):
        row, column = divmod(index, 2)
        box = patch.get_path().get_extents()
        left, top = 9 * column - 0.5, 11 * row - 0.5
        assert left < box.x0 < box.x1 < left + 8 and top < box.y0 < box.y1 < top + 2
        assert (pixels[11 * row : 11 * row + 2, 9 * column : 9 * column + 8] == 255).all()
        assert (pixels[11 * row + 2 : 11 * row + 10, 9 * column : 9 * column + 8] == 0).all()
    assert len(ax.patches) == 3


def test_bad_arguments_of_images():
    with pytest.raises(TypeError, match="images: expected floating-point"):
        plots.image_grid(np.zeros((1, 2, 2), np.uint8))
    with pytest.raises(ValueError, match="labels: expected one for each of the 2 images, got 1"):
        plots.image_grid(np.zeros((2, 2, 2)), labels=["a"])
    with pytest.raises(ValueError, match="vmin, vmax: expected two different numbers"):
        plots.image_grid(np.zeros((2, 2, 2)), vmin=1.0)


def test_residuals_have_s_across_and_t_up_and_their_edges_between_the_times():
    figure = plots.residuals(RESIDUALS)
    tangent, eulerian, semigroup = figure.axes[:3]
    assert [ax.get_title() for ax in figure.axes[:3]] == ["tangent", "eulerian", "semigroup"]
    np.testing.assert_array_equal(tangent.lines[0].get_xydata(), [[0.0, 0.3], [0.5, 0.4]])
    (mesh,) = eulerian.collections
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [-0.25, 0.25, 0.75])
    np.testing.assert_allclose(mesh.get_coordinates()[:, 0, 1], [0.1, 0.3, 0.7, 1.3])
    # Zero has the first colour, and only what is undefined has none.
    expected = np.ma.masked_invalid([[1e-3, np.nan], [1e-3, np.nan], [1e-1, 1e-2]])
    np.testing.assert_array_equal(mesh.get_array().mask, expected.mask)
    np.testing.assert_allclose(mesh.get_array().filled(0), expected.filled(0))
    assert mesh.get_clim() == semigroup.collections[0].get_clim() == (1e-3, 2.0)


def test_residuals_at_times_in_any_order_and_of_one_time():
    turned = RESIDUALS._replace(t=RESIDUALS.t[::-1], eulerian=RESIDUALS.eulerian[:, ::-1])
    first = [plots.residuals(each, "eulerian").axes[0].collections[0] for each in (RESIDUALS, turned)]
    np.testing.assert_array_equal(first[0].get_coordinates(), first[1].get_coordinates())
    np.testing.assert_array_equal(first[0].get_array().filled(0), first[1].get_array().filled(0))
    one = RESIDUALS._replace(s=np.array([0.5]), eulerian=RESIDUALS.eulerian[:1])
    mesh = plots.residuals(one, "eulerian").axes[0].collections[0]
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [0.45, 0.55])


def test_bad_arguments_of_residuals():
    with pytest.raises(ValueError, match="names: expected one of 'tangent'"):
        plots.residuals(RESIDUALS, "sideways")
    with pytest.raises(ValueError, match="grid: expected a finite residual of lagrangian"):
        plots.residuals(RESIDUALS, "lagrangian")
    with pytest.raises(ValueError, match="ax: expected one axis for each of eulerian, semigroup, got 1"):
        plots.residuals(RESIDUALS, ("eulerian", "semigroup"), ax=axis())
