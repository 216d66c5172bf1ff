"""Says in words when training explodes: a tangent or a residual far above what it has been so far."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# A value this many times the median of its rows so far has exploded. Of runs with rows of a hundred steps, the healthy ones
# stayed below 2 for tangents and 9 for residuals; where a tangent blew up, it came to thousands.
FACTOR = 20.0
# The fewest rows that have a median worth comparing with.
ROWS = 5
TANGENT, RESIDUAL = "/tangent_norm", "/raw"
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
}
# Bins are equal parts of [0, 1].
BINS = {"t": "t", "gap": "t - s"}


class Watch:
    """Looks at the rows of a run in their order.

    The verdict on a row depends on the numbers of the training rows before it alone, so that a resumed run, whose watch
    starts from the rows that were kept, says what an unbroken one does. Numbers that are zero (a term not yet in force)
    or not finite count for nothing.

    Args:
      rows: those before; of other kinds than "train", or without such metrics, they may be there as well.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._seen: dict[str, list[float]] = {}
        for row in rows:
            if row.get("kind") == "train":
                self._keep(row)

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        """What is wrong with the next training row, as one sentence, or None.

        Of several values that have exploded the tangents come first, being the cause, and of these the worst.
        """
        found = [self._exploded(row, ending) for ending in (TANGENT, RESIDUAL)]
        self._keep(row)
        worst = next(filter(None, found), None)
        return None if worst is None else _sentence(row, *worst)

    def _keep(self, row: Mapping[str, Any]) -> None:
        for name in row:
            if name.endswith((TANGENT, RESIDUAL)) and (value := _positive(row[name])) is not None:
                bisect.insort(self._seen.setdefault(name, []), value)

    def _exploded(self, row: Mapping[str, Any], ending: str) -> tuple[str, float, float] | None:
        """(name, value, median) of the value that is most above its median, where any is too far above it."""
        values = {name: _positive(row[name]) for name in row if name.endswith(ending)}
        found = [
            (name, value, median)
            for name, value in values.items()
            if value is not None and (median := self._median(name)) is not None and value > FACTOR * median
        ]
        return max(found, key=lambda entry: entry[1] / entry[2], default=None)

    def _median(self, name: str) -> float | None:
        seen = self._seen.get(name, ())
        half = len(seen) // 2
        return None if len(seen) < ROWS else (seen[half] + seen[-half - 1]) / 2


def _sentence(row: Mapping[str, Any], name: str, value: float, median: float) -> str:
    term, ending = name.rsplit("/", 1)
    what, number, remedy = WORDS[f"/{ending}"]
    first, last = row["step"] - row["steps"] + 1, row["step"]
    steps = f"step {last}" if first == last else f"steps {first}-{last}"
    bins = (_worst_bin(row, f"{term}{RESIDUAL}_by_{key}", symbol) for key, symbol in BINS.items())
    where = " and ".join(filter(None, bins))
    return (
        f"{steps}: the {what} of {term!r} exploded: its {number} {value:.2g} is {value / median:.3g} times the median so "
        f"far ({median:.2g}){where and f', worst at {where}'}; {remedy}"
    )


def _worst_bin(row: Mapping[str, Any], name: str, symbol: str) -> str | None:
    values = np.asarray(row.get(name, ()), np.float64)
    if values.ndim != 1 or not values.any() or not np.isfinite(values).all():
        return None
    place = int(values.argmax())
    return f"{symbol} in [{place / len(values):.3g}, {(place + 1) / len(values):.3g}]"


def _positive(value: Any) -> float | None:
    """The number, if it is one above zero; a row read from the file has null for what is not finite."""
    if value is None or np.ndim(value) != 0:
        return None
    value = float(value)
    return value if math.isfinite(value) and value > 0 else None
