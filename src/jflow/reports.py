r"""Reports: metrics that define how they are averaged over rows, steps and devices.

The kinds are::

    Mean(total, count)     a mean total/count, also by bins; totals and counts are summed
    RootMean(total, count) the root of a mean, sqrt(total/count)
    Residual(square, by)   the mean square of a term's residual, with means by bins; watched by alarms
    Tangent(square, by)    the root mean square of a term's derivative, with values by bins; watched by alarms
    PerRow(values)         one value for each row of a batch; reported as the mean over the rows
    Total(count)           a number of events, which is summed over steps
    Largest(number)        the largest number over steps
    First(number)          the number of the first step
    Last(number)           the number of the last step that has one
    Every(truth)           a truth value; true if it was true in every step

A report is a pytree of arrays or Python numbers. To merge the reports of many steps, chunks or devices, stack them along a
leading axis and call ``merged``, on the device or on the host. Sums are accumulated in at least float32. The names of reports
are labels only.

``value()`` is the number that a log shows: a jax scalar, or a numpy scalar on the host. ``float(metrics["loss"].value())`` is
a Python number, and ``values(metrics)`` gives the numbers of all reports by name.

Any pytree with the methods of ``Report`` is a report, and is merged over all steps. If a step must be left out of averages,
for example because its loss is not finite, it is left out of the kinds ``AVERAGES`` and of classes derived from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jflow import trees

# jax arrays while a program runs, numpy arrays or Python numbers on the host.
Values = Any
Tree = TypeVar("Tree")


@runtime_checkable
class Report(Protocol):
    """A reported value; a pytree of arrays."""

    def merged(self) -> Self:
        """Merges many reports into one; they are stacked along the leading axis of every array."""
        ...

    def neutral(self) -> Self:
        """A report of the same shapes and dtypes that has no effect when it is merged, for a term that is not in use."""
        ...

    def value(self) -> Values:
        """The number to show, or an array of numbers by bins; NaN if there is nothing to average."""
        ...


class Mean(NamedTuple):
    """A mean, total/count, of numbers or of arrays by bins.

    Attributes:
      total: the sum of the values.
      count: the number of values, shaped like ``total``; with weights, the sum of the weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import reports
      >>> mean = reports.Mean(jnp.float32(6.0), jnp.float32(3.0))
      >>> float(mean.total / mean.count)
      2.0
    """

    total: Values
    count: Values

    def merged(self) -> Self:
        """Sums of totals and counts."""
        return type(self)(_sum(self.total), _sum(self.count))

    def neutral(self) -> Self:
        """A total and a count of zero."""
        return type(self)(_zeros(self.total), _zeros(self.count))

    def value(self) -> Values:
        """The mean total/count; NaN if the count is zero."""
        return _ratio(self.total, self.count)


class RootMean(NamedTuple):
    """The root of a mean, sqrt(total/count): a root mean square if ``total`` is a sum of squares.

    Attributes:
      total: the sum of the squares.
      count: the number of squares.
    """

    total: Values
    count: Values

    def merged(self) -> Self:
        """Sums of totals and counts."""
        return type(self)(_sum(self.total), _sum(self.count))

    def neutral(self) -> Self:
        """A total and a count of zero."""
        return type(self)(_zeros(self.total), _zeros(self.count))

    def value(self) -> Values:
        """The root sqrt(total/count); NaN if the count is zero."""
        return _ratio(self.total, self.count) ** 0.5


class Residual(NamedTuple):
    """The mean square of a term's residual; an alarm watches it.

    Attributes:
      square: the mean over the rows.
      by: means by equal bins of [0, 1]. The key names the quantity that is binned: "t", "gap".
    """

    square: Mean
    by: dict[str, Mean]

    def merged(self) -> Self:
        """Merges every mean."""
        return type(self)(self.square.merged(), {key: mean.merged() for key, mean in self.by.items()})

    def neutral(self) -> Self:
        """Totals and counts of zero."""
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
        return mean(self.values)

    def merged(self) -> PerRow:
        """The rows of all reports, one after another."""
        values = _array(self.values)
        return PerRow(values.reshape(-1, *values.shape[2:]))

    def neutral(self) -> PerRow:
        """Zeros, which are not neutral in the mean; convert rows to a ``Mean`` first, as ``as_reports`` does."""
        return PerRow(_zeros(self.values))

    def value(self) -> Values:
        """The mean over the rows."""
        return _wide(self.values, _module(self.values)).mean()


class Total(NamedTuple):
    """A number of events, which adds up over steps."""

    count: Values

    def merged(self) -> Total:
        """The sum."""
        return Total(_sum(self.count))

    def neutral(self) -> Total:
        """No events."""
        return Total(_zeros(self.count))

    def value(self) -> Values:
        """The number of events."""
        return _array(self.count)


class Largest(NamedTuple):
    """The largest of the numbers of many steps."""

    number: Values

    def merged(self) -> Largest:
        """The largest number."""
        return Largest(_array(self.number).max(0))

    def neutral(self) -> Largest:
        """The smallest number of the dtype."""
        dtype = _dtype(self.number)
        if jnp.issubdtype(dtype, jnp.bool_):
            return Largest(_zeros(self.number))
        least = -jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min
        return Largest(jnp.full(np.shape(self.number), least, dtype))

    def value(self) -> Values:
        """The number."""
        return _array(self.number)


class First(NamedTuple):
    """The number of the first step."""

    number: Values

    def merged(self) -> First:
        """The first number."""
        return First(_array(self.number)[0])

    def neutral(self) -> First:
        """Zero, which is not neutral, because the first number is always kept."""
        return First(_zeros(self.number))

    def value(self) -> Values:
        """The number."""
        return _array(self.number)


class Last(NamedTuple):
    """The number of the last step that has one.

    Attributes:
      number: a scalar, or an array.
      known: whether there is a number; a scalar bool for the whole array.
    """

    number: Values
    known: Values = True

    def merged(self) -> Last:
        """The last number that is known."""
        xp, number = _module(self.number, self.known), _array(self.number)
        known = xp.broadcast_to(xp.asarray(self.known), number.shape[:1])
        place = len(known) - 1 - xp.argmax(known[::-1])
        return Last(number[place], known.any(0))

    def neutral(self) -> Last:
        """A number that is not known."""
        return Last(_zeros(self.number), jnp.zeros((), bool))

    def value(self) -> Values:
        """The number; if it is not known, NaN, or zero for whole numbers."""
        number, xp = _array(self.number), _module(self.number, self.known)
        if not jnp.issubdtype(number.dtype, jnp.inexact):
            return number
        return xp.where(self.known, number, xp.full_like(number, xp.nan))


class Every(NamedTuple):
    """Whether something was true in every step."""

    truth: Values

    def merged(self) -> Every:
        """True if all are true."""
        return Every(_array(self.truth).all(0))

    def neutral(self) -> Every:
        """True."""
        return Every(jnp.ones(np.shape(self.truth), bool))

    def value(self) -> Values:
        """The truth value."""
        return _array(self.truth)


# The kinds of averages, from which a step can be left out, and all kinds.
AVERAGES = (Mean, RootMean, Residual)
KINDS = (*AVERAGES, PerRow, Total, Largest, First, Last, Every)


def mean(values: Values) -> Mean:
    """The mean of an array's entries, for instance of one value per row; summed in at least float32."""
    values = _wide(values, jnp)
    return Mean(jnp.sum(values), jnp.full((), values.size, values.dtype))


