"""Calls any objective: makes its state before the first step, and checks what it returns."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from jflow import checks
from jflow.types import Array, Aux, Batch, Context, Key, ObjectiveFn, Params, PyTree, as_context

# The signature of an objective, for messages.
CALL = "(params, key, batch, context) -> (loss [B], aux)"


def init(objective: ObjectiveFn, key: Key, params: Params) -> PyTree:
    """The state of an objective before the first step: the result of its ``init(key, params)``, or ``()`` if it has none.

    Raises:
      TypeError: for an objective that is not a function, or a key that is not a PRNG key.
    """
    checks.accepts("objective", objective, CALL, 4, model=False)
    checks.key("key", key)
    make = getattr(objective, "init", None)
    return () if make is None else make(key, params)


def call(objective: ObjectiveFn, params: Params, key: Key, batch: Batch, context: Context) -> tuple[Array, Aux]:
    """The loss and the Aux of an objective, checked.

    An objective may return a mapping of metrics in place of an Aux; its state then stays as it was.

    Raises:
      TypeError: for anything but a loss and an Aux or a mapping, or a key that is not a PRNG key.
      ValueError: for a loss that is not of rank one.
    """
    checks.key("key", key)
    context = as_context(context)
    found = objective(params, key, batch, context)
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], (Aux, Mapping))):
        raise TypeError(
            "objective: expected it to return (loss [B], Aux) or (loss [B], a mapping of metrics), got "
            f"{type(found).__name__}"
        )
    loss, aux = found
    if jnp.ndim(loss) != 1:
        raise ValueError(f"objective: expected a loss of shape [B], got {jnp.shape(loss)}")
    return loss, aux if isinstance(aux, Aux) else Aux(context.state, dict(aux))
