"""Plots: what is drawn, where, and that labels do not overlap."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jflow import diagnostics, plots
from jflow.training import metrics_log

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[1]
TIMES = np.array([0.0, 0.25, 1.0])
POINTS = np.array([[0.1, 0.1], [0.1, 0.9], [1.9, 0.1], [0.2, 0.2]])
RESIDUALS = diagnostics.ResidualGrid(
    s=np.array([0.0, 0.5]),
    t=np.array([0.2, 0.4, 1.0]),
    tangent=np.array([0.3, 0.4]),
    eulerian=np.array([[1e-3, 0.0, 1e-1], [np.nan, np.nan, 1e-2]]),
    lagrangian=np.full((2, 3), np.nan),
    semigroup=np.full((2, 3), 2.0),
)
CALLS = {
    "paths": lambda ax: plots.paths(TIMES, np.zeros((2, 3)), ax=ax),
    "paths in the plane": lambda ax: plots.paths(TIMES, np.zeros((2, 3, 2)), ax=ax),
    "image_grid": lambda ax: plots.image_grid(np.zeros((2, 3, 3, 1)), labels=["a", "b"], ax=ax),
    "residuals": lambda ax: plots.residuals(RESIDUALS, "eulerian", ax=ax),
    "learning_curve": lambda ax: plots.learning_curve([{"step": 1, "loss": 2.0}], ax=ax),
    "samples_in_plane": lambda ax: plots.samples_in_plane(POINTS, ax=ax),
    "density_and_samples": lambda ax: plots.density_and_samples(lambda x: -x @ x, POINTS, resolution=4, ax=ax),
    "curves": lambda ax: plots.curves({"a": ([1, 2], [3, 4])}, ax=ax),
    "against": lambda ax: plots.against([1.0, 2.0], [1.0, 3.0], ax=ax),
    "labelled_scatter": lambda ax: plots.labelled_scatter([1.0, 2.0], [1.0, 3.0], ["a", "b"], ax=ax),
}


def axis():
    return plots.panels()[1][0, 0]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_plot_is_drawn_on_the_given_axis_or_a_new_one_without_pyplot(call, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    figure, axes = plots.panels(1, 2)
    assert call(axes[0, 1]) is figure
    assert axes[0, 1].has_data() and not axes[0, 0].has_data()
    new = call(None)
    assert isinstance(new, Figure) and new is not figure and new.axes[0].has_data()
    new.draw_without_rendering()
    with pytest.raises(TypeError, match=r"^ax: expected an axis of Matplotlib"):
        call(figure)


def test_a_figure_is_returned_for_an_axis_of_a_part_of_it():
    from matplotlib.figure import Figure

    whole = Figure()
    part = whole.subfigures(1, 2)[1]
    assert plots.paths(TIMES, np.zeros((1, 3)), ax=part.subplots()) is whole


@pytest.mark.parametrize("call", [*CALLS.values(), lambda ax: plots.panels()], ids=[*CALLS, "panels"])
def test_the_message_without_matplotlib_names_the_extra(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plots: expected Matplotlib.*pip install 'jflow\[plots\]'"):
        call(None)


def test_panels_have_the_size_of_their_number():
    figure, axes = plots.panels(2, 3, size=(2.0, 1.5), sharex=True)
    assert axes.shape == (2, 3) and figure.get_size_inches().tolist() == [6.0, 3.0]
    with pytest.raises(ValueError, match="rows"):
        plots.panels(0)
    with pytest.raises(ValueError, match="size"):
        plots.panels(size=(0.0, 1.0))


# ---- the plane ----


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


# ---- grids ----


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


# ---- lines ----


def test_a_learning_curve_of_a_run(tmp_path):
    with metrics_log.MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step, loss in enumerate([4.0, 2.0, np.nan, 0.0, 8.0]):
            log.write({"kind": "train", "step": step, "loss": loss, "bins": [1.0, 2.0]})
        log.write({"kind": "eval", "step": 3, "loss": 5.0})
    for source in (tmp_path, tmp_path / "metrics.jsonl", metrics_log.read(tmp_path / "metrics.jsonl")):
        ax = axis()
        plots.learning_curve(source, smooth=3, yscale="log", ax=ax)
        values, means, scored = ax.lines
        np.testing.assert_array_equal(values.get_xydata(), [[0, 4], [1, 2], [2, np.nan], [3, 0], [4, 8]])
        np.testing.assert_array_equal(means.get_ydata(), [3, 3, np.nan, 4, 4])
        np.testing.assert_array_equal(scored.get_xydata(), [[3, 5]])
        assert [line.get_label() for line in (means, scored)] == ["loss, train", "loss, eval"]
        assert ax.get_xlabel() == "step" and ax.get_yscale() == "log"
    with pytest.raises(ValueError, match="names: expected metrics of the rows, bins, loss, got 'lost'"):
        plots.learning_curve(tmp_path, "lost")
    with pytest.raises(ValueError, match=r"names: expected metrics that are numbers; 'bins' of step 0 is \[1.0, 2.0\]"):
        plots.learning_curve(tmp_path, "bins")
    with pytest.raises(FileNotFoundError):
        plots.learning_curve(tmp_path / "other")


def test_curves_join_the_finite_points_and_carry_their_error_bars():
    ax = axis()
    series = {"a": ([1, 2, 3], [1.0, np.nan, 3.0]), "b": ([1, 2], [5.0, 6.0], [0.5, 0.25])}
    plots.curves(series, formats={"a": "s--"}, ax=ax)
    a, b = ax.containers
    np.testing.assert_array_equal(a.lines[0].get_xydata(), [[1, 1], [3, 3]])
    assert (a.lines[0].get_marker(), a.lines[0].get_linestyle()) == ("s", "--") and a.lines[2] == ()
    np.testing.assert_array_equal(b.lines[2][0].get_segments(), [[[1, 4.5], [1, 5.5]], [[2, 5.75], [2, 6.25]]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    with pytest.raises(ValueError, match=r"series\['a'\]: expected \(x, y\) or \(x, y, error\) of one length"):
        plots.curves({"a": ([1, 2], [1.0])})
    with pytest.raises(ValueError, match="formats: expected one of 'a'"):
        plots.curves({"a": ([1], [1.0])}, formats={"c": "o"})


def test_estimates_are_drawn_against_exact_values():
    ax = axis()
    plots.against([1.0, 3.0], {"good": [1.1, 2.9], "poor": [0.0, np.nan]}, ax=ax)
    good, poor, equality = ax.lines
    np.testing.assert_array_equal(good.get_xydata(), [[1.0, 1.1], [3.0, 2.9]])
    np.testing.assert_array_equal(poor.get_ydata(), [0.0, np.nan])
    assert equality.get_slope() == 1.0 and equality.get_xy1() == (2.0, 2.0)
    with pytest.raises(ValueError, match=r"estimates\['poor'\]: expected an array of shape \(2\)"):
        plots.against([1.0, 3.0], {"poor": [1.0]})


# ---- labels ----


def boxes(artists, figure):
    """Extents (left, bottom, right, top) in pixels, after a drawing."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return np.array([Text.get_window_extent(each).extents for each in artists if each.get_visible()])


