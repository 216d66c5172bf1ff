r"""Velocity estimates at the sampled points I_t of a batch, all with the conditional mean E[I_t' | I_t = x] = b_t(x).

    pair    I_t', the velocity of the sample's own pair
    batch   E[ I_t' | I_t = x, the data of the batch ]: the mean over which of the batch's data points made x
    teacher b_t(x) of a teacher: a checkpoint, someone's function, an oracle, a guided pair of networks

The second averages the first over an unknown that the network does not see either: the same expectation, hence the same
expected gradient, with a smaller variance. In few dimensions it is much smaller; on images each point is its own only
neighbour and the two agree. (A Rao-Blackwell form of the stable target field, 2302.00670, without its bias.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflow import bases, trees
from jflow.interpolants import Interpolant
from jflow.types import Array, Event


class Points(NamedTuple):
    """Where velocities are asked for.

    Attributes:
      interpolant: the path.
      t: times [n].
      x0: base points [n, ...].
      x1: data points [n, ...].
      data: all data points of the batch [B, ...].
      teacher: ``(t [n], x [n, ...]) -> b [n, ...]``, or None.
      base: the law of x0.
    """

    interpolant: Interpolant
    t: Array
    x0: Event
    x1: Event
    data: Event
    teacher: Callable[[Array, Event], Event] | None = None
    base: bases.Base = bases.STANDARD_NORMAL


Estimate = Callable[[Points], Event]


def pair(points: Points) -> Event:
    """I_t' of each pair, [n, ...] like x0."""
    return jax.vmap(points.interpolant.derivative)(points.t, points.x0, points.x1)


def teacher(points: Points) -> Event:
    """b_t(I_t) of the teacher, [n, ...] like x0.

    Raises:
      ValueError: when there is none.
    """
    if points.teacher is None:
        raise ValueError("velocity: expected a teacher (the objective's teacher, or context.teacher), got none")
    x = jax.vmap(points.interpolant.interpolate)(points.t, points.x0, points.x1)
    return points.teacher(points.t, x)


def batch(points: Points) -> Event:
    """The mean of I_t' over the data points of the batch, given the point: for a base N(m, diag(s^2)), with
    x = alpha x0 + beta x1,

        p_j ~ exp( -|(x - beta x1_j - alpha m)/s|^2 / (2 alpha^2) ),   I_t' + (w/alpha) ( sum_j p_j x1_j - x1 ).

    For base points that are independent of the data, and no conditioning: a coupling, or data that differ in kind, would
    change the probabilities. Where alpha < 1e-3 it is ``pair``, to which it tends.

    Raises:
      ValueError: for a base that is not a ``bases.Normal``, or does not fit an event.
    """
    interpolant, t, x0, x1, data, _, base = points
    base = bases.gaussian(base, "velocities.batch")

    def one(t_: Array, x0_: Event, x1_: Event) -> Event:
        c = interpolant.coefficients(t_)
        alpha = jnp.maximum(c.alpha, 1e-3)
        base_mean, std = base.moments(x0_)
        centred = trees.sub(x0_, base_mean)

        def log_weight(other: Event) -> Array:
            # x - beta x1_j - alpha m = alpha (x0 - m) + beta (x1 - x1_j)
            apart = trees.combine(c.alpha / alpha, centred, c.beta / alpha, trees.sub(x1_, other))
            return -0.5 * trees.sq_norm(jax.tree.map(jnp.divide, apart, std))

        weights = jax.nn.softmax(jax.vmap(log_weight)(data))
        mean = jax.tree.map(lambda leaf: jnp.tensordot(weights.astype(leaf.dtype), leaf, 1), data)
        excess = jnp.where(c.alpha < 1e-3, 0.0, c.w / alpha)
        return trees.axpy(excess, trees.sub(mean, x1_), interpolant.derivative(t_, x0_, x1_))

    return jax.vmap(one)(t, x0, x1)


VELOCITIES: dict[str, Estimate] = {"pair": pair, "batch": batch, "teacher": teacher}
