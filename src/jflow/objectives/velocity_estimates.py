r"""Velocity estimates at a row's point x = I_s.

Given I_s = x, the mean of each estimate is the velocity b_s(x):

- ``pair`` is :math:`\dot I_s`, the velocity of the row's own pair.
- ``batch`` is :math:`\mathbb{E}[\dot I_s \mid I_s = x]` given the data of the batch: the mean over the data points of the
  batch that could have produced x.
- ``teacher`` is :math:`b_s(x)` of a teacher: a checkpoint, any function, an oracle, or a guided pair of networks.

``batch`` has the same expectation as ``pair``, hence the same expected gradient, with a smaller variance. The variance is
much smaller in few dimensions. On images, only the row's own data point has a notable probability, and the two agree.
(``batch`` is a Rao-Blackwell form of the stable target field, 2302.00670, without its bias.)

A custom estimate is a function of the row (``objectives.Row``) that returns a velocity shaped like x::

    null = jnp.asarray(10)  # the condition that means "unconditional"; here the label after the ten classes

    def guided(row):  # a target guided by the map's own two velocities
        towards, away = row.frozen, row.frozen._replace(cond=null)
        return trees.axpy(w - 1.0, trees.sub(towards.velocity(row.s, row.x), away.velocity(row.s, row.x)), pair(row))
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jflow import bases, trees
from jflow.objectives.row import Estimate, Row
from jflow.types import Array, Event


def pair(row: Row) -> Event:
    r"""Returns :math:`\dot I_s`, the velocity of the row's own pair, shaped like x."""
    return row.interpolant.derivative(row.s, row.x0, row.x1)


def teacher(row: Row) -> Event:
    """Returns b_s(x) of the teacher, shaped like x.

    Raises:
      ValueError: if there is no teacher.
    """
    return row.leg("teacher").velocity(row.s, row.x)


def batch(row: Row) -> Event:
    r"""Returns the mean velocity of the pairs of the batch's data points that pass through x, shaped like x.

    For :math:`x = \alpha x_0 + \beta x_1` and a base :math:`N(m, \mathrm{diag}(\sigma^2))`, the data point j of the batch has
    the probability p_j given x, and the estimate is

    .. math::
        & \dot I_s + \frac{w}{\alpha} \Big( \sum_j p_j\, x_1^{(j)} - x_1 \Big), \quad w = \alpha \dot\beta - \dot\alpha \beta \\
        & p_j \propto \exp\left( -\frac{1}{2 \alpha^2} \left| \frac{x - \beta x_1^{(j)} - \alpha m}{\sigma} \right|^2 \right).

    It is valid only for base points that are independent of the data, without conditioning. Where alpha < 1e-3 it is replaced
    by ``pair``, its limit.

    Raises:
      ValueError: if the base is not a ``bases.Normal``, or does not fit an event.
    """
    c = row.interpolant.coefficients(row.s)
    alpha = jnp.maximum(c.alpha, 1e-3)
    base_mean, std = bases.gaussian(row.base, "velocity_estimates.batch").moments(row.x0)
    centred = trees.sub(row.x0, base_mean)

    def log_weight(other: Event) -> Array:
        # x - beta x1_j - alpha m = alpha (x0 - m) + beta (x1 - x1_j)
        apart = trees.combine(c.alpha / alpha, centred, c.beta / alpha, trees.sub(row.x1, other))
        return -0.5 * trees.sq_norm(jax.tree.map(jnp.divide, apart, std))

    weights = jax.nn.softmax(jax.vmap(log_weight)(row.data))
    mean = jax.tree.map(lambda leaf: jnp.tensordot(weights.astype(leaf.dtype), leaf, 1), row.data)
    excess = jnp.where(c.alpha < 1e-3, 0.0, c.w / alpha)
    return trees.axpy(excess, trees.sub(mean, row.x1), pair(row))


ESTIMATES: dict[str, Estimate] = {"pair": pair, "batch": batch, "teacher": teacher}
