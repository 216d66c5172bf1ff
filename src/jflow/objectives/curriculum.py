r"""Curricula: choices that change with the step.

A schedule is a number, or a function ``step -> value`` such as optax's (``optax.linear_schedule(0.0, 0.99, 10_000)`` is a
tangent warm-up, ``optax.exponential_decay`` a shrinking gap); the ones below are those of the catalogue that optax lacks.
A law of times that changes is a ``times.ByStep``, and an objective that changes altogether a ``sequence``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jflow import checks
from jflow.types import Array, Batch, Context, Key, Params

Schedule = float | Array | Callable[[Array], Array]
ObjectiveFn = Callable[[Params, Key, Batch, Context], tuple[Array, dict[str, Any]]]


def value_at(schedule: Schedule, step: Array | int) -> Array:
    """A schedule's value at a step, a floating-point scalar."""
    if not callable(schedule):
        return jnp.asarray(schedule, float)
    # Optax's arithmetic mixes integer steps with floats.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(schedule(jnp.asarray(step)), float)


def doubling(first: int, last: int, every: int) -> Callable[[Array], Array]:
    """min(first 2^floor(step/every), last): the numbers of cells of improved consistency training (2310.14189).

    Raises:
      ValueError: when not 1 <= first <= last or ``every`` is not positive; TypeError when they are no whole numbers.
    """
    checks.integer("first", first, low=1)
    checks.integer("last", last, low=first)
    checks.integer("every", every, low=1)
    most = (last // first).bit_length()
    return lambda step: jnp.minimum(first * 2 ** jnp.minimum(step // every, most), last)


def halving(first: int, every: int) -> Callable[[Array], Array]:
    """max(first 2^-floor(step/every), 1), rounded down: the numbers of cells of progressive distillation (2202.00512).

    ``halvings(first, every)`` are the steps at which it changes.

    Raises:
      ValueError: when first or ``every`` is not positive; TypeError when they are no whole numbers.
    """
    checks.integer("first", first, low=1)
    checks.integer("every", every, low=1)
    most = first.bit_length()
    return lambda step: jnp.maximum(first // 2 ** jnp.minimum(step // every, most), 1)


def halvings(first: int, every: int) -> tuple[int, ...]:
    """The steps at which ``halving(first, every)`` changes, where the student becomes the teacher."""
    return tuple(every * (k + 1) for k in range(first.bit_length() - 1))


def shrinking(every: int, factor: float = 2.0, least: float = 0.0) -> Callable[[Array], Array]:
    """max(factor^-floor(step/every), least): the share of the remaining time in easy consistency tuning (2406.14548).

    Raises:
      ValueError: for a factor below one, ``every`` that is not positive, or ``least`` outside [0, 1].
    """
    checks.integer("every", every, low=1)
    checks.number("factor", factor, low=1.0)
    checks.number("least", least, low=0.0, high=1.0)
    return lambda step: jnp.maximum(jnp.asarray(factor) ** -(step // every).astype(float), least)


def falling_sigmoid(middle: float, width: float, least: float = 5e-3) -> Callable[[Array], Array]:
    """max(1 / (1 + e^{(step - middle)/width}), least), and 1 while it is above 1 - least: alpha of 2510.20771.

    Raises:
      ValueError: for a width that is not positive, or ``least`` outside (0, 0.5].
    """
    checks.number("middle", middle)
    checks.number("width", width, low=0.0, open_low=True)
    checks.number("least", least, low=0.0, high=0.5, open_low=True)

    def alpha(step: Array) -> Array:
        value = jax.nn.sigmoid((middle - jnp.asarray(step).astype(float)) / width)
        return jnp.where(value > 1.0 - least, 1.0, jnp.maximum(value, least))

    return alpha


def sequence(stages: Sequence[tuple[int, ObjectiveFn]]) -> ObjectiveFn:
    """The objective of the last stage whose first step has been reached: ``[(0, flow_matching), (2000, lsd)]``.

    Only the stage in force is computed (``jax.lax.switch`` on ``context.step``), so that a start on the diagonal alone
    costs what flow matching costs. Entries of ``info`` that a stage does not have are zero while it is in force.

    Raises:
      ValueError: when there is no stage, the first does not start at step 0, or the starts do not increase.
      TypeError: when a start is no whole number.
    """
    starts = [checks.integer("stages: first step", start) for start, _ in stages]
    if not starts or starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts)):
        raise ValueError(f"stages: expected first steps that increase from 0, got {starts}")
    if len(stages) == 1:
        return stages[0][1]

    def objective(
        params: Params, key: Key, batch: Batch, context: Context | None = None
    ) -> tuple[Array, dict[str, Any]]:
        context = Context() if context is None else context
        operands = (params, key, batch, context)
        outputs = [jax.eval_shape(stage, *operands) for _, stage in stages]
        union = {name: leaf for _, info in outputs for name, leaf in info.items()}
        width = outputs[0][0].dtype

        def branch(stage: ObjectiveFn) -> Callable[..., tuple[Array, dict[str, Any]]]:
            def padded(*operands: Any) -> tuple[Array, dict[str, Any]]:
                loss, info = stage(*operands)
                absent = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in union.items() if name not in info}
                return loss.astype(width), {**info, **absent}

            return padded

        index = jnp.sum(jnp.asarray(context.step) >= jnp.asarray(starts, jnp.int32)[1:])
        return jax.lax.switch(index, [branch(stage) for _, stage in stages], *operands)

    return objective
