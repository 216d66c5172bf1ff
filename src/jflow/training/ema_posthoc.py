r"""Averages of any length, made after training from a few that were stored (post-hoc EMA, 2312.02696, section 3 and app. C).

The average of ``ema.power(g)`` after t updates of the optimizer (steps, unless several make one update) is a sum over the
parameters p_1, ..., p_t with the profile::

    w_k = (k/t)^{g + 1} - ((k - 1)/t)^{g + 1},        sum_k w_k = 1,

whose standard deviation, relative to t, is the width sigma = sqrt((g + 1)/((g + 2)^2 (g + 3))) (for many steps). Of stored
averages a_i with the profiles w^i, sum_i c_i a_i is the average with the profile sum_i c_i w^i. The coefficients of a
profile w that was not stored are those that::

    minimise |sum_i c_i w^i - w|^2        with  sum_i c_i = 1.

The paper has no constraint; with it, what the parameters have in common all along comes out unchanged. As in the paper the
inner products are those of the continuous profiles p(k) = (g + 1) k^g/t^{g + 1} on [0, t]: with m = min(t_i, t_j)::

    <p_i, p_j> = (g_i + 1)(g_j + 1)/(g_i + g_j + 1)/m (m/t_i)^{g_i + 1} (m/t_j)^{g_j + 1}.

Those of the sums give the same fit: from 200 steps on the error of the profile agrees to four digits, at 20 within 13 %.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.training import ema
from jflow.types import Array, Params

Snapshot = tuple[int, float]

WIDEST = math.sqrt(1.0 / 12.0)
# Directions of the profiles' span shorter than this, relative to the longest, are left out: they would bring more
# rounding error of the stored averages than fit.
RCOND = 1e-12


class Fit(NamedTuple):
    """How to combine stored averages.

    Attributes:
      coefficients: [m], float64, in the order of the snapshots; their sum is 1.
      residual: ``|sum_i c_i w^i - w|/|w|``, the relative error of the profile: near 0 where the target can be reached, near 1
        where nothing like it was stored.
    """

    coefficients: np.ndarray
    residual: float


def width_of_gamma(gamma: float) -> float:
    """The relative width sqrt((g + 1)/((g + 2)^2 (g + 3))) of the profile of ``ema.power(g)``: 0.05 for g = 16.97.

    Raises:
      ValueError: when gamma is negative; TypeError if it is not a number.

    Example:
      >>> from jflow.training import ema_posthoc
      >>> round(ema_posthoc.width_of_gamma(16.0), 4)
      0.0526
    """
    gamma = checks.number("gamma", gamma, low=0.0)
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


def gamma_of_width(width: float) -> float:
    """The exponent g of a relative width, the inverse of ``width_of_gamma``: 6.94 for 0.1.

    It is the largest root of g^3 + 7 g^2 + (16 - width^-2) g + 12 - width^-2.

    Args:
      width: in (0, sqrt(1/12)]; the widest profile, with g = 0, is the plain mean.

    Raises:
      ValueError: when it is outside; TypeError if it is not a number.
    """
    inverse = checks.number("width", width, low=0.0, high=WIDEST, open_low=True) ** -2
    return max(0.0, float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max()))


def fit_profile(snapshots: Sequence[Snapshot], step: int, gamma: float) -> Fit:
    """The combination of stored averages whose profile is nearest to that of ``ema.power(gamma)`` after ``step`` steps.

    Args:
      snapshots: (step, gamma) of each stored average; their steps may lie on both sides of the target's.
      step: the target's number of steps, at least 1.
      gamma: the target's exponent (``gamma_of_width``).

    Returns:
      Fit.

    Raises:
      ValueError: for less than two snapshots, one that comes twice, or numbers out of range; TypeError for no numbers.
    """
    checks.integer("step", step, low=1)
    checks.number("gamma", gamma, low=0.0)
    if any(not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2 for pair in snapshots):
        raise TypeError(f"snapshots: expected pairs (step, gamma), got {snapshots!r}")
    snapshots = [
        (checks.integer("snapshots: step", at, low=1), checks.number("snapshots: gamma", g, low=0.0))
        for at, g in snapshots
    ]
    if len(snapshots) < 2:
        raise ValueError(f"snapshots: expected at least two stored averages to combine, got {len(snapshots)}")
    if len(set(snapshots)) < len(snapshots):
        twice = sorted({snapshot for snapshot in snapshots if snapshots.count(snapshot) > 1})
        raise ValueError(f"snapshots: expected each (step, gamma) once, got more of {twice}")

    gram = _inner_products([*snapshots, (int(step), float(gamma))])
    stored, target, norm = gram[:-1, :-1], gram[:-1, -1], gram[-1, -1]
    # With c = 1/m + N z, the columns of N an orthonormal basis of the vectors that sum to zero, the constraint holds for
    # every z, and the minimum over z is N^T G N z = N^T (target - G/m).
    count = len(snapshots)
    start = np.full(count, 1.0 / count)
    basis = np.linalg.svd(np.ones((1, count)))[2][1:].T
    z = np.linalg.lstsq(basis.T @ stored @ basis, basis.T @ (target - stored @ start), rcond=RCOND)[0]
    coefficients = start + basis @ z
    square = coefficients @ stored @ coefficients - 2.0 * (coefficients @ target) + norm
    return Fit(coefficients, math.sqrt(max(square, 0.0) / norm))


def combine(averages: Iterable[Params], coefficients: Sequence[float]) -> Params:
    """sum_i c_i a_i, leaf by leaf, in at least float32; leaves that are no floats are those of the last average.

    Args:
      averages: pytrees of the same structure and shapes, as many as coefficients. They are taken one by one, so a
        generator that reads them from disk holds one at a time.
      coefficients: [m], from ``fit_profile``.

    Raises:
      ValueError: when the number, a structure or a shape differs.
    """
    total = None
    for average, coefficient in itertools.zip_longest(averages, coefficients):
        if average is None or coefficient is None:
            raise ValueError("averages, coefficients: expected as many of the one as of the other")
        scaled = jax.tree.map(lambda a, c=float(coefficient): _scaled(ema.widen(a), c), average)
        if total is not None:
            checks.same_structure("averages", scaled, "the first", total)
        total = scaled if total is None else jax.tree.map(_plus, total, scaled)
    if total is None:
        raise ValueError("averages: expected at least one, got none")
    return total


def _scaled(a: Array, coefficient: float) -> Array:
    return a * jnp.asarray(coefficient, a.dtype) if jnp.issubdtype(a.dtype, jnp.inexact) else a


def _plus(total: Array, a: Array) -> Array:
    return total + a if jnp.issubdtype(a.dtype, jnp.inexact) else a


def _inner_products(profiles: Sequence[Snapshot]) -> np.ndarray:
    """<p_i, p_j> for all pairs [m, m] of profiles (step, gamma)."""
    t, g = np.asarray(profiles, np.float64).T
    shorter = np.minimum(t[:, None], t[None, :])
    # Powers of numbers up to one, which cannot overflow; exponents belong to rows, then to columns.
    rows = (shorter / t[:, None]) ** (g + 1.0)[:, None]
    scale = (g + 1.0)[:, None] * (g + 1.0)[None, :] / (g[:, None] + g[None, :] + 1.0)
    return scale / shorter * rows * rows.T
