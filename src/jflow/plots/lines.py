"""Line plots: learning curves, curves with error bars, and estimates against exact values."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jflow import checks
from jflow.plots.axes import axis_or_new, figure_of
from jflow.training import metrics_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def learning_curve(
    source: str | os.PathLike[str] | Iterable[Row],
    names: str | Sequence[str] = ("loss",),
    *,
    smooth: int = 1,
    yscale: str = "linear",
    ax: Axes | None = None,
) -> Figure:
    """Plots metrics against the step. A value that was not finite (null in the file) leaves a gap.

    Args:
      source: a file ``metrics.jsonl``, the directory of a run that holds one, or its rows.
      names: the metrics. Values from training and from evaluation are separate lines.
      smooth: the number of training rows in a centred running mean. With more than one, the values themselves are drawn
        faintly as well. Values of evaluations are not smoothed, and are drawn with markers.
      yscale: the scale of the vertical axis, "linear" or "log".
      ax: the axis to draw on; None for a new figure.

    Returns:
      The figure.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if no row holds a name, a metric is not a number, or ``smooth`` is below 1.
      TypeError: if ``smooth`` is not a whole number.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    checks.integer("smooth", smooth, low=1)
    if isinstance(source, (str, os.PathLike)):
        path = pathlib.Path(source)
        source = metrics_log.read(path / "metrics.jsonl" if path.is_dir() else path)
    rows = list(source)
    lines = {label: line for name in names for label, line in _lines_of(rows, name).items()}
    ax = axis_or_new(ax)
    for index, (label, (kind, steps, values)) in enumerate(lines.items()):
        trained, colour = kind == "train", f"C{index}"
        if trained and smooth > 1:
            ax.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        shown = _running_mean(values, smooth) if trained else values
        ax.plot(steps, shown, "-" if trained else ".-", color=colour, label=label)
    ax.set(xlabel="step", yscale=yscale, ylabel=next(iter(lines)) if len(lines) == 1 else "")
    if len(lines) > 1:
        ax.legend()
    return figure_of(ax)


def _lines_of(rows: Sequence[Row], name: str) -> dict[str, tuple[str, np.ndarray, np.ndarray]]:
    """The lines of a metric by label, one for each kind of row, as (kind, steps, values)."""
    holders = [row for row in rows if name in row]
    if not holders:
        known = sorted({key for row in rows for key in row} - {"kind", "step"})
        raise ValueError(f"names: expected metrics of the rows, {', '.join(known)}, got {name!r}")
    kinds = dict.fromkeys(row.get("kind", "train") for row in holders)
    lines = {}
    for kind in kinds:
        mine = [row for row in holders if row.get("kind", "train") == kind]
        for row in mine:
            if row[name] is not None and (np.ndim(row[name]) or not isinstance(row[name], (int, float, np.number))):
                raise ValueError(
                    f"names: expected metrics that are numbers; {name!r} of step {row['step']} is {row[name]!r}"
                )
        values = np.array([np.nan if row[name] is None else row[name] for row in mine], np.float64)
        steps = np.array([row["step"] for row in mine])
        lines[name if len(kinds) == 1 else f"{name}, {kind}"] = kind, steps, values
    return lines


def _running_mean(values: np.ndarray, count: int) -> np.ndarray:
    """The mean of the finite values among ``count`` values around each (fewer at the ends); NaN where the value is NaN."""
    padded = np.pad(values, ((count - 1) // 2, count // 2), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, count)
    finite = np.isfinite(windows)
    means = np.where(finite, windows, 0.0).sum(axis=1) / np.maximum(finite.sum(axis=1), 1)
    return np.where(np.isfinite(values), means, np.nan)


def curves(
    series: Mapping[str, Sequence[ArrayLike]],
    *,
    formats: Mapping[str, str] | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """Draws lines with markers, one for each label, with error bars where errors are given.

    Points that are not finite are left out, and the line connects their neighbours.

    Args:
      series: for each label (x, y) or (x, y, error), arrays of the same length. The error is the half-length of the bar.
      formats: for each label a Matplotlib format such as "s--"; the default is "o-".
      legend: whether to draw the legend.
      ax: the axis to draw on; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: if arrays have different lengths, or a format has an unknown label.

    Example:
      >>> import numpy as np
      >>> from jflow import plots
      >>> figure = plots.curves({"loss": ([1, 2, 3], [0.5, 0.4, 0.3])})
      >>> len(figure.axes)
      1
    """
    formats = dict(formats or {})
    for label in formats:
        checks.choice("formats", label, series)
    columns = {label: _columns(label, given) for label, given in series.items()}
    ax = axis_or_new(ax)
    for label, (x, y, error) in columns.items():
        kept = np.isfinite(x) & np.isfinite(y)
        bar = None if error is None else error[kept]
        ax.errorbar(x[kept], y[kept], bar, fmt=formats.get(label, "o-"), capsize=3, label=label)
    if legend and series:
        ax.legend()
    return figure_of(ax)


def _columns(label: str, given: Sequence[ArrayLike]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    arrays = [np.asarray(column, np.float64) for column in given]
    if len(arrays) not in (2, 3) or len({a.shape for a in arrays}) != 1 or arrays[0].ndim != 1:
        shapes = [a.shape for a in arrays]
        raise ValueError(f"series[{label!r}]: expected (x, y) or (x, y, error) of one length, got shapes {shapes}")
    return arrays[0], arrays[1], arrays[2] if len(arrays) == 3 else None


def against(exact: ArrayLike, estimates: ArrayLike | Mapping[str, ArrayLike], *, ax: Axes | None = None) -> Figure:
    """Plots estimates against exact values as points, with the line on which both are equal.

    Args:
      exact: the exact values, [N].
      estimates: the estimates, [N], or several by label.
      ax: the axis to draw on; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: if the exact values do not have shape [N], or estimates have another shape.
    """
    named = estimates if isinstance(estimates, Mapping) else {"": estimates}
    truth = np.asarray(exact)
    checks.shape("exact", truth, (None,))
    for label, values in named.items():
        checks.shape(f"estimates[{label!r}]" if label else "estimates", values, truth.shape)
    ax = axis_or_new(ax, (4.4, 4.2))
    for label, values in named.items():
        ax.plot(truth, np.asarray(values), ".", markersize=3, alpha=0.5, label=label or None)
    finite = truth[np.isfinite(truth)]
    middle = float(finite.mean()) if finite.size else 0.0
    ax.axline((middle, middle), slope=1.0, color="black", linewidth=0.8)
    ax.set(xlabel="exact value", ylabel="estimate")
    if isinstance(estimates, Mapping) and estimates:
        ax.legend(markerscale=3)
    return figure_of(ax)
