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

# A value this many times the median of its rows so far, or its value at the start, has exploded. Of runs with rows of a
# hundred steps, the healthy ones stayed below 2 for tangents and 9 for residuals (of the median); where a tangent blew up, it
# came to thousands.
FACTOR = 20.0
# The fewest rows that have a median worth comparing with.
ROWS = 5
# What residuals or tangents must at least have grown by for a loss or gradient to be believed.
CONFIRMED = 2.0
TANGENT, RESIDUAL = "/tangent_norm", "/raw"
LOSS, GRADIENT = "loss", "grad_norm"
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
# Bins are equal parts of [0, 1].
BINS = {"t": "t", "gap": "t - s"}


class Found(NamedTuple):
    """A number that has exploded.

    Attributes:
      name: of the metric.
      value: in this row.
      reference: what it is compared with.
      what: the reference in words.
    """

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
      rows: those before; of other kinds than "train", or without such metrics, they may be there as well.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
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
        for row in rows:
            if row.get("kind") == "train":
                self._keep(row)

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        """What is wrong with the next training row, as one sentence, or None.

        Of several values that have exploded the tangents come first, being the cause, then residuals, the loss and the
        gradient; and of each the worst.
        """
        self._begin(row)
        found = next(filter(None, (self._worst(row, ending) for ending in (TANGENT, RESIDUAL))), None)
        found = found or self._loss(row) or self._gradient(row)
        self._keep(row)
        return None if found is None else _sentence(row, found)

    def _begin(self, row: Mapping[str, Any]) -> None:
        """Starts the loss and the gradient anew where the terms in force change, and sees whether the loss has a scale."""
        terms = frozenset(name for name, _ in _values(row, RESIDUAL))
        if terms != self._terms:
            self._terms, self._start, self._same = terms, {}, 0
        first, loss = (_number(row.get(name)) for name in ("first_loss", LOSS))
        if self._rows == 0 and first is not None:
            self._has_scale &= first > 0
            self._start[LOSS] = first
        self._has_scale &= loss is None or loss >= 0

    def _keep(self, row: Mapping[str, Any]) -> None:
        self._begin(row)
        for name, value in (*_values(row, TANGENT), *_values(row, RESIDUAL)):
            early = self._early.setdefault(name, [])
            if (self._rows == 0 or name in self._seen) and len(early) < ROWS:
                early.append(value)
            bisect.insort(self._seen.setdefault(name, []), value)
        if self._rows == 0:
            self._scale = max((value for _, value in _values(row, RESIDUAL)), default=0.0)
        if self._rows == 0 or self._same > 0:
            for name in (LOSS, GRADIENT):
                if (value := _positive(row.get(name))) is not None:
                    self._start.setdefault(name, value)
        self._rows, self._same = self._rows + 1, self._same + 1

    def _worst(self, row: Mapping[str, Any], ending: str) -> Found | None:
        """The value that is most above its reference, where any is too far above it."""
        found = [self._exploded(name, value, ending) for name, value in _values(row, ending)]
        return max(filter(None, found), key=lambda entry: entry.value / entry.reference, default=None)

    def _exploded(self, name: str, value: float, ending: str) -> Found | None:
        median, early = self._median(name), self._early.get(name, ())
        if median is not None and value > FACTOR * median:
            return Found(name, value, median, "the median so far")
        if not early or (ending == TANGENT and median is not None):
            return None
        reference = sorted(early)[(len(early) - 1) // 2] if ending == TANGENT else max(early[0], self._scale)
        return Found(name, value, reference, "that at the start") if value > FACTOR * reference else None

    def _median(self, name: str) -> float | None:
        seen = self._seen.get(name, ())
        half = len(seen) // 2
        return None if len(seen) < ROWS else (seen[half] + seen[-half - 1]) / 2

    def _loss(self, row: Mapping[str, Any]) -> Found | None:
        value, first = _positive(row.get(LOSS)), self._start.get(LOSS)
        if not self._has_scale or value is None or first is None or value <= FACTOR * first or not self._confirmed(row):
            return None
        return Found(LOSS, value, first, "that at the start")

    def _gradient(self, row: Mapping[str, Any]) -> Found | None:
        value, first = _positive(row.get(GRADIENT)), self._start.get(GRADIENT)
        if value is None or first is None or value <= FACTOR**2 * first or not self._confirmed(row):
            return None
        return Found(GRADIENT, value, first, "that at the start")

    def _confirmed(self, row: Mapping[str, Any]) -> bool:
        """Whether a residual or a tangent has grown too, where the row has any."""
        values = [*_values(row, TANGENT), *_values(row, RESIDUAL)]
        if self._rows == 0:
            # Nothing to compare with yet: a loss far below the residuals, near zero by chance, is not their mean.
            largest = max((value for _, value in _values(row, RESIDUAL)), default=0.0)
            return FACTOR * row[LOSS] > largest
        known = [(value, self._early[name][0]) for name, value in values if self._early.get(name)]
        return not values or any(value > CONFIRMED * first for value, first in known)


def _values(row: Mapping[str, Any], ending: str) -> list[tuple[str, float]]:
    """The metrics of a row with this ending, and their values, where these are above zero."""
    values = ((name, _positive(row[name])) for name in row if name.endswith(ending))
    return [(name, value) for name, value in values if value is not None]


def _sentence(row: Mapping[str, Any], found: Found) -> str:
    term, _, ending = found.name.rpartition("/")
    what, number, remedy = WORDS[f"/{ending}" if term else ending]
    first, last = row["step"] - row["steps"] + 1, row["step"]
    steps = f"step {last}" if first == last else f"steps {first}-{last}"
    bins = (_worst_bin(row, f"{term}{RESIDUAL}_by_{key}", symbol) for key, symbol in BINS.items())
    where = " and ".join(filter(None, bins)) if term else ""
    return (
        f"{steps}: the {what}{term and f' of {term!r}'} exploded: its {number} {found.value:.2g} is "
        f"{found.value / found.reference:.3g} times {found.what} ({found.reference:.2g}){where and f', worst at {where}'}; "
        f"{remedy}"
    )


def _worst_bin(row: Mapping[str, Any], name: str, symbol: str) -> str | None:
    values = np.asarray(row.get(name, ()), np.float64)
    if values.ndim != 1 or not values.any() or not np.isfinite(values).all():
        return None
    place = int(values.argmax())
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
