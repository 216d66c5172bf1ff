r"""Velocity estimates at a row's point I_s, all with the conditional mean E[I_s' | I_s = x] = b_s(x).

The estimates::

    pair    I_s', the velocity of the row's own pair
    batch   E[ I_s' | I_s = x, the data of the batch ]: the mean over which of the batch's data points made x
    teacher b_s(x) of a teacher: a checkpoint, someone's function, an oracle, a guided pair of networks

The second averages the first over an unknown that the network does not see either: the same expectation, hence the same
expected gradient, with a smaller variance. In few dimensions it is much smaller; on images each point is its own only
neighbour and the two agree. (A Rao-Blackwell form of the stable target field, 2302.00670, without its bias.)

An estimate of your own is a function of the row (``objectives.Row``), shaped like x::

    null = jnp.asarray(10)  # the condition of one sample that stands for none: here the label after the ten classes

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
    """I_s' of the row's own pair, shaped like x."""
    return row.interpolant.derivative(row.s, row.x0, row.x1)


def teacher(row: Row) -> Event:
    """b_s(x) of the teacher, shaped like x.

    Raises:
      ValueError: when there is none.
    """
    return row.leg("teacher").velocity(row.s, row.x)


def batch(row: Row) -> Event:
    """The mean of I_s' over the data points of the batch, given the point: for a base N(m, diag(sigma^2)), with
    x = alpha x0 + beta x1::

        p_j ~ exp( -|(x - beta x1_j - alpha m)/sigma|^2 / (2 alpha^2) ),   I_s' + (w/alpha) ( sum_j p_j x1_j - x1 ).

    For base points that are independent of the data, and no conditioning: a coupling, or data that differ in kind, would
    change the probabilities. Where alpha < 1e-3 it is ``pair``, to which it tends.

    Raises:
      ValueError: for a base that is not a ``bases.Normal``, or does not fit an event.
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