def pairs_that_overlap(found):
    low = np.maximum(found[:, None, :2], found[None, :, :2])
    high = np.minimum(found[:, None, 2:], found[None, :, 2:])
    return int(np.triu(np.all(low < high, axis=-1), 1).sum())


def catalogue():
    rows = json.loads((ROOT / "docs" / "catalogue.json").read_text())["rows"]
    rows = {name: row for name, row in rows.items() if "rmse_1" in row and "flops" in row}
    x, y, bars = (np.array([row[key] for row in rows.values()]) for key in ("flops", "rmse_1", "rmse_1_spread"))
    return x, y, bars, list(rows), [str(row["taught"]) for row in rows.values()]


def test_labels_of_the_catalogue_overlap_neither_each_other_nor_the_edges():
    x, y, bars, names, groups = catalogue()
    # Smaller than the page's figure.
    figure, axes = plots.panels(size=(7.0, 5.0))
    ax = axes[0, 0]
    plots.labelled_scatter(x, y, names, yerr=bars, groups=groups, ax=ax)
    # Set after the call, as is usual.
    ax.set(yscale="log", xlabel="cost", ylabel="error")
    found = boxes(ax.texts, figure)
    assert [text.get_text() for text in ax.texts] == names and len(found) == len(names) > 30
    # One font at one place would overlap often: a test of the test.
    assert pairs_that_overlap(found) == 0 < pairs_that_overlap(found + [0.0, 0.0, 60.0, 20.0])
    frame = ax.get_window_extent().extents
    assert (found[:, :2] >= frame[:2]).all() and (found[:, 2:] <= frame[2:]).all()
    # Nor do they cover a marker, and a second drawing changes nothing.
    points = ax.transData.transform(np.stack([x, y], axis=-1))
    assert not any((box[:2] < point).all() and (point < box[2:]).all() for box in found for point in points)
    np.testing.assert_allclose(boxes(ax.texts, figure), found, atol=1e-9)


