"""Distances between the features of two sets of samples, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, metrics, trees
from jflow.types import Array, Event

# (x, y) -> the distance between two sets of features, [n, d] and [m, d].
DistanceFn = Callable[[Array, Array], metrics.Estimate | Array | np.ndarray]
# Samples [N, ...] (a pytree of such) -> [N, d].
Features = Callable[[Event], Array]


class Distance(NamedTuple):
    """A distance between two sets of samples.

    Attributes:
      value: the distance; NaN if a sample is not finite.
      standard_error: its standard error, or None if the distance has none.
    """

    value: float
    standard_error: float | None = None


def _sliced_wasserstein(x: Array, y: Array) -> Array:
    # Use the same directions for every row of a table.
    return metrics.sliced_wasserstein(jax.random.key(0), x, y)


DISTANCES: dict[str, DistanceFn] = {
    "energy": metrics.energy_distance,
    "mmd": metrics.mmd,
    "kernel": metrics.kernel_distance,
    "frechet": metrics.frechet_distance,
    "sliced_wasserstein": _sliced_wasserstein,
}


def chosen(distances: Sequence[str] | Mapping[str, DistanceFn]) -> dict[str, DistanceFn]:
    """The distances by name, from a sequence of names in ``DISTANCES`` or a mapping of names to functions.

    Raises:
      ValueError: if a name is not in ``DISTANCES``.
      TypeError: if ``distances`` is a string, or a value is not a function.
    """
    if isinstance(distances, str):
        raise TypeError(f"distances: expected a sequence of names or functions by name, got the string {distances!r}")
    if not isinstance(distances, Mapping):
        return {checks.choice("distances", name, tuple(DISTANCES)): DISTANCES[name] for name in distances}
    for name, function in distances.items():
        checks.function(f"distances[{name!r}]", function, "(x, y) -> distance")
    return dict(distances)


def flatten(samples: Event) -> Array:
    """The default features: all leaves of a sample, concatenated to one row, ``[N, d]``."""
    dtype = trees.at_least_float32(samples)
    leaves = [jnp.reshape(leaf, (leaf.shape[0], -1)).astype(dtype) for leaf in jax.tree.leaves(samples)]
    return jnp.concatenate(leaves, axis=1)


def measured(distances: Mapping[str, DistanceFn], x: Array, y: Array) -> dict[str, Distance]:
    """All distances between features x, ``[n, d]``, and y, ``[m, d]``; NaN if a feature of x is not finite."""
    # The functions of metrics reject samples that are not finite, but one failed solve must not stop the comparison.
    if not np.isfinite(np.asarray(x, np.float64)).all():
        return {name: Distance(np.nan) for name in distances}
    found = {}
    for name, function in distances.items():
        result = function(x, y)
        is_estimate = isinstance(result, metrics.Estimate)
        value, error = result if is_estimate else (result, None)
        found[name] = Distance(float(value), None if error is None else float(error))
    return found
