"""Points with labels that never overlap."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jflow import checks
from jflow.plots.axes import axis_or_new, figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

MARKER = 6.0
MARKERS = "osD^vP*X"
# Points of free room around a label.
ROOM = 1.5
# What a place costs, in half heights of a label, by which rings are apart: the label on a marker, a bar, the legend or a line;
# its own line across a label, a marker, another line.
COVERS, CROSSES = 60.0, (30.0, 20.0, 10.0)
# Directions in which room is looked for, in degrees: beside the point first, right before left, above before below.
DIRECTIONS = sorted(range(-165, 181, 15), key=lambda a: (min(abs(a), 180 - abs(a)), abs(a) > 90, a < 0))


def labelled_scatter(
    x: ArrayLike,
    y: ArrayLike,
    labels: Sequence[str],
    *,
    yerr: ArrayLike | None = None,
    groups: Sequence[str] | None = None,
    fontsize: float = 7.0,
    ax: Axes | None = None,
) -> Figure:
    """Points with a label each. A label lies where no other label is, and is joined to its point by a line if it is far.

    The labels are placed whenever the figure is drawn, so scales, limits and sizes may be set after the call. They also avoid
    the markers, the error bars, the legend and the edges of the axis while there is room. The placement is deterministic.

    Args:
      x: [N], finite.
      y: [N], finite.
      labels: one for each point. A point outside the axis has no label.
      yerr: [N], halves of the error bars.
      groups: the group of each point: a marker, a colour and an entry of the legend each.
      fontsize: size of the labels, in points.
      ax: the axis to draw on; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: for other lengths, or coordinates that are not finite.
    """
    points = np.stack([_column("x", x, len(labels)), _column("y", y, len(labels))], axis=-1)
    bars = np.zeros(len(labels)) if yerr is None else _column("yerr", yerr, len(labels))
    if groups is not None and len(groups) != len(labels):
        raise ValueError(f"groups: expected one for each of the {len(labels)} points, got {len(groups)}")
    ax = axis_or_new(ax, (8.0, 5.5))
    member = np.array([""] * len(labels) if groups is None else list(groups))
    for index, group in enumerate(dict.fromkeys(member.tolist())):
        (mine,) = np.nonzero(member == group)
        ax.errorbar(
            points[mine, 0],
            points[mine, 1],
            None if yerr is None else bars[mine],
            fmt=MARKERS[index % len(MARKERS)],
            color=f"C{index}",
            markersize=MARKER,
            capsize=2,
            elinewidth=1.0,
            label=group or None,
        )
    if groups is not None:
        ax.legend()
    texts = [
        ax.annotate(
            str(label),
            point,
            (0.0, 0.0),
            textcoords="offset points",
            fontsize=fontsize,
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "grey", "shrinkA": 0.0, "shrinkB": 0.5 * MARKER},
        )
        for label, point in zip(labels, points, strict=True)
    ]
    ax.add_artist(_placer(ax, texts, points, bars))
    return figure_of(ax)


def _column(name: str, values: ArrayLike, count: int) -> np.ndarray:
    column = np.asarray(values, np.float64)
    checks.shape(name, column, (count,))
    if not np.isfinite(column).all():
        raise ValueError(f"{name}: expected finite values, got {column}")
    return column


def _placer(ax: Axes, texts: Sequence[Annotation], points: np.ndarray, bars: np.ndarray) -> Any:
    """An artist that draws nothing and places the labels before they are drawn."""
    from matplotlib.artist import Artist

    class Placer(Artist):
        def draw(self, renderer: Any) -> None:
            _place(ax, renderer, texts, points, bars)

    placer = Placer()
    # Before everything else of the axis, and without an effect on its size.
    placer.set_zorder(-np.inf)
    for artist in (placer, *texts):
        artist.set_in_layout(False)
    return placer


class Boxes(NamedTuple):
    """Rectangles (left, bottom, right, top) that labels keep away from, in pixels; each ``[n, 4]``.

    Attributes:
      markers: around the points.
      others: the error bars and the legend.
      labels: the labels that have their places.
      lines: small ones along the lines from labels to points.
    """

    markers: np.ndarray
    others: np.ndarray
    labels: np.ndarray
    lines: np.ndarray


def _place(ax: Axes, renderer: Any, texts: Sequence[Annotation], points: np.ndarray, bars: np.ndarray) -> None:
    """Moves every label to the nearest place that is free."""
    pixels = renderer.points_to_pixels(1.0)
    low, centres, high = (ax.transData.transform(points + np.outer(bars, [0.0, side])) for side in (-1.0, 0.0, 1.0))
    reach = 0.5 * MARKER * pixels
    others = np.concatenate([low - 0.5 * pixels, high + 0.5 * pixels], axis=-1)[bars > 0]
    if (legend := ax.get_legend()) is not None:
        others = np.concatenate([others, [legend.get_window_extent(renderer).extents]])
    frame = np.array(ax.get_window_extent(renderer).extents)
    markers = np.concatenate([centres - reach, centres + reach], axis=-1)
    shown = _inside(np.concatenate([centres, centres], axis=-1), frame)
    boxes = Boxes(markers[shown], others, np.zeros((0, 4)), np.zeros((0, 4)))
    # From above down, so that the order of the rows does not matter.
    for index in np.lexsort((centres[:, 0], -centres[:, 1])):
        text, point = texts[index], centres[index]
        if text.get_visible() != shown[index]:
            text.set_visible(bool(shown[index]))
        if not shown[index]:
            continue
        size = 0.5 * np.array(_size(text, renderer)) + ROOM * pixels
        centre, far = _free(point, size, reach, frame, boxes)
        box = np.concatenate([centre - size, centre + size])
        line = _along(point, box, reach) if far else np.zeros((0, 4))
        boxes = boxes._replace(
            labels=np.concatenate([boxes.labels, box[None]]), lines=np.concatenate([boxes.lines, line])
        )
        # A change asks for another drawing, which must change nothing.
        offset = tuple(((centre - point) / pixels).tolist())
        if text.get_position() != offset:
            text.set_position(offset)
        if text.arrow_patch is not None and text.arrow_patch.get_visible() != far:
            text.arrow_patch.set_visible(far)


def _size(text: Annotation, renderer: Any) -> tuple[float, float]:
    """Width and height of the label without its line, in pixels."""
    from matplotlib.text import Text

    box = Text.get_window_extent(text, renderer)
    return box.width, box.height


def _free(
    point: np.ndarray, size: np.ndarray, reach: float, frame: np.ndarray, boxes: Boxes
) -> tuple[np.ndarray, bool]:
    """The best place of a label of this half size that no other label covers, and whether it needs a line to its point.

    A place costs the number of its ring, and what it covers; rings are tried until they cost more than the best place.
    """
    things = np.concatenate([boxes.markers, boxes.others, boxes.lines])
    outside = np.hypot(*(frame[2:] - frame[:2])) / size[1]
    best, least, far = point, np.inf, False
    for ring in itertools.count():
        if ring >= least:
            return best, far
        centres = _ring(point, size, reach + 0.5 * ring * size[1])
        places = np.concatenate([centres - size, centres + size], axis=-1)
        costs = ring + COVERS * _overlap(places, things) + outside * ~_inside(places, frame)
        costs[_overlap(places, boxes.labels)] = np.inf
        for index in np.argsort(costs, kind="stable"):
            cost = float(costs[index])
            if cost < least and ring > 1:
                line = _along(point, places[index], reach)
                crossed = (_overlap(line, each).any() for each in (boxes.labels, boxes.markers, boxes.lines))
                cost += sum(CROSSES[i] for i, each in enumerate(crossed) if each)
            if cost < least:
                best, least, far = centres[index], cost, ring > 1
    raise AssertionError("the rings have no end")


def _ring(point: np.ndarray, size: np.ndarray, away: float) -> np.ndarray:
    """Centres of the label around the point: its nearest side or corner lies on a square, as the marker is one."""
    angles = np.deg2rad(DIRECTIONS)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    directions /= np.abs(directions).max(axis=1, keepdims=True)
    return point + directions * away + size * np.clip(1.5 * directions, -1.0, 1.0)


def _along(point: np.ndarray, box: np.ndarray, reach: float) -> np.ndarray:
    """Small boxes along the line from a point to a label, between the marker and the label."""
    way = np.clip(point, box[:2], box[2:]) - point
    length = float(np.hypot(*way))
    shares = np.arange(2.0 * reach, length, 2.0) / max(length, 1.0)
    dots = point + shares[:, None] * way
    return np.concatenate([dots - 0.5, dots + 0.5], axis=-1)


def _inside(boxes: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Which boxes lie within the frame, ``[n]``."""
    return np.all(boxes[:, :2] >= frame[:2], axis=1) & np.all(boxes[:, 2:] <= frame[2:], axis=1)


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of the boxes share area with one of the others, ``[n]``."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    return np.any(np.all(low < np.minimum(boxes[:, None, 2:], others[None, :, 2:]), axis=-1), axis=1)