def test_labels_of_many_points_at_one_place_do_not_overlap_even_without_room():
    ax = plots.panels(size=(2.0, 1.5))[1][0, 0]
    plots.labelled_scatter(np.ones(16), np.ones(16), [f"point number {i}" for i in range(16)], ax=ax)
    found = boxes(ax.texts, ax.figure)
    assert len(found) == 16 and pairs_that_overlap(found) == 0


def test_labels_follow_limits_and_a_near_one_has_no_line():
    ax = axis()
    plots.labelled_scatter([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], ["a", "b", "c"], ax=ax)
    ax.set(xlim=(1.5, 5.0))
    ax.figure.draw_without_rendering()
    assert [text.get_visible() for text in ax.texts] == [False, True, True]
    assert not any(text.arrow_patch.get_visible() for text in ax.texts[1:])
    left = [text.get_position()[0] for text in ax.texts[1:]]
    assert all(3.0 < each < 12.0 for each in left)
    ax.set(xlim=(0.0, 5.0))
    ax.figure.draw_without_rendering()
    assert all(text.get_visible() for text in ax.texts)


def test_labels_keep_away_from_error_bars_on_an_inverted_axis_too():
    for inverted in (False, True):
        ax = axis()
        plots.labelled_scatter([1.0, 0.95], [0.0, 0.5], ["aaaa", "bbbb"], yerr=[2.0, 0.0], ax=ax)
        ax.set(xlim=(0.0, 2.0), ylim=(3.0, -3.0) if inverted else (-3.0, 3.0))
        for left, _, right, _ in boxes(ax.texts, ax.figure):
            bar = ax.transData.transform((1.0, 0.0))[0]
            assert not left < bar < right


def test_a_figure_without_points_has_no_legend_and_no_warning(recwarn):
    for figure in (plots.labelled_scatter([], [], [], groups=[]), plots.curves({}), plots.against([1.0], {})):
        figure.draw_without_rendering()
        assert figure.axes[0].get_legend() is None
    assert not recwarn.list


def test_bad_arguments_of_labels():
    with pytest.raises(ValueError, match=r"x: expected an array of shape \(2\)"):
        plots.labelled_scatter([1.0], [1.0, 2.0], ["a", "b"])
    with pytest.raises(ValueError, match="y: expected finite values"):
        plots.labelled_scatter([1.0, 2.0], [1.0, np.inf], ["a", "b"])
    with pytest.raises(ValueError, match="groups: expected one for each of the 2 points, got 1"):
        plots.labelled_scatter([1.0, 2.0], [1.0, 2.0], ["a", "b"], groups=["g"])