def binned(values: Values, by: Values, bins: int) -> Mean:
    """Means by bins, with arrays ``[bins]``, summed in at least float32. An empty bin has a count of zero.

    Args:
      values: the numbers to average, ``[n]``.
      by: the numbers in [0, 1] that choose the bin of each value, ``[n]``.
      bins: the number of equal bins.
    """
    values, by = _wide(values, jnp), _wide(by, jnp)
    place = jnp.clip((by * bins).astype(jnp.int32), 0, bins - 1)
    empty = jnp.zeros((bins,), values.dtype)
    return Mean(empty.at[place].add(values), empty.at[place].add(1.0))


def as_reports(metrics: Mapping[str, Any]) -> dict[str, Report]:
    """Converts metrics to reports by name, whose numbers are jax arrays, floating-point ones in at least float32.

    A ``PerRow`` becomes the mean over the rows. A plain number or array becomes the mean over steps.

    Raises:
      TypeError: if a name is not a string, or a value is neither a report nor a number.
    """
    found: dict[str, Report] = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"metrics: expected names that are strings, got {name!r}")
        if isinstance(value, KINDS):
            plain = jax.tree.map(lambda leaf: jnp.asarray(leaf) if _is_list(leaf) else leaf, value, is_leaf=_is_list)
            value = jax.tree.map(lambda leaf, name=name: _number(name, leaf), plain, is_leaf=lambda leaf: leaf is None)
        elif isinstance(value, Report) and not isinstance(value, type):
            for leaf in jax.tree.leaves(value):
                _number(name, leaf)
        else:
            value = _number(name, value)
            value = value if jnp.issubdtype(value.dtype, jnp.inexact) else value.astype(jnp.float32)
            value = Mean(value, jnp.ones_like(value))
        found[name] = value.mean() if isinstance(value, PerRow) else value
    return found


