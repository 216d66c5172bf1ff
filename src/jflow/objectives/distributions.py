r"""Losses on distributions of samples: no teacher, no derivative, and no pair of the batch that must match another.

x = X_{s,t}(I_s) with law q is compared with y = I_t with law p over groups of M samples (``objectives.group``).
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
    r"""2 E|x - y| - E|x - x'| - E|y - y'|: the squared energy distance between X_{s,t}(I_s) and I_t (Székely & Rizzo 2013).

    Unbiased for any M >= 2: all three means leave out i = j, the first since x_i and y_i come from the same pair. It is zero
    in expectation exactly where the two laws are equal, and a value may be negative. Cost: 3 passes a sample, and M^2
    distances a group.

    Args:
      flow_map: the map that is trained.
      interpolant: the path.
      size: M, the samples of a group, at least 2.
      **choices: ``pairs`` and ``coupling``, as in ``GroupObjective``. One jump from noise is
        ``pairs=times.independent(times.constant(0.0), times.constant(1.0))``.
    """

    def loss(group: Group) -> Array:
        return squared_energy_distance(group.jumps(), group.y)

    return GroupObjective("energy", flow_map, interpolant, loss, size, **choices)


def squared_energy_distance(x: Event, y: Event) -> Array:
    r"""[ 2 sum |x_i - y_j| - sum |x_i - x_j| - sum |y_i - y_j| ] / (M (M - 1)), sums over i != j; a scalar.

    The unbiased estimate for pairs (x_i, y_i) that are independent of one another, while x_i and y_i need not be.

    Args:
      x: samples, leaves ``[M, ...]``.
      y: samples of the same structure and shapes.

    Raises:
      ValueError: for less than two samples, or x and y that differ in structure or shape.
    """
    checks.same_structure("x", x, "y", y)
    count = checks.rows("x", x)
    if count < 2:
        raise ValueError(f"x: expected at least two samples, got {count}")
    total = 2.0 * _distances(x, y) - _distances(x, x) - _distances(y, y)
    return total / (count * (count - 1))


def _distances(a: Event, b: Event) -> Array:
    """The sum of |a_i - b_j| over i != j; the gradient of a distance of zero is taken as zero."""
    square = jax.vmap(lambda one: jax.vmap(lambda other: trees.sq_norm(trees.sub(one, other)))(b))(a)
    apart = ~jnp.eye(len(square), dtype=bool) & (square > 0.0)
    return jnp.sum(jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0))
