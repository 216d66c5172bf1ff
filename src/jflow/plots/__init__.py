"""Plots: figures of samples, paths, images, residuals and learning curves, drawn with Matplotlib.

The functions are::

    panels               a new figure and its axes
    paths                samples through time: against t in one dimension, coloured by t in the plane
    image_grid           images side by side, with labels
    residuals            the residuals of ``diagnostics.residual_grid`` over (s, t)
    learning_curve       metrics of ``metrics.jsonl`` against the step
    samples_in_plane     a histogram of samples in the plane
    density_and_samples  a density in the plane, with samples as points
    curves               lines with markers and error bars, by label
    against              estimates against exact values, with the line of equality
    labelled_scatter     points with a label each; the labels never overlap

Every function draws on ``ax``, or on a new figure if ``ax`` is None, and returns the figure, for example
``plots.paths(times, states).savefig("paths.png")``. Matplotlib is an extra, ``pip install 'jflow[plots]'``, imported at the
first call. Figures are made without ``pyplot``, so there is no global state, no backend to choose and no figure to close, and
threads and servers can draw. A notebook shows the returned figure after ``%matplotlib inline``.
"""

from jflow.plots.axes import panels
from jflow.plots.grids import image_grid, residuals
from jflow.plots.labels import labelled_scatter
from jflow.plots.lines import against, curves, learning_curve
from jflow.plots.plane import density_and_samples, paths, samples_in_plane

__all__ = [
    "against",
    "curves",
    "density_and_samples",
    "image_grid",
    "labelled_scatter",
    "learning_curve",
    "panels",
    "paths",
    "residuals",
    "samples_in_plane",
]
