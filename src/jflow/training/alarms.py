"""Alarms: detect exploding values in the training rows of a run, and describe them in one sentence.

Two rules are applied to every training row.

The relative rule reports a tangent norm or a raw residual above FACTOR times the median of its earlier rows. It needs at
least ROWS earlier rows.

The absolute rule compares with the start of the run, from the first row on. It reports

- a raw residual above FACTOR times its own first row and above FACTOR times the largest raw residual of the run's first row.
  Residuals are mean squares of velocities, so the residuals of the first row set the scale of the data. A residual between
  two outputs of the network starts near zero and may rise to that scale without exploding.
- a tangent norm, while it has fewer than ROWS rows, above FACTOR times their median (of an even number, the lower one).
- a loss above FACTOR times the loss of the first step, and a grad_norm above FACTOR^2 times its first row.

The loss and grad_norm change their meaning when the objective changes, as in a curriculum. Their reference is therefore taken
anew whenever the set of raw residuals above zero changes. If a row has residuals or tangents, one of these must also have
grown by a factor CONFIRMED before the loss or grad_norm is reported. The first row has no earlier values, so there FACTOR
times the loss must exceed the largest residual. A loss that has been negative (as with learned weights), or that was zero at
the first step, has no scale and is not judged; its residuals are. The first row of a term that starts later is not used as a
reference, because it may average over steps without that term.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jflow.reports import Report, Residual, Tangent, bins_name

# A value has exploded if it exceeds this many times the median of its earlier rows, or its value at the start. In runs with
# rows of a hundred steps, healthy tangents stayed below 2 times and healthy residuals below 9 times the median; a tangent that
# blew up reached thousands.
FACTOR = 20.0
# The number of rows from which on the median is used.
ROWS = 5
# A loss or gradient is reported only if a residual or a tangent has grown by this factor.
CONFIRMED = 2.0
# The kinds of values: tangents and residuals belong to a term, loss and gradient to the whole step.
TANGENT, RESIDUAL, LOSS, GRADIENT = "tangent", "residual", "loss", "gradient"
# The keys of the loss and the gradient norm in a row.
ROW = {LOSS: "loss", GRADIENT: "grad_norm"}
# For each kind: its name, what its value is, and what may help.
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
# The binned quantity for each key of bins; the bins are equal parts of [0, 1].
SYMBOLS = {"gap": "t - s"}


class Watched(NamedTuple):
    """The residual and tangent metrics of a row, with the keys of their bins.

    Attributes:
      residual: for each residual metric, the keys of its bins.
      tangent: for each tangent metric, the keys of its bins.
    """

    residual: dict[str, tuple[str, ...]]
    tangent: dict[str, tuple[str, ...]]


def watched(metrics: Mapping[str, Report]) -> Watched:
    """The metrics to watch: those of type ``Residual`` or ``Tangent``, whatever their names."""
    tangents = {name: tuple(report.by) for name, report in metrics.items() if isinstance(report, Tangent)}
    residuals = {name: tuple(report.by) for name, report in metrics.items() if isinstance(report, Residual)}
    return Watched({name: keys for name, keys in residuals.items() if name not in tangents}, tangents)


class Found(NamedTuple):
    """A value that has exploded.

    Attributes:
      kind: TANGENT, RESIDUAL, LOSS or GRADIENT.
      name: the name of the metric.
      value: its value in this row.
      reference: the value that it is compared with.
      what: a description of the reference.
    """

    kind: str
    name: str
    value: float
    reference: float
    what: str


class Watch:
    """Checks the rows of a run one after another.

    The result for a row depends only on that row and the training rows before it. A resumed run starts its watch from the
    rows that were kept, so it gives the same warnings as an uninterrupted run. Values that are zero (a term not yet in use)
    or not finite are ignored.

    Args:
      names: the metrics to watch, or None if they are not known yet (``expect``).
      rows: the earlier rows. Rows of other kinds than "train" are skipped.
    """

    def __init__(self, names: Watched | None = None, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._names = Watched({}, {})
        self._kept = list(rows)
        # For each name all values, sorted, and its first ROWS values in order; the largest residual of the first row; the
        # names of the residuals in use; the reference values of the loss and the gradient for these.
        self._seen: dict[str, list[float]] = {}
        self._early: dict[str, list[float]] = {}
        self._scale = 0.0
        self._terms: frozenset[str] | None = None
        self._start: dict[str, float] = {}
        self._has_scale = True
        # The number of training rows, and of those since the terms changed.
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
        """A warning about the next training row, as one sentence, or None.

        If several values have exploded, tangents are reported first, because they are the cause; then residuals, the loss
        and the gradient. Within a kind, the worst value is reported.
        """
        self._begin(row)
        found = next(filter(None, (self._worst(row, kind) for kind in (TANGENT, RESIDUAL))), None)
        found = found or self._loss(row) or self._gradient(row)
        self._keep(row)
        return None if found is None else self._sentence(row, found)

    def _begin(self, row: Mapping[str, Any]) -> None:
        """Resets the references of the loss and the gradient if the terms change, and checks whether the loss has a scale."""
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
        """The exploded value with the largest ratio to its reference, or None."""
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
        """Whether a residual or a tangent has grown as well; True if the row has none."""
        values = [*self._values(row, TANGENT), *self._values(row, RESIDUAL)]
        if self._rows == 0:
            # There are no earlier values. A loss far below the residuals is near zero by chance, and no scale.
            largest = max((value for _, value in self._values(row, RESIDUAL)), default=0.0)
            return FACTOR * row[ROW[LOSS]] > largest
        known = [(value, self._early[name][0]) for name, value in values if self._early.get(name)]
        return not values or any(value > CONFIRMED * first for value, first in known)

    def _values(self, row: Mapping[str, Any], kind: str) -> list[tuple[str, float]]:
        """The names and values of a kind of metrics in a row, for values above zero."""
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
    # An empty bin is NaN, or null in the file.
    if values.ndim != 1 or np.isinf(values).any() or not np.any(values > 0):
        return None
    place = int(np.nanargmax(values))
    return f"{symbol} in [{place / len(values):.3g}, {(place + 1) / len(values):.3g}]"


def _positive(value: Any) -> float | None:
    """The value if it is a finite number above zero, else None."""
    number = _number(value)
    return number if number is not None and number > 0 else None


def _number(value: Any) -> float | None:
    """The value if it is a finite number, else None. Rows read from the file have null for values that are not finite."""
    if value is None or np.ndim(value) != 0:
        return None
    return float(value) if math.isfinite(value) else None
