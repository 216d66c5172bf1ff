r"""Post-hoc EMA (2312.02696, section 3 and app. C): averages of any width, computed after training from a few stored ones.

The average of ``ema.power(g)`` after t updates of the optimizer is a sum over the parameters p_1, ..., p_t with the profile

.. math::

    w_k = \left(\frac{k}{t}\right)^{g + 1} - \left(\frac{k - 1}{t}\right)^{g + 1}, \qquad \sum_k w_k = 1.

For large t its standard deviation, relative to t, is the width

.. math::

    \sigma = \sqrt{\frac{g + 1}{(g + 2)^2 (g + 3)}}.

If the stored averages :math:`a_i` have the profiles :math:`w^i`, then :math:`\sum_i c_i a_i` is the average with the profile
:math:`\sum_i c_i w^i`. For a profile w that was not stored, the coefficients solve

.. math::

    \min_c \Big|\sum_i c_i w^i - w\Big|^2 \qquad \text{subject to} \quad \sum_i c_i = 1.

The paper has no constraint. With it, parameters that are constant over the run are reproduced exactly. As in the paper, the
inner products are those of the continuous profiles :math:`p(k) = (g + 1) k^g/t^{g + 1}` on [0, t]. With
:math:`m = \min(t_i, t_j)` they are

.. math::

    \langle p_i, p_j\rangle = \frac{(g_i + 1)(g_j + 1)}{(g_i + g_j + 1)\, m}
        \left(\frac{m}{t_i}\right)^{g_i + 1} \left(\frac{m}{t_j}\right)^{g_j + 1}.

The inner products of the discrete profiles give nearly the same fit: from 200 steps on, the errors of the fitted profiles
agree to four digits; at 20 steps they agree within 13 %.
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
# Singular values below this fraction of the largest are dropped; they would amplify rounding errors of the stored averages
# more than they improve the fit.
RCOND = 1e-12


class Fit(NamedTuple):
    """The coefficients with which to combine stored averages.

    Attributes:
      coefficients: [m], float64, in the order of the snapshots; their sum is 1.
      residual: ``|sum_i c_i w^i - w|/|w|``, the relative error of the profile. It is near 0 if the stored averages can
        reproduce the target, and near 1 if none resembles it.
    """

    coefficients: np.ndarray
    residual: float


def width_of_gamma(gamma: float) -> float:
    r"""The relative width of the profile of ``ema.power(g)``; 0.05 for g = 16.97.

    .. math::

        \sigma = \sqrt{\frac{g + 1}{(g + 2)^2 (g + 3)}}

    Raises:
      ValueError: if gamma is negative.
      TypeError: if it is not a number.

    Example:
      >>> from jflow.training import ema_posthoc
      >>> round(ema_posthoc.width_of_gamma(16.0), 4)
      0.0526
    """
    gamma = checks.number("gamma", gamma, low=0.0)
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


def gamma_of_width(width: float) -> float:
    r"""The exponent g of a relative width, the inverse of ``width_of_gamma``; 6.94 for a width of 0.1.

    It is the largest root of

    .. math::

        g^3 + 7 g^2 + (16 - \sigma^{-2})\, g + 12 - \sigma^{-2}.

    Args:
      width: sigma, in (0, sqrt(1/12)]. The widest profile, with g = 0, is the plain mean.

    Raises:
      ValueError: if the width is outside this range.
      TypeError: if the width is not a number.
    """
    inverse = checks.number("width", width, low=0.0, high=WIDEST, open_low=True) ** -2
    return max(0.0, float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max()))


def fit_profile(snapshots: Sequence[Snapshot], step: int, gamma: float) -> Fit:
    """The combination of stored averages whose profile is nearest to that of ``ema.power(gamma)`` after ``step`` steps.

    Args:
      snapshots: (step, gamma) of each stored average; their steps may be before or after the target's. A step is counted by
        the optimizer's updates.
      step: the target's number of steps, at least 1.
      gamma: the target's exponent (``gamma_of_width``).

    Returns:
      Fit.

    Raises:
      ValueError: if there are fewer than two snapshots, a snapshot occurs twice, or a number is out of range.
      TypeError: if a snapshot is not a pair, a step is not a whole number, or a gamma is not a number.
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
    # Write c = 1/m + N z, where the columns of N are an orthonormal basis of the vectors that sum to zero. The constraint
    # then holds for every z, and the minimum over z solves N^T G N z = N^T (target - G 1/m).
    count = len(snapshots)
    start = np.full(count, 1.0 / count)
    basis = np.linalg.svd(np.ones((1, count)))[2][1:].T
    z = np.linalg.lstsq(basis.T @ stored @ basis, basis.T @ (target - stored @ start), rcond=RCOND)[0]
    coefficients = start + basis @ z
    square = coefficients @ stored @ coefficients - 2.0 * (coefficients @ target) + norm
    return Fit(coefficients, math.sqrt(max(square, 0.0) / norm))


def combine(averages: Iterable[Params], coefficients: Sequence[float]) -> Params:
    """The combination sum_i c_i a_i of averages, in at least float32.

    Leaves that are not floating point are taken from the last average.

    Args:
      averages: pytrees of the same structure and shapes, as many as coefficients. They are read one by one, so a
        generator can load them from disk one at a time.
      coefficients: [m], from ``fit_profile``.

    Raises:
      ValueError: if there are no averages, their number is not that of the coefficients, or structures or shapes differ.
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
    """The inner products <p_i, p_j> of profiles (step, gamma), [m, m]."""
    t, g = np.asarray(profiles, np.float64).T
    shorter = np.minimum(t[:, None], t[None, :])
    # Powers of numbers up to one cannot overflow. Entry [i, j] is (m/t_i)^{g_i + 1}; its transpose has the factor of j.
    rows = (shorter / t[:, None]) ** (g + 1.0)[:, None]
    scale = (g + 1.0)[:, None] * (g + 1.0)[None, :] / (g[:, None] + g[None, :] + 1.0)
    return scale / shorter * rows * rows.T
