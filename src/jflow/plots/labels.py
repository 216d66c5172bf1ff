"""Scatter plots whose labels do not overlap."""

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
# The free space around a label, in points.
ROOM = 1.5
# The cost of a position in units of the distance between rings, which is half the height of a label. COVERS: the label covers a
# marker, an error bar, the legend or a line. CROSSES: the line of the label crosses a label, a marker or another line.
COVERS, CROSSES = 60.0, (30.0, 20.0, 10.0)
# The directions to try, in degrees: sideways first, right before left, above before below.
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
    """Draws points with labels that do not overlap. A label that is far from its point is connected to it by a line.

    The labels are placed whenever the figure is drawn, so scales, limits and sizes may be set after the call. If there is
    space, they also avoid the markers, the error bars, the legend and the edges of the axis. The placement is deterministic.

    Args:
      x: [N], finite.
      y: [N], finite.
      labels: one label for each point. Points outside the axis are not labelled.
      yerr: the half-lengths of the error bars, [N].
      groups: the group of each point. Each group has a marker, a colour and an entry in the legend above the axis.
      fontsize: the size of the labels, in points.
      ax: the axis to draw on; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: if the lengths differ, or a coordinate is not finite.
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
    if groups is not None and len(groups):
        # Put the legend above the axis, where nothing else is drawn.
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(set(groups)), frameon=False)
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
    # Draw it before everything else in the axis, and exclude it from the layout.
    placer.set_zorder(-np.inf)
    for artist in (placer, *texts):
        artist.set_in_layout(False)
    return placer


class Boxes(NamedTuple):
    """Objects that labels avoid, in pixels: rectangles (left, bottom, right, top), and lines; each ``[n, 4]``.

    Attributes:
      markers: the rectangles of the markers.
      others: the rectangles of the error bars and the legend.
      labels: the rectangles of the labels placed so far.
      lines: the lines from points to labels, as (x, y, x, y) of both ends.
    """

    markers: np.ndarray
    others: np.ndarray
    labels: np.ndarray
    lines: np.ndarray


def _place(ax: Axes, renderer: Any, texts: Sequence[Annotation], points: np.ndarray, bars: np.ndarray) -> None:
    """Moves every label to the position of lowest cost."""
    pixels = renderer.points_to_pixels(1.0)
    low, centres, high = (ax.transData.transform(points + np.outer(bars, [0.0, side])) for side in (-1.0, 0.0, 1.0))
    reach = 0.5 * MARKER * pixels
    # An axis may be inverted.
    low, high = np.minimum(low, high), np.maximum(low, high)
    others = np.concatenate([low - 0.5 * pixels, high + 0.5 * pixels], axis=-1)[bars > 0]
    if (legend := ax.get_legend()) is not None:
        others = np.concatenate([others, [legend.get_window_extent(renderer).extents]])
    frame = np.array(ax.get_window_extent(renderer).extents)
    markers = np.concatenate([centres - reach, centres + reach], axis=-1)
    shown = _inside(np.concatenate([centres, centres], axis=-1), frame)
    boxes = Boxes(markers[shown], others, np.zeros((0, 4)), np.zeros((0, 4)))
    # Go from top to bottom, so that the order of the points matters only for equal points.
    for index in np.lexsort((centres[:, 0], -centres[:, 1])):
        text, point = texts[index], centres[index]
        if text.get_visible() != shown[index]:
            text.set_visible(bool(shown[index]))
        if not shown[index]:
            continue
        size = 0.5 * np.array(_size(text, renderer)) + ROOM * pixels
        centre, far = _free(point, size, reach, frame, boxes)
        box = np.concatenate([centre - size, centre + size])
        line = _line(point, box[None], reach)[: int(far)]
        boxes = boxes._replace(
            labels=np.concatenate([boxes.labels, box[None]]), lines=np.concatenate([boxes.lines, line])
        )
        # A change triggers another draw, which must not change anything; round, since the layout differs by rounding errors.
        offset = tuple(np.round((centre - point) / pixels, 2).tolist())
        if text.get_position() != offset:
            text.set_position(offset)
        if text.arrow_patch is not None and text.arrow_patch.get_visible() != far:
            text.arrow_patch.set_visible(far)


def _size(text: Annotation, renderer: Any) -> tuple[float, float]:
    """The width and height of the label without its line, in pixels."""
    from matplotlib.text import Text

    box = Text.get_window_extent(text, renderer)
    return box.width, box.height


def _free(
    point: np.ndarray, size: np.ndarray, reach: float, frame: np.ndarray, boxes: Boxes
) -> tuple[np.ndarray, bool]:
    """The position of lowest cost for a label of this half size, and whether it needs a line to its point.

    The cost is the number of the ring plus the costs of what the label covers. A position that overlaps another label is not
    allowed. Rings are tried until their number exceeds the lowest cost.
    """
    things = np.concatenate([boxes.markers, boxes.others])
    outside = np.hypot(*(frame[2:] - frame[:2])) / size[1]
    best, least, far = point, np.inf, False
    for ring in itertools.count():
        if ring >= least:
            break
        centres = _ring(point, size, reach + 0.5 * ring * size[1])
        places = np.concatenate([centres - size, centres + size], axis=-1)
        costs = ring + COVERS * (_overlap(places, things) | _through(boxes.lines, places).any(axis=0))
        costs += outside * ~_inside(places, frame)
        if ring > 1:
            lines = _line(point, places, reach)
            crossed = (_through(lines, boxes.labels), _through(lines, boxes.markers), _crossing(lines, boxes.lines))
            costs += sum(price * each.any(axis=1) for price, each in zip(CROSSES, crossed, strict=True))
        costs[_overlap(places, boxes.labels)] = np.inf
        index = int(np.argmin(costs))
        if costs[index] < least:
            best, least, far = centres[index], costs[index], ring > 1
    return best, far


def _ring(point: np.ndarray, size: np.ndarray, away: float) -> np.ndarray:
    """Centres of the label around the point, such that its nearest side or corner is on a square around the marker."""
    angles = np.deg2rad(DIRECTIONS)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    directions /= np.abs(directions).max(axis=1, keepdims=True)
    return point + directions * away + size * np.clip(1.5 * directions, -1.0, 1.0)


def _line(point: np.ndarray, places: np.ndarray, reach: float) -> np.ndarray:
    """The lines from the edge of a marker to the nearest points of labels, as (x, y, x, y) of both ends; ``[n, 4]``."""
    ends = np.clip(point, places[:, :2], places[:, 2:])
    lengths = np.hypot(*(ends - point).T)[:, None]
    starts = point + (ends - point) * np.minimum(1.0, 2.0 * reach / np.maximum(lengths, 1e-9))
    return np.concatenate([starts, ends], axis=-1)


def _through(lines: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Which lines pass through which boxes, ``[lines, boxes]``."""
    starts, ways = lines[:, None, :2], (lines[:, 2:] - lines[:, :2])[:, None]
    # The fractions of the line at which it enters and leaves the slab of each coordinate.
    ways = np.where(np.abs(ways) < 1e-9, 1e-9, ways)
    low, high = (boxes[None, :, :2] - starts) / ways, (boxes[None, :, 2:] - starts) / ways
    enters, leaves = np.minimum(low, high).max(axis=-1), np.maximum(low, high).min(axis=-1)
    return np.maximum(enters, 0.0) < np.minimum(leaves, 1.0)


def _crossing(lines: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which lines cross which others, ``[lines, others]``; each line has its ends on both sides of the other."""

    def side(points: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        way, to = b - a, points - a
        return np.sign(way[..., 0] * to[..., 1] - way[..., 1] * to[..., 0])

    a, b, c, d = lines[:, None, :2], lines[:, None, 2:], others[None, :, :2], others[None, :, 2:]
    return (side(c, a, b) * side(d, a, b) < 0) & (side(a, c, d) * side(b, c, d) < 0)


def _inside(boxes: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Which boxes lie within the frame, ``[n]``."""
    return np.all(boxes[:, :2] >= frame[:2], axis=1) & np.all(boxes[:, 2:] <= frame[2:], axis=1)


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of the boxes overlap one of the others, ``[n]``."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    return np.any(np.all(low < np.minimum(boxes[:, None, 2:], others[None, :, 2:]), axis=-1), axis=1)
