"""Paths, samples and densities in the plane."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jflow import plots

pytest.importorskip("matplotlib")
TIMES = np.array([0.0, 0.25, 1.0])
POINTS = np.array([[0.1, 0.1], [0.1, 0.9], [1.9, 0.1], [0.2, 0.2]])


def axis():
    return plots.panels()[1][0, 0]


def test_paths_of_one_number_are_lines_against_time():
    states = np.arange(6.0).reshape(2, 3)
    for given in (states, states[..., None]):
        ax = axis()
        plots.paths(TIMES, given, ax=ax)
        for line, row in zip(ax.lines, states, strict=True):
            np.testing.assert_array_equal(line.get_xydata(), np.stack([TIMES, row], axis=-1))


def test_paths_in_the_plane_are_coloured_by_the_middle_of_each_step():
    states, ax = np.arange(12.0).reshape(2, 3, 2), axis()
    plots.paths(TIMES, states, ax=ax)
    lines, first, last = ax.collections
    np.testing.assert_array_equal(lines.get_segments(), [states[i, j : j + 2] for i in (0, 1) for j in (0, 1)])
    np.testing.assert_array_equal(lines.get_array(), [0.125, 0.625] * 2)
    assert lines.get_clim() == first.get_clim() == (0.0, 1.0)
    np.testing.assert_array_equal(first.get_offsets(), states[:, 0])
    np.testing.assert_array_equal(last.get_offsets(), states[:, -1])


@pytest.mark.parametrize(
    ("times", "shape", "name"),
    [(TIMES, (3,), "states"), (TIMES, (2, 3, 3), "states"), (TIMES, (3, 2), "times"), ([0.0], (3, 1), "times")],
)
def test_paths_of_other_shapes_are_refused(times, shape, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        plots.paths(times, np.zeros(shape))


def test_a_histogram_holds_shares_over_areas():
    ax = axis()
    plots.samples_in_plane(POINTS, extent=(0.0, 2.0, 0.0, 1.0), bins=2, vmax=3.0, ax=ax)
    (image,) = ax.images
    # Rows go up; one bin has the area 1/2, and one sample of four lies on the right.
    np.testing.assert_allclose(image.get_array(), [[1.0, 0.5], [0.5, 0.0]])
    assert image.get_extent() == [0.0, 2.0, 0.0, 1.0] and image.origin == "lower" and image.get_clim() == (0.0, 3.0)
    (bar,) = ax.child_axes
    assert bar.get_ylabel() == "density of the samples"
    # A sample outside counts in the total.
    plots.samples_in_plane(POINTS, extent=(0.0, 1.0, 0.0, 1.0), bins=1, ax=ax)
    np.testing.assert_allclose(ax.images[1].get_array(), [[0.75]])


def test_a_density_is_that_of_the_cells_centres_in_the_dtype_of_the_samples():
    ax, dtypes = axis(), []

    def log_density(x):
        dtypes.append(x.dtype)
        return jnp.where(x[0] < 0, -jnp.inf, x[0] + 2 * x[1])

    samples = POINTS.astype(np.float32)
    plots.density_and_samples(log_density, samples, extent=(-2.0, 2.0, 0.0, 1.0), resolution=2, ax=ax)
    np.testing.assert_allclose(ax.images[0].get_array(), np.exp([[-np.inf, 1.5], [-np.inf, 2.5]]), rtol=1e-6)
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), samples)
    assert dtypes == [np.float32] and ax.get_xlim() == (-2.0, 2.0) and ax.get_ylim() == (0.0, 1.0)


def test_by_default_all_samples_are_shown():
    ax = axis()
    plots.samples_in_plane(np.concatenate([POINTS, [[np.nan, 0.0]]]), ax=ax)
    np.testing.assert_allclose(ax.images[0].get_extent(), [0.01, 1.99, 0.01, 0.99])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.samples_in_plane(np.zeros((3, 3))), r"samples: expected an array of shape \(any, 2\)"),
        (lambda: plots.samples_in_plane(np.zeros((0, 2))), "extent: expected .* no finite sample"),
        (lambda: plots.samples_in_plane(POINTS, extent=(1.0, 0.0, 0.0, 1.0)), "extent: expected .* left < right"),
        (lambda: plots.density_and_samples(lambda x: x, POINTS), r"log_density\(x\) for a batch of x: expected"),
    ],
)
def test_bad_arguments_of_the_plane(call, message):
    with pytest.raises(ValueError, match=message):
        call()
