"""Alarms: says in words when training explodes, from the first row of a log on.

Two rules are applied to the numbers of every row of training.

relative    a tangent norm or a raw residual above FACTOR times the median of its rows so far, of which there are at least ROWS.

absolute    a number above FACTOR times what it was at the start of the run, from the first row on:
            - a raw residual, above FACTOR times the largest raw residual of the run's first row, or FACTOR times its own
              first row, whichever is more. Residuals are mean squares of velocities, so those of the first row are the scale
              of the data: a residual between two outputs of the network that starts near zero may well rise to it.
            - a tangent norm, while it has fewer than ROWS rows, above FACTOR times their median (the lower of two).
            - the loss, above FACTOR times the loss of the first step; grad_norm, above FACTOR^2 times its first row.

The loss and grad_norm mean something else when the objective changes, as in a curriculum. So their start is that of the
present terms (the raw residuals that are above zero), and where a row has residuals or tangents, one of these must have
grown by CONFIRMED as well. In the first row, where there is nothing to compare with, the loss must come within FACTOR of the
largest residual. A loss that has been negative, as with learned weights, or zero at the first step has no scale: it is not
judged, its residuals are. The first row of a term that starts later is not used: it may be a mean over steps without it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jflow.reports import Report, Residual, Tangent, bins_name

# A value this many times the median of its rows so far, or its value at the start, has exploded. Of runs with rows of a
# hundred steps, the healthy ones stayed below 2 for tangents and 9 for residuals (of the median); where a tangent blew up, it
# came to thousands.
FACTOR = 20.0
# The fewest rows that have a median worth comparing with.
ROWS = 5
# What residuals or tangents must at least have grown by for a loss or gradient to be believed.
CONFIRMED = 2.0
# What a number is: of a term, or of the whole step.
TANGENT, RESIDUAL, LOSS, GRADIENT = "tangent", "residual", "loss", "gradient"
# The names of the last two in a row.
ROW = {LOSS: "loss", GRADIENT: "grad_norm"}
# What the value measures, and what may help.
WORDS = {
    TANGENT: (
        "tangent",
        "norm",
        "lower the learning rate, normalise or clip the tangent (jflow.reductions), or lengthen its warm-up",
    ),
    RESIDUAL: (
        "residual",
        "mean square",
        "lower the learning rate, clip the gradient, or choose a reduction that grows less fast (jflow.reductions)",
    ),
    LOSS: ("loss", "mean", "lower the learning rate, lengthen its warm-up, or clip the gradient"),
    GRADIENT: ("gradient", "norm", "lower the learning rate, lengthen its warm-up, or clip the gradient"),
}
# Bins are equal parts of [0, 1]; what they are bins of.
SYMBOLS = {"gap": "t - s"}


class Watched(NamedTuple):
    """The metrics of a row that an alarm looks at beside the loss and the gradient, with the keys of their bins.

    Attributes:
      residual: the keys of the bins by the name of the metric.
      tangent: likewise.
    """

    residual: dict[str, tuple[str, ...]]
    tangent: dict[str, tuple[str, ...]]


def watched(metrics: Mapping[str, Report]) -> Watched:
    """What of these metrics is watched: residuals and tangents, by what they are and not by their names."""
    tangents = {name: tuple(report.by) for name, report in metrics.items() if isinstance(report, Tangent)}
    residuals = {name: tuple(report.by) for name, report in metrics.items() if isinstance(report, Residual)}
    return Watched({name: keys for name, keys in residuals.items() if name not in tangents}, tangents)


class Found(NamedTuple):
    """A number that has exploded.

    Attributes:
      kind: TANGENT, RESIDUAL, LOSS or GRADIENT.
      name: of the metric.
      value: in this row.
      reference: what it is compared with.
      what: the reference in words.
    """

    kind: str
    name: str
    value: float
    reference: float
    what: str


class Watch:
    """Looks at the rows of a run in their order.

    The verdict on a row depends on the numbers of the training rows before it and its own, so that a resumed run, whose
    watch starts from the rows that were kept, says what an unbroken one does. Numbers that are zero (a term not yet in force)
    or not finite are not counted.

    Args:
      names: the metrics that are watched, or None where they are not known yet (``expect``).
      rows: those before; of other kinds than "train", or without such metrics, they may be there as well.
    """

    def __init__(self, names: Watched | None = None, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._names = Watched({}, {})
        self._kept = list(rows)
        # Sorted values by name, and the first few of each in order; the scale of residuals; what the loss and the gradient
        # were with the present terms.
        self._seen: dict[str, list[float]] = {}
        self._early: dict[str, list[float]] = {}
        self._scale = 0.0
        self._terms: frozenset[str] | None = None
        self._start: dict[str, float] = {}
        self._has_scale = True
        # Training rows in all, and those since the terms changed.
        self._rows = self._same = 0
        if names is not None:
            self._start_with(names)

    def expect(self, metrics: Mapping[str, Report]) -> None:
        """Sets the watched names from the metrics of a row, before the first row; later calls have no effect."""
        if not any(self._names):
            self._start_with(watched(metrics))

    def _start_with(self, names: Watched) -> None:
        """Applies the rules to the earlier rows, which were kept until the watched names were known."""
        self._names, kept, self._kept = names, self._kept, []
        for row in kept:
            if row.get("kind") == "train":
                self._keep(row)

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        """What is wrong with the next training row, as one sentence, or None.

        Of several values that have exploded the tangents come first, being the cause, then residuals, the loss and the
        gradient; and of each the worst.
        """
        self._begin(row)
        found = next(filter(None, (self._worst(row, kind) for kind in (TANGENT, RESIDUAL))), None)
        found = found or self._loss(row) or self._gradient(row)
        self._keep(row)
        return None if found is None else self._sentence(row, found)

    def _begin(self, row: Mapping[str, Any]) -> None:
        """Starts the loss and the gradient anew where the terms in force change, and sees whether the loss has a scale."""
        terms = frozenset(name for name, _ in self._values(row, RESIDUAL))
        if terms != self._terms:
            self._terms, self._start, self._same = terms, {}, 0
        first, loss = (_number(row.get(name)) for name in ("first_loss", ROW[LOSS]))
        if self._rows == 0 and first is not None:
            self._has_scale &= first > 0
            self._start[LOSS] = first
        self._has_scale &= loss is None or loss >= 0

    def _keep(self, row: Mapping[str, Any]) -> None:
        self._begin(row)
        for name, value in (*self._values(row, TANGENT), *self._values(row, RESIDUAL)):
            early = self._early.setdefault(name, [])
            if (self._rows == 0 or name in self._seen) and len(early) < ROWS:
                early.append(value)
            bisect.insort(self._seen.setdefault(name, []), value)
        if self._rows == 0:
            self._scale = max((value for _, value in self._values(row, RESIDUAL)), default=0.0)
        if self._rows == 0 or self._same > 0:
            for name in (LOSS, GRADIENT):
                if (value := _positive(row.get(ROW[name]))) is not None:
                    self._start.setdefault(name, value)
        self._rows, self._same = self._rows + 1, self._same + 1

    def _worst(self, row: Mapping[str, Any], kind: str) -> Found | None:
        """The value that is most above its reference, where any is too far above it."""
        found = [self._exploded(name, value, kind) for name, value in self._values(row, kind)]
        return max(filter(None, found), key=lambda entry: entry.value / entry.reference, default=None)

    def _exploded(self, name: str, value: float, kind: str) -> Found | None:
        median, early = self._median(name), self._early.get(name, [])
        if median is not None and value > FACTOR * median:
            return Found(kind, name, value, median, "the median so far")
        if not early or (kind == TANGENT and median is not None):
            return None
        reference = sorted(early)[(len(early) - 1) // 2] if kind == TANGENT else max(early[0], self._scale)
        return Found(kind, name, value, reference, "that at the start") if value > FACTOR * reference else None

    def _median(self, name: str) -> float | None:
        seen = self._seen.get(name, ())
        half = len(seen) // 2
        return None if len(seen) < ROWS else (seen[half] + seen[-half - 1]) / 2

    def _loss(self, row: Mapping[str, Any]) -> Found | None:
        value, first = _positive(row.get(ROW[LOSS])), self._start.get(LOSS)
        if not self._has_scale or value is None or first is None or value <= FACTOR * first or not self._confirmed(row):
            return None
        return Found(LOSS, ROW[LOSS], value, first, "that at the start")

    def _gradient(self, row: Mapping[str, Any]) -> Found | None:
        value, first = _positive(row.get(ROW[GRADIENT])), self._start.get(GRADIENT)
        if value is None or first is None or value <= FACTOR**2 * first or not self._confirmed(row):
            return None
        return Found(GRADIENT, ROW[GRADIENT], value, first, "that at the start")

    def _confirmed(self, row: Mapping[str, Any]) -> bool:
        """Whether a residual or a tangent has grown too, where the row has any."""
        values = [*self._values(row, TANGENT), *self._values(row, RESIDUAL)]
        if self._rows == 0:
            # Nothing to compare with yet: a loss far below the residuals, near zero by chance, is not their mean.
            largest = max((value for _, value in self._values(row, RESIDUAL)), default=0.0)
            return FACTOR * row[ROW[LOSS]] > largest
        known = [(value, self._early[name][0]) for name, value in values if self._early.get(name)]
        return not values or any(value > CONFIRMED * first for value, first in known)

    def _values(self, row: Mapping[str, Any], kind: str) -> list[tuple[str, float]]:
        """The metrics of a kind in a row, and their values, where these are above zero."""
        names = self._names.tangent if kind == TANGENT else self._names.residual
        values = ((name, _positive(row.get(name))) for name in names)
        return [(name, value) for name, value in values if value is not None]

    def _sentence(self, row: Mapping[str, Any], found: Found) -> str:
        what, number, remedy = WORDS[found.kind]
        first, last = row["step"] - row["steps"] + 1, row["step"]
        steps = f"step {last}" if first == last else f"steps {first}-{last}"
        keys = {**self._names.residual, **self._names.tangent}.get(found.name, ())
        bins = (_worst_bin(row, bins_name(found.name, key), SYMBOLS.get(key, key)) for key in keys)
        where = " and ".join(filter(None, bins))
        named = f" {found.name!r}" if found.kind in (TANGENT, RESIDUAL) else ""
        return (
            f"{steps}: the {what}{named} exploded: its {number} {found.value:.2g} is "
            f"{found.value / found.reference:.3g} times {found.what} ({found.reference:.2g})"
            f"{where and f', worst at {where}'}; {remedy}"
        )


def _worst_bin(row: Mapping[str, Any], name: str, symbol: str) -> str | None:
    values = np.asarray(row.get(name, ()), np.float64)
    # A bin without rows is not a number, null in the file.
    if values.ndim != 1 or np.isinf(values).any() or not np.any(values > 0):
        return None
    place = int(np.nanargmax(values))
    return f"{symbol} in [{place / len(values):.3g}, {(place + 1) / len(values):.3g}]"


def _positive(value: Any) -> float | None:
    """The number, if it is one above zero."""
    number = _number(value)
    return number if number is not None and number > 0 else None


def _number(value: Any) -> float | None:
    """The finite number, or None; a row read from the file has null for what is not finite."""
    if value is None or np.ndim(value) != 0:
        return None
    return float(value) if math.isfinite(value) else None
