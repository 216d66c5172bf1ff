r"""Reported values: numbers for a person, each of which knows how it is averaged over rows, steps and devices.

    Mean(total, count)     total/count; totals and counts add up: means over rows, also by bins
    RootMean(total, count) sqrt(total/count)
    Residual(square, by)   the mean square of a term's residual, with means by bins; watched for explosions
    Tangent(square, by)    the root mean square of a term's derivative, likewise
    PerRow(values)         one value for each row of a batch; reported as its mean over the rows
    Total(count)           a number of events; adds up over steps
    Largest(number)        the largest over steps
    First(number)          the one of the first step
    Last(number)           the one of the last step that has one
    Every(truth)           a truth value; true if it was true in every step

A report is a pytree. Reports of many steps, chunks or devices are stacked along a leading axis and become one by ``merged``,
on the device or on the host; ``value`` is the number that a log shows. Their names are labels: no code reads meaning from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

# jax arrays while a program runs, numpy arrays on the host.
Values = Any


@runtime_checkable
class Report(Protocol):
    """A reported value; a pytree of arrays."""

    def merged(self) -> Self:
        """One report of many that are stacked along the leading axis of every array."""
        ...

    def neutral(self) -> Self:
        """A report of the same shapes that changes nothing when it is merged: of a term that is not in force."""
        ...

    def value(self) -> Values:
        """The number to show, or an array of numbers by bins; NaN where there is nothing to average."""
        ...


class Mean(NamedTuple):
    """A mean, total/count, of numbers or of arrays by bins.

    Attributes:
      total: the sum of the values.
      count: how many there were, shaped like ``total``; a weight need not be whole.
    """

    total: Values
    count: Values

    def merged(self) -> Self:
        """Sums of totals and counts."""
        return type(self)(self.total.sum(0), self.count.sum(0))

    def neutral(self) -> Self:
        """Nothing, counted zero times."""
        return type(self)(_zeros(self.total), _zeros(self.count))

    def value(self) -> Values:
        """total/count, NaN where the count is zero."""
        return _ratio(self.total, self.count)


class RootMean(NamedTuple):
    """A root of a mean, sqrt(total/count): a root mean square, if ``total`` is a sum of squares.

    Attributes:
      total: the sum of the squares.
      count: how many there were.
    """

    total: Values
    count: Values

    def merged(self) -> Self:
        """Sums of totals and counts."""
        return type(self)(self.total.sum(0), self.count.sum(0))

    def neutral(self) -> Self:
        """Nothing, counted zero times."""
        return type(self)(_zeros(self.total), _zeros(self.count))

    def value(self) -> Values:
        """sqrt(total/count), NaN where the count is zero."""
        return _ratio(self.total, self.count) ** 0.5


class Residual(NamedTuple):
    """The mean square of a term's residual; an alarm watches it.

    Attributes:
      square: the mean over the rows.
      by: means by equal bins of [0, 1], under the name of what is binned: "t", "gap".
    """

    square: Mean
    by: dict[str, Mean]

    def merged(self) -> Self:
        """The means, each merged."""
        return type(self)(self.square.merged(), {key: mean.merged() for key, mean in self.by.items()})

    def neutral(self) -> Self:
        """Nothing, counted zero times."""
        return type(self)(self.square.neutral(), {key: mean.neutral() for key, mean in self.by.items()})

    def value(self) -> Values:
        """The mean over the rows."""
        return self.square.value()

    def bins(self) -> dict[str, Values]:
        """The means by bins."""
        return {key: mean.value() for key, mean in self.by.items()}


class Tangent(Residual):
    """The root mean square of the derivative in a term's residual, with its own bins; an alarm watches it."""

    def value(self) -> Values:
        """The root of the mean over the rows."""
        return self.square.value() ** 0.5

    def bins(self) -> dict[str, Values]:
        """The roots of the means by bins."""
        return {key: mean.value() ** 0.5 for key, mean in self.by.items()}


class PerRow(NamedTuple):
    """A value for each row of the batch, in batch order.

    Attributes:
      values: ``[B]``; truth values count as 0 and 1.
    """

    values: Values

    def mean(self) -> Mean:
        """The mean over the rows."""
        values = self.values if jnp.issubdtype(self.values.dtype, jnp.inexact) else self.values.astype(jnp.float32)
        return Mean(values.sum(), jnp.full_like(values.sum(), values.size))

    def merged(self) -> PerRow:
        """The rows of all."""
        return PerRow(self.values.reshape(-1, *self.values.shape[2:]))

    def neutral(self) -> PerRow:
        """Zeros: what is reported of another stage's rows should be a ``Mean``."""
        return PerRow(_zeros(self.values))

    def value(self) -> Values:
        """The mean over the rows."""
        return self.values.mean()


class Total(NamedTuple):
    """A number of events, which adds up over steps."""

    count: Values

    def merged(self) -> Total:
        """The sum."""
        return Total(self.count.sum(0))

    def neutral(self) -> Total:
        """No events."""
        return Total(_zeros(self.count))

    def value(self) -> Values:
        """The number."""
        return self.count


class Largest(NamedTuple):
    """The largest of a number over steps."""

    number: Values

    def merged(self) -> Largest:
        """The largest."""
        return Largest(self.number.max(0))

    def neutral(self) -> Largest:
        """The smallest number of its dtype."""
        dtype = self.number.dtype
        least = -jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min
        return Largest(jnp.full(self.number.shape, least, dtype))

    def value(self) -> Values:
        """The number."""
        return self.number