def merged(metrics: Mapping[str, Report]) -> dict[str, Report]:
    """Merges the reports under each name, which are stacked along their leading axes."""
    return {name: report.merged() for name, report in metrics.items()}


def values(metrics: Mapping[str, Report]) -> dict[str, Values]:
    """The numbers to show, by name. The bins of a residual or a tangent are added as NAME_by_KEY, such as NAME_by_t."""
    shown = {}
    for name, report in metrics.items():
        shown[name] = report.value()
        if isinstance(report, Residual):
            shown |= {bins_name(name, key): bins for key, bins in report.bins().items()}
    return shown


def bins_name(name: str, key: str) -> str:
    """The name that ``values`` gives to the means of a report by bins of ``key``."""
    return f"{name}_by_{key}"


def leave_out(metrics: Mapping[str, Report], left_out: Values) -> dict[str, Report]:
    """The reports of one step; if ``left_out``, a scalar bool, is true, the averages among them become neutral."""

    def of(report: Report) -> Report:
        if not isinstance(report, AVERAGES):
            return report
        return jax.tree.map(lambda kept, empty: jnp.where(left_out, empty, kept), report, report.neutral())

    return {name: of(report) for name, report in metrics.items()}


def _number(name: str, value: Any) -> Values:
    """A number or an array of numbers as a jax array; floating-point ones in at least float32."""
    numeric = isinstance(value, (bool, int, float, np.generic, np.ndarray, jax.Array))
    if not numeric or not any(jnp.issubdtype(jnp.result_type(value), kind) for kind in (np.number, np.bool_)):
        raise TypeError(f"metrics: expected a report or a number under {name!r}, got {type(value).__name__}")
    array = jnp.asarray(value)
    return array.astype(trees.at_least_float32(array)) if jnp.issubdtype(array.dtype, jnp.inexact) else array


def _is_list(field: Any) -> bool:
    """Whether a field of a report is a plain list of numbers, which jax would take for a pytree."""
    return type(field) in (list, tuple)


def _module(*values: Values) -> ModuleType:
    """The module to compute with: jax.numpy if any value is a jax array, else numpy."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _array(value: Values) -> Values:
    """A jax array unchanged; anything else as a numpy array."""
    return value if isinstance(value, jax.Array) else np.asarray(value)


def _wide(value: Values, xp: ModuleType) -> Values:
    """A floating-point array of at least 32 bits; whole numbers and truth values become floats."""
    array = xp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return array.astype(np.float64 if xp is np else np.float32)
    return array.astype(trees.at_least_float32(array))


def _sum(value: Values) -> Values:
    """The sum over the leading axis, accumulated in at least float32."""
    array = _array(value)
    return (_wide(array, _module(array)) if jnp.issubdtype(array.dtype, jnp.inexact) else array).sum(0)


def _dtype(like: Values) -> Any:
    """The dtype of an array, of its shape alone (``jax.ShapeDtypeStruct``), or of a Python number."""
    return like.dtype if hasattr(like, "dtype") else jnp.result_type(np.asarray(like))


def _zeros(like: Values) -> Values:
    return jnp.zeros(np.shape(like), _dtype(like))


def _ratio(total: Values, count: Values) -> Values:
    xp = _module(total, count)
    total, count = _wide(total, xp), _wide(count, xp)
    count = count.astype(total.dtype)
    empty = count == 0
    return xp.where(empty, xp.full_like(total, xp.nan), total / xp.where(empty, xp.ones_like(count), count))
