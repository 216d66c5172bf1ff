"""Curricula: an objective that changes with the step, as an objective."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jflow import checks
from jflow.types import Array, Batch, Context, Key, Params

ObjectiveFn = Callable[[Params, Key, Batch, Context], tuple[Array, dict[str, Any]]]


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
