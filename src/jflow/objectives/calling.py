"""Calls an objective: creates its initial state, and checks what it returns."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from jflow import checks
from jflow.types import Array, Aux, Batch, Context, Key, ObjectiveFn, Params, PyTree, as_context

# The signature of an objective, for error messages.
CALL = "(params, key, batch, context) -> (loss [B], aux)"


def init(objective: ObjectiveFn, key: Key, params: Params) -> PyTree:
    """Returns an objective's initial state: the result of its ``init(key, params)``, or ``()`` if it has no such method.

    Raises:
      TypeError: if the objective is not a function, or the key is not a PRNG key.
    """
    checks.accepts("objective", objective, CALL, 4, model=False)
    checks.key("key", key)
    make = getattr(objective, "init", None)
    return () if make is None else make(key, params)


def call(objective: ObjectiveFn, params: Params, key: Key, batch: Batch, context: Context) -> tuple[Array, Aux]:
    """Calls an objective, and checks and returns its loss and its Aux.

    An objective may return a mapping of metrics instead of an Aux; its state then stays unchanged.

    Raises:
      TypeError: if the objective does not return a loss and an Aux or a mapping, or the key is not a PRNG key.
      ValueError: if the loss does not have rank one.
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
