r"""Losses that compare distributions of samples. They need no teacher and no derivative.

The loss compares the law of x = X_{s,t}(I_s) with that of y = I_t, over groups of M samples (``objectives.group``).
"""

from __future__ import annotations

from typing import Unpack

import jax
import jax.numpy as jnp

from jflow import checks, trees
from jflow.interpolants import Interpolant
from jflow.objectives.group import Group, GroupChoices, GroupObjective
from jflow.types import Array, Event, FlowMap


def energy_distance(
    flow_map: FlowMap, interpolant: Interpolant, *, size: int, **choices: Unpack[GroupChoices]
) -> GroupObjective:
    r"""Makes the objective of the squared energy distance (Székely & Rizzo 2013).

    The distance between the laws of x = X_{s,t}(I_s) and y = I_t, where x' and y' are independent copies, is

    .. math:: 2\, \mathbb{E}|x - y| - \mathbb{E}|x - x'| - \mathbb{E}|y - y'|.

    The estimate is unbiased for any M >= 2: all three means omit i = j, the first because x_i and y_i come from the
    same pair. Its expectation is zero if and only if the two laws are equal. A single estimate may be negative. Cost: 3
    passes per sample, and M^2 distances per group.

    The rows of a group must share a class, as ``datasets.grouped`` arranges. One jump from noise to two classes::

        import jax, jax.numpy as jnp
        from jflow import datasets, interpolants, objectives, times, types

        def mean_velocity(params, s, t, x, cond=None, *, key=None):
            return params[cond] - x

        data = types.Batch(x1=jnp.array([[1.0], [1.2], [-1.0], [-1.3]]), cond=jnp.array([0, 0, 1, 1]))
        dataset = datasets.grouped(data, batch_size=8, size=4)
        objective = objectives.energy_distance(
            types.FlowMap(mean_velocity),
            interpolants.linear(),
            size=4,
            pairs=times.independent(times.constant(0.0), times.constant(1.0)),
        )
        batch = dataset.batch(dataset.data, jnp.int32(0))
        loss, aux = objective(jnp.zeros((2, 1)), jax.random.key(0), batch)

    Args:
      flow_map: the map that is trained.
      interpolant: the path.
      size: M, the number of samples in a group, at least 2.
      **choices: ``pairs``, ``base`` and ``coupling``, as in ``GroupObjective``.

    Returns:
      The objective.

    Raises:
      ValueError, TypeError: as documented in ``GroupObjective``.
    """

    def loss(group: Group) -> Array:
        return squared_energy_distance(group.jumps(), group.y)

    return GroupObjective("energy", flow_map, interpolant, loss, size, **choices)


def squared_energy_distance(x: Event, y: Event) -> Array:
    r"""Estimates the squared energy distance between the laws of x and y.

    .. math:: \frac{1}{M (M - 1)} \sum_{i \neq j} \left( 2 |x_i - y_j| - |x_i - x_j| - |y_i - y_j| \right)

    The estimate is unbiased if the pairs (x_i, y_i) are independent of each other; within a pair, x_i and y_i may depend on
    each other.

    Args:
      x: samples, leaves ``[M, ...]``.
      y: samples of the same structure and shapes.

    Returns:
      The estimate, a scalar.

    Raises:
      ValueError: if there are fewer than two samples, or x and y differ in structure or shape.
    """
    checks.same_structure("x", x, "y", y)
    count = checks.rows("x", x)
    if count < 2:
        raise ValueError(f"x: expected at least two samples, got {count}")
    total = 2.0 * _distances(x, y) - _distances(x, x) - _distances(y, y)
    return total / (count * (count - 1))


def _distances(a: Event, b: Event) -> Array:
    """Returns the sum of ``|a_i - b_j|`` over i != j. The gradient of a zero distance is defined as zero."""
    square = jax.vmap(lambda one: jax.vmap(lambda other: trees.sq_norm(trees.sub(one, other)))(b))(a)
    apart = ~jnp.eye(len(square), dtype=bool) & (square > 0.0)
    return jnp.sum(jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0))
