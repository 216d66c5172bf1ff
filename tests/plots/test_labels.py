"""Labels of points, which do not overlap."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jflow import plots

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]


def axis():
    return plots.panels()[1][0, 0]


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
