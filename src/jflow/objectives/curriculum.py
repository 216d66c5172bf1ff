r"""Curricula: choices that change during training.

A schedule is a number, or a function ``step -> value`` such as optax's schedules. This module has the schedules of the
catalogue that optax lacks. Examples with optax::

    optax.linear_schedule(0.0, 0.99, 10_000)                                    # a tangent warm-up
    optax.exponential_decay(1.0, 1000, 0.5, staircase=True, end_value=0.01)     # a fraction halved every 1000 steps
    optax.exponential_decay(10, every, 2.0, staircase=True, end_value=1280)     # a doubling number of cells, 2310.14189

``times.ByStep`` changes a law of times with the step, and ``objectives.sequence`` the whole objective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jflow import checks
from jflow.types import Array

Schedule = float | Array | Callable[[Any], Any]


def value_at(schedule: Schedule, step: Array | int) -> Array:
    """Returns a schedule's value at a step, a floating-point scalar."""
    if not callable(schedule):
        return jnp.asarray(schedule, float)
    # Optax's arithmetic mixes integer steps with floats.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(schedule(jnp.asarray(step)), float)


def halving(first: int, every: int) -> Callable[[Array], Array]:
    r"""Returns the schedule of the number of cells in progressive distillation (2202.00512), halved every ``every`` steps.

    .. math::
        \max\left( \lfloor \mathrm{first} \cdot 2^{-k} \rfloor, 1 \right), \qquad
        k = \lfloor \mathrm{step}/\mathrm{every} \rfloor

    ``halvings(first, every)`` returns the steps at which it changes.

    Raises:
      ValueError: if ``first`` or ``every`` is not positive.
      TypeError: if ``first`` or ``every`` is not an integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow.objectives import curriculum
      >>> [int(curriculum.halving(8, every=100)(jnp.int32(step))) for step in (0, 100, 250)]
      [8, 4, 2]
    """
    checks.integer("first", first, low=1)
    checks.integer("every", every, low=1)
    most = first.bit_length()
    return lambda step: jnp.maximum(first // 2 ** jnp.minimum(step // every, most), 1)


def halvings(first: int, every: int) -> tuple[int, ...]:
    """Returns the steps at which ``halving(first, every)`` changes; at these steps the student becomes the teacher."""
    return tuple(every * (k + 1) for k in range(first.bit_length() - 1))


def falling_sigmoid(middle: float, width: float, least: float = 5e-3) -> Callable[[Array], Array]:
    r"""Returns the schedule of alpha in alpha-Flow (2510.20771): a sigmoid that falls with the step.

    .. math:: \max\left( \frac{1}{1 + e^{(\mathrm{step} - \mathrm{middle})/\mathrm{width}}}, \mathrm{least} \right)

    The value is 1 while the sigmoid is above 1 - least.

    Raises:
      ValueError: if ``width`` is not positive, ``least`` is outside (0, 0.5], or a number is not finite.
      TypeError: if an argument is not a number.
    """
    checks.number("middle", middle)
    checks.number("width", width, low=0.0, open_low=True)
    checks.number("least", least, low=0.0, high=0.5, open_low=True)

    def alpha(step: Array) -> Array:
        value = jax.nn.sigmoid((middle - jnp.asarray(step).astype(float)) / width)
        return jnp.where(value > 1.0 - least, 1.0, jnp.maximum(value, least))

    return alpha
