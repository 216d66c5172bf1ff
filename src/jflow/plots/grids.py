"""Grids of images, and plots of residuals over pairs of times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from jflow import checks
from jflow.diagnostics import IDENTITIES, ResidualGrid
from jflow.plots.axes import axis_or_new, colour_bar, figure_of, panels
from jflow.training import image_grids

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The height of the band for a label, relative to the height of an image.
BAND = 0.25


def image_grid(
    images: ArrayLike,
    *,
    columns: int | None = None,
    labels: Sequence[object] | None = None,
    vmin: float = -1.0,
    vmax: float = 1.0,
    gap: int = 1,
    ax: Axes | None = None,
) -> Figure:
    """Draws images in a grid, row by row, each with a label above it.

    Args:
      images: [N, H, W, C] with C = 1 (grey) or 3 (red, green, blue), or [N, H, W], floating point.
      columns: images per row; by default the square root of N, rounded up.
      labels: one label for each image; a label that is wider than its image is drawn smaller.
      vmin, vmax: the values shown as black and as white (as no and as full colour); vmin > vmax shows the negative.
      gap: pixels between images.
      ax: the axis to draw on; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: if the shape is another, a value is not finite, vmin = vmax, or there is not one label for each image.
      TypeError: if the images are not floating point.

    Example:
      >>> import numpy as np
      >>> from jflow import plots
      >>> figure = plots.image_grid(np.zeros((4, 8, 8)), columns=2)
      >>> len(figure.axes)
      1
    """
    checks.floating("images", images)
    pixels = np.asarray(images, np.float64)
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    low, high = checks.number("vmin", vmin), checks.number("vmax", vmax)
    if low == high:
        raise ValueError(f"vmin, vmax: expected two different numbers, got {vmin} twice")
    checks.shape("images", pixels, (None, None, None, None))
    scaled = (2.0 * pixels - low - high) / (high - low)
    count, height, width, _ = pixels.shape
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels: expected one for each of the {count} images, got {len(labels)}")
    # A white band above each image.
    band = 0 if labels is None else int(np.ceil(BAND * height))
    canvas = image_grids.tile(np.pad(scaled, ((0, 0), (band, 0), (0, 0), (0, 0)), constant_values=1.0), columns, gap)
    rows, across = (
        -(-length // side) for length, side in zip(canvas.shape, (height + band + gap, width + gap), strict=False)
    )
    inch = min(0.8, 9.0 / max(rows, across))
    ax = axis_or_new(ax, (inch * across, inch * rows * (height + band) / width))
    ax.imshow(canvas, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    for index, label in enumerate(labels or ()):
        row, column = divmod(index, across)
        # Pixels are centred at integer coordinates.
        left, top = column * (width + gap) - 0.5, row * (height + band + gap) - 0.5
        _write(ax, str(label), left, top, width, band)
    return figure_of(ax)


def _write(ax: Axes, text: str, left: float, top: float, width: float, height: float) -> None:
    """Draws text as an outline inside a rectangle in data coordinates, so that it scales with the image."""
    from matplotlib.patches import PathPatch
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    if not text.strip():
        return
    path = TextPath((0.0, 0.0), text, size=1.0)
    box = path.get_extents()
    # Use the same line height for all labels, also for those without descenders.
    scale = min(0.75 * height, 0.96 * width / box.width)
    place = Affine2D().translate(-0.5 * (box.x0 + box.x1), -0.3).scale(scale, -scale)
    place = place.translate(left + 0.5 * width, top + 0.5 * height)
    ax.add_patch(PathPatch(place.transform_path(path), facecolor="black", linewidth=0.0))


def residuals(
    grid: ResidualGrid,
    names: str | Sequence[str] | None = None,
    *,
    vmin: float | None = None,
    vmax: float | None = None,
    cmap: str = "viridis",
    ax: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Plots root-mean-square (RMS) residuals over the source time s and the target time t.

    All panels share a logarithmic colour scale. Pairs of times at which a residual is not defined are grey. The tangent
    residual is a line over s.

    Args:
      grid: the result of ``diagnostics.residual_grid``.
      names: one or several of "tangent", "eulerian", "lagrangian", "semigroup"; by default all that have a finite value.
      vmin, vmax: the residuals of the first and last colour; by default the smallest positive and the largest residual.
      cmap: the colour map.
      ax: the axis to draw on, or one for each name; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: if a name is unknown, no residual is finite, or there is not one axis for each name.
    """
    if names is None:
        names = [name for name in IDENTITIES if np.isfinite(getattr(grid, name)).any()]
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        checks.choice("names", name, IDENTITIES)
    maps = [name for name in names if name != "tangent"]
    values = np.concatenate([np.ravel(getattr(grid, name)) for name in names]) if names else np.zeros(0)
    if not np.isfinite(values).any():
        raise ValueError(f"grid: expected a finite residual of {', '.join(names or IDENTITIES)}, got NaN alone")
    if ax is None:
        axes: Sequence[Axes] = list(panels(1, len(names), size=(4.2, 3.6))[1][0])
    else:
        axes = [axis_or_new(each) for each in (ax if isinstance(ax, (Sequence, np.ndarray)) else [ax])]
    if len(axes) != len(names):
        raise ValueError(f"ax: expected one axis for each of {', '.join(names)}, got {len(axes)}")
    from matplotlib.colors import LogNorm

    colours = np.concatenate([np.ravel(getattr(grid, name)) for name in maps]) if maps else values
    positive = colours[np.isfinite(colours) & (colours > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    norm = LogNorm(low if vmin is None else vmin, high if vmax is None else vmax, clip=True)
    for name, axis in zip(names, axes, strict=True):
        axis.set(title=name, xlabel="source time s")
        if name == "tangent":
            axis.plot(grid.s, grid.tangent, "o-")
            axis.set(ylabel="RMS residual, in units of a velocity")
            continue
        # A residual of zero has no logarithm, so it gets the first colour; only undefined residuals are grey.
        shown = np.maximum(getattr(grid, name), norm.vmin or 0.0)
        s, t = np.argsort(grid.s), np.argsort(grid.t)
        image = axis.pcolormesh(_edges(grid.s[s]), _edges(grid.t[t]), shown[np.ix_(s, t)].T, norm=norm, cmap=cmap)
        axis.set(ylabel="target time t", facecolor="lightgrey", aspect="equal")
        if name == maps[-1]:
            colour_bar(axis, image, "RMS residual, in units of a velocity")
    return figure_of(axes[0])


def _edges(centres: np.ndarray) -> np.ndarray:
    """The edges of the cells around these points: the midpoints between them, and mirrored ones at both ends."""
    if centres.size == 1:
        return centres + np.array([-0.05, 0.05])
    middles = 0.5 * (centres[1:] + centres[:-1])
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])
