"""Plots of samples, densities and paths in the plane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jflow import checks, trees
from jflow.plots.axes import axis_or_new, colour_bar, extent_of, figure_of, label_plane, points_in_plane
from jflow.types import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def samples_in_plane(
    samples: ArrayLike,
    *,
    extent: Sequence[float] | None = None,
    bins: int = 120,
    vmin: float | None = None,
    vmax: float | None = None,
    cmap: str = "magma",
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """Plots a histogram of samples in the plane as a density: the fraction of samples in a bin, divided by its area.

    Args:
      samples: [N, 2].
      extent: the shown rectangle (left, right, bottom, top); by default that of all samples. Samples outside are counted in
        the total.
      bins: the number of bins along each side.
      vmin, vmax: the densities of the first and last colour; by default 0 and the largest density.
      cmap: the colour map.
      colorbar: whether to draw a colour bar.
      ax: the axis to draw on; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: if the samples do not have shape [N, 2], the extent is invalid, or ``bins`` is below 1.
      TypeError: if ``bins`` is not a whole number.

    Example:
      >>> import numpy as np
      >>> from jflow import plots
      >>> figure = plots.samples_in_plane(np.zeros((10, 2)), extent=(-1, 1, -1, 1), colorbar=False)
      >>> len(figure.axes)
      1
    """
    points = points_in_plane("samples", samples)
    checks.integer("bins", bins, low=1)
    box = extent_of(extent, points)
    ax = axis_or_new(ax)
    counts, x, y = np.histogram2d(points[:, 0], points[:, 1], bins, [box[:2], box[2:]])
    density = counts / (max(len(points), 1) * (x[1] - x[0]) * (y[1] - y[0]))
    vmin = 0.0 if vmin is None else vmin
    image = ax.imshow(density.T, origin="lower", extent=box, cmap=cmap, vmin=vmin, vmax=vmax, interpolation="nearest")
    label_plane(ax)
    if colorbar:
        colour_bar(ax, image, "density of the samples")
    return figure_of(ax)


def density_and_samples(
    log_density: Callable[[Array], Array],
    samples: ArrayLike,
    *,
    extent: Sequence[float] | None = None,
    resolution: int = 200,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """Plots a density in the plane as colours, with samples as points on top.

    Args:
      log_density: ``x [2] -> ()``, in nats; -inf is a density of zero.
      samples: [N, 2], floating point; the density is computed in their dtype, or in float32 if that is wider. N may be 0 if
        ``extent`` is given.
      extent: the shown rectangle (left, right, bottom, top); by default that of all samples.
      resolution: the number of points along each side at which the density is computed.
      colorbar: whether to draw a colour bar.
      ax: the axis to draw on; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: if the samples do not have shape [N, 2], the extent is invalid, the log-density is not a scalar, or
        ``resolution`` is below 2.
      TypeError: if ``log_density`` is not a function, the samples are not floating point, or ``resolution`` is not a whole
        number.
    """
    checks.function("log_density", log_density, "x -> log rho(x)")
    checks.floating("samples", samples)
    points = points_in_plane("samples", samples)
    checks.integer("resolution", resolution, low=2)
    left, right, bottom, top = box = extent_of(extent, points)
    ax = axis_or_new(ax)
    # The centres of cells that fill the extent.
    x, y = (
        low + (np.arange(resolution) + 0.5) * (high - low) / resolution for low, high in ((left, right), (bottom, top))
    )
    centres = jnp.asarray(np.stack(np.meshgrid(x, y), axis=-1), trees.at_least_float32(samples))
    values = jax.vmap(log_density)(centres.reshape(-1, 2))
    checks.shape("log_density(x) for a batch of x", values, (resolution**2,))
    density = np.exp(np.asarray(values, np.float64)).reshape(resolution, resolution)
    image = ax.imshow(density, origin="lower", extent=box, cmap="Blues", vmin=0.0, interpolation="bilinear")
    ax.plot(points[:, 0], points[:, 1], ".", color="C3", markersize=3, alpha=0.6)
    ax.set(xlim=(left, right), ylim=(bottom, top))
    label_plane(ax)
    if colorbar:
        colour_bar(ax, image, "density")
    return figure_of(ax)


def paths(
    times: ArrayLike, states: ArrayLike, *, cmap: str = "viridis", colorbar: bool = True, ax: Axes | None = None
) -> Figure:
    """Plots samples through time: lines against t in one dimension, and lines coloured by t in the plane.

    In the plane a dot marks the first state and a square the last.

    Args:
      times: [T], at least two.
      states: [N, T], [N, T, 1] or [N, T, 2]: N samples at these times, for example from ``jax.vmap`` of
        ``solvers.trajectory`` or of ``samplers.run_path``.
      cmap: the colour map of t, for states in the plane.
      colorbar: whether to draw the colour bar of t.
      ax: the axis to draw on; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: if the states or times have other shapes.
    """
    values, t = np.asarray(states), np.asarray(times)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[-1] not in (1, 2):
        raise ValueError(f"states: expected [N, T], [N, T, 1] or [N, T, 2], got {np.shape(states)}")
    if t.ndim != 1 or t.size < 2 or t.size != values.shape[1]:
        raise ValueError(f"times: expected two or more, one for each of the {values.shape[1]} states, got {t.shape}")
    ax = axis_or_new(ax)
    if values.shape[-1] == 1:
        ax.plot(t, values[..., 0].T, color="C0", linewidth=0.8, alpha=0.6)
        ax.set(xlabel="time t", ylabel="state x")
        return figure_of(ax)
    from matplotlib.collections import LineCollection

    segments = np.stack([values[:, :-1], values[:, 1:]], axis=2).reshape(-1, 2, 2)
    lines = LineCollection(list(segments), cmap=cmap, linewidths=0.9, alpha=0.8)
    lines.set_array(np.tile(0.5 * (t[:-1] + t[1:]), len(values)))
    lines.set_clim(float(t.min()), float(t.max()))
    ax.add_collection(lines)
    for index, marker in ((0, "o"), (-1, "s")):
        ends = ax.scatter(
            values[:, index, 0],
            values[:, index, 1],
            s=10,
            marker=marker,
            zorder=3,
            cmap=cmap,
            c=np.full(len(values), t[index]),
        )
        ends.set_clim(lines.get_clim())
    label_plane(ax)
    if colorbar:
        colour_bar(ax, lines, "time t")
    return figure_of(ax)
