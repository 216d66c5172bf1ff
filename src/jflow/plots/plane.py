"""Samples, densities and paths in the plane."""

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
    """A histogram of samples in the plane, as a density: the share of all samples in a bin over the area of the bin.

    Args:
      samples: [N, 2].
      extent: (left, right, bottom, top) of what is shown; by default all samples. Samples outside count in the total.
      bins: number of bins along each side.
      vmin, vmax: densities of the first and last colour; by default 0 and the largest density.
      cmap: the colour map.
      colorbar: whether to draw a colour bar.
      ax: the axis to draw on; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: for another shape of samples, or a bad extent.

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
    """A density in the plane as colours, with samples as points on it.

    Args:
      log_density: ``x [2] -> ()``, in nats; -inf is a density of zero.
      samples: [N, 2], floating point; the density is computed in their dtype. N may be 0 if ``extent`` is given.
      extent: (left, right, bottom, top) of what is shown; by default all samples.
      resolution: number of points along each side where the density is computed.
      colorbar: whether to draw a colour bar.
      ax: the axis to draw on; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: for another shape of samples, a bad extent, or a log-density that is not one number.
      TypeError: if log_density is not a function, or samples are not floating point.
    """
    checks.function("log_density", log_density, "x -> log rho(x)")
    checks.floating("samples", samples)
    points = points_in_plane("samples", samples)
    checks.integer("resolution", resolution, low=2)
    left, right, bottom, top = box = extent_of(extent, points)
    ax = axis_or_new(ax)
    # The centres of the cells, whose outer edges are those of the extent.
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
    """Samples through time: lines against t for states of one number, lines in the plane coloured by t for states of two.

    In the plane a dot marks the first state and a square the last.

    Args:
      times: [T], at least two.
      states: [N, T], [N, T, 1] or [N, T, 2]: N samples at these times, such as the result of ``jax.vmap`` over
        ``solvers.trajectory``, or the states of one over ``samplers.run_path``.
      cmap: the colour map of t, for states in the plane.
      colorbar: whether to draw its colour bar.
      ax: the axis to draw on; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: for other shapes.
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
