"""Axes and figures, and what all plots have in common."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from jflow import diagnostics, plots

pytest.importorskip("matplotlib")
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
