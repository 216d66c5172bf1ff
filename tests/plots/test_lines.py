"""Learning curves and estimates."""

from __future__ import annotations

import numpy as np
import pytest

from jflow import plots
from jflow.training import metrics_log

pytest.importorskip("matplotlib")


def axis():
    return plots.panels()[1][0, 0]


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
