"""Figures and axes, made without ``pyplot``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jflow import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

Extent = tuple[float, float, float, float]


def panels(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (4.8, 3.8), **subplots: Any
) -> tuple[Figure, np.ndarray]:
    """Makes a new figure with a grid of axes, whose layout leaves room for titles, labels and colour bars.

    Args:
      rows: the number of rows.
      columns: the number of columns.
      size: the width and height of one panel, in inches.
      **subplots: options of ``matplotlib.figure.Figure.subplots``, such as ``sharex=True``.

    Returns:
      The figure, and its axes as an array [rows, columns].

    Raises:
      ImportError: if Matplotlib is not installed.
      ValueError: if a number is not positive.
      TypeError: if ``rows`` or ``columns`` is not a whole number, or ``size`` does not consist of numbers.

    Example:
      >>> import numpy as np
      >>> from jflow import plots
      >>> figure, axes = plots.panels(1, 2)
      >>> axes.shape
      (1, 2)
    """
    make = figure_class()
    checks.integer("rows", rows, low=1)
    checks.integer("columns", columns, low=1)
    width, height = (checks.number("size", side, low=0.0, open_low=True) for side in size)
    figure = make(figsize=(columns * width, rows * height), layout="compressed")
    return figure, figure.subplots(rows, columns, squeeze=False, **subplots)


def figure_class() -> type[Figure]:
    """The class matplotlib.figure.Figure.

    Raises:
      ImportError: if Matplotlib is not installed; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots: expected Matplotlib, which is not installed: pip install 'jflow[plots]'") from error
    return Figure


def axis_or_new(ax: Axes | None, size: tuple[float, float] = (4.8, 3.8)) -> Axes:
    """The given axis, or the axis of a new figure of this size in inches.

    Raises:
      ImportError: if Matplotlib is not installed.
      TypeError: if ``ax`` is not an axis of Matplotlib.
    """
    figure_class()
    from matplotlib.axes import Axes

    if ax is None:
        return panels(size=size)[1][0, 0]
    if not isinstance(ax, Axes):
        raise TypeError(f"ax: expected an axis of Matplotlib (matplotlib.axes.Axes), got {type(ax).__name__}")
    return ax


def figure_of(ax: Axes) -> Figure:
    """The whole figure that an axis is part of."""
    # ax.figure may be a sub-figure.
    return ax.figure.figure  # pyright: ignore[reportReturnType]


def colour_bar(ax: Axes, colours: ScalarMappable, label: str) -> None:
    """Adds a colour bar to the right of the axis, with the height of the axis."""
    ax.figure.colorbar(colours, cax=ax.inset_axes((1.03, 0.0, 0.045, 1.0)), label=label)


def label_plane(ax: Axes) -> None:
    """Labels the axes of a plane with the entries of a point, and gives both the same scale."""
    ax.set(xlabel="x[0]", ylabel="x[1]", aspect="equal")


def points_in_plane(name: str, samples: ArrayLike) -> np.ndarray:
    """Samples [N, 2] as a numpy array; N may be 0.

    Raises:
      ValueError: if the shape is not [N, 2].
    """
    checks.shape(name, samples, (None, 2))
    return np.asarray(samples)


def extent_of(extent: Sequence[float] | None, points: np.ndarray) -> Extent:
    """The given rectangle (left, right, bottom, top), or that of all finite points with a margin of 5 %.

    Raises:
      ValueError: if ``extent`` is not four finite numbers in ascending pairs, or it is None and no point is finite.
    """
    if extent is None:
        finite = points[np.isfinite(points).all(axis=1)]
        if not len(finite):
            raise ValueError(
                "extent: expected (left, right, bottom, top), since there is no finite sample to take it from"
            )
        (left, bottom), (right, top) = finite.min(axis=0).tolist(), finite.max(axis=0).tolist()
        margin = 0.05 * max(right - left, top - bottom) or 0.5
        return left - margin, right + margin, bottom - margin, top + margin
    sides = np.asarray(extent, np.float64)
    if sides.shape != (4,) or not np.isfinite(sides).all() or sides[0] >= sides[1] or sides[2] >= sides[3]:
        raise ValueError(
            f"extent: expected (left, right, bottom, top) with left < right and bottom < top, got {extent}"
        )
    left, right, bottom, top = sides.tolist()
    return left, right, bottom, top