class First(NamedTuple):
    """The number of the first step."""

    number: Values

    def merged(self) -> First:
        """The first."""
        return First(self.number[0])

    def neutral(self) -> First:
        """Zero, for there is no neutral first number."""
        return First(_zeros(self.number))

    def value(self) -> Values:
        """The number."""
        return self.number


class Last(NamedTuple):
    """The number of the last step that has one.

    Attributes:
      number: a scalar, or an array.
      known: whether there is a number, a truth value for the whole of it.
    """

    number: Values
    known: Values = True

    def merged(self) -> Last:
        """The last that is known."""
        xp = jnp if isinstance(self.number, jax.Array) else np
        known = xp.broadcast_to(xp.asarray(self.known), self.number.shape[:1])
        place = len(known) - 1 - xp.argmax(known[::-1])
        return Last(self.number[place], known.any(0))

    def neutral(self) -> Last:
        """A number that is not known."""
        return Last(_zeros(self.number), jnp.zeros((), bool))

    def value(self) -> Values:
        """The number; NaN where it is not known, or zero if it is a whole number."""
        if not jnp.issubdtype(self.number.dtype, jnp.inexact):
            return self.number
        xp = jnp if isinstance(self.number, jax.Array) else np
        return xp.where(self.known, self.number, xp.full_like(self.number, xp.nan))


class Every(NamedTuple):
    """Whether something was true in every step."""

    truth: Values

    def merged(self) -> Every:
        """True if all are."""
        return Every(self.truth.all(0))

    def neutral(self) -> Every:
        """True."""
        return Every(jnp.ones(self.truth.shape, bool))

    def value(self) -> Values:
        """The truth value."""
        return self.truth


# Averages, in which a step may count nothing; and all.
AVERAGES = (Mean, RootMean, Residual)
KINDS = (*AVERAGES, PerRow, Total, Largest, First, Last, Every)


def mean(values: Values) -> Mean:
    """The mean of an array's entries, for instance of one value per row."""
    values = jnp.asarray(values)
    values = values if jnp.issubdtype(values.dtype, jnp.inexact) else values.astype(jnp.float32)
    return Mean(jnp.sum(values), jnp.full((), values.size, values.dtype))


def binned(values: Values, by: Values, bins: int) -> Mean:
    """Means of ``values`` [n] by equal bins of ``by`` [n] in [0, 1]: arrays ``[bins]``; an empty bin has a count of zero."""
    place = jnp.clip((by * bins).astype(jnp.int32), 0, bins - 1)
    empty = jnp.zeros((bins,), values.dtype)
    return Mean(empty.at[place].add(values), empty.at[place].add(1.0))


def as_reports(metrics: Mapping[str, Any]) -> dict[str, Report]:
    """Reports by name; a number or an array, which does not say how it is averaged, becomes the mean over steps.

    Raises:
      TypeError: for a name that is not a string, or a value that is neither a report nor a number.
    """
    found: dict[str, Report] = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"metrics: expected names that are strings, got {name!r}")
        if isinstance(value, PerRow):
            value = value.mean()
        if not isinstance(value, KINDS):
            value = _once(name, value)
        found[name] = value
    return found


def merged(metrics: Mapping[str, Report]) -> dict[str, Report]:
    """One report under each name, of reports that are stacked along their leading axes."""
    return {name: report.merged() for name, report in metrics.items()}


def values(metrics: Mapping[str, Report]) -> dict[str, Values]:
    """The numbers to show by name; the bins of a residual or a tangent stand beside it, as NAME_by_t."""
    shown = {}
    for name, report in metrics.items():
        shown[name] = report.value()
        if isinstance(report, Residual):
            shown |= {bins_name(name, key): bins for key, bins in report.bins().items()}
    return shown


def bins_name(name: str, key: str) -> str:
    """The name, among ``values``, of a report's means by bins of ``key``."""
    return f"{name}_by_{key}"


def leave_out(metrics: Mapping[str, Report], left_out: Values) -> dict[str, Report]:
    """The reports of one step, whose averages count nothing where the step is to be left out, a scalar bool."""

    def of(report: Report) -> Report:
        if not isinstance(report, AVERAGES):
            return report
        return jax.tree.map(lambda kept, empty: jnp.where(left_out, empty, kept), report, report.neutral())

    return {name: of(report) for name, report in metrics.items()}


def _once(name: str, value: Any) -> Mean:
    numeric = isinstance(value, (bool, int, float, np.generic, np.ndarray, jax.Array))
    if not numeric or not any(jnp.issubdtype(jnp.result_type(value), kind) for kind in (np.number, np.bool_)):
        raise TypeError(f"metrics: expected a report or a number under {name!r}, got {type(value).__name__}")
    array = jnp.asarray(value)
    array = array if jnp.issubdtype(array.dtype, jnp.inexact) else array.astype(jnp.float32)
    return Mean(array, jnp.ones_like(array))


def _zeros(like: Values) -> Values:
    return jnp.zeros(like.shape, like.dtype)


def _ratio(total: Values, count: Values) -> Values:
    xp = jnp if isinstance(total, jax.Array) else np
    empty = count == 0
    return xp.where(empty, xp.full_like(total, xp.nan), total / xp.where(empty, xp.ones_like(count), count))
