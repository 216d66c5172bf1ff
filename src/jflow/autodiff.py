"""Forward-mode differentiation, with an error that names the alternatives if a kernel has only a reverse-mode rule.

Fused attention (cuDNN, every Pallas kernel shipped with jax) defines its gradient with ``jax.custom_vjp``, which
``jax.jvp`` cannot differentiate. jax raises an error only when the program is compiled or run, outside the function that
requested the derivative. The functions of this module therefore trace the derivative and look for the missing rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.extend.core
import jax.numpy as jnp

Out = TypeVar("Out")
PyTree = Any
# The primitive that jax traces in place of the missing forward-mode rule of a jax.custom_vjp function.
MISSING_RULE = "custom_lin"
# Parts of the error messages of jax, equinox and diffrax for a missing forward mode.
REFUSALS = ("custom_vjp", "custom_lin", "forward-mode", "JVP", "Differentiation rule for")
MESSAGE = (
    "forward mode: the function has no forward-mode derivative (a kernel with a reverse rule alone, jax.custom_vjp, as "
    "cuDNN and Pallas attention have, or a solve whose adjoint has none). Pass "
    "derivative=identities.central_difference(step) to a residual or an objective, mode='reverse' to an estimate of the "
    "divergence, adjoint='direct' or 'forward' to a solve, or give the network a kernel in plain jax "
    "(jax.nn.dot_product_attention(..., implementation='xla'))"
)


def jvp(function: Callable[..., Out], primals: tuple, tangents: tuple) -> tuple[Out, Out]:
    """Computes the value of ``function`` and its directional derivative, like ``jax.jvp``.

    Args:
      function: a function of the primals; inputs and outputs are pytrees of arrays.
      primals: the point at which to differentiate.
      tangents: the direction, shaped like the primals.

    Returns:
      (value, derivative).

    Raises:
      TypeError: if the function has no forward-mode derivative. The message names the alternatives.
    """
    with _refused():
        traced, out = jax.make_jaxpr(lambda p, t: jax.jvp(function, p, t), return_shape=True)(primals, tangents)
    _check(traced)
    leaves = jax.extend.core.jaxpr_as_fun(traced)(*map(jnp.asarray, jax.tree.leaves((primals, tangents))))
    return jax.tree.unflatten(jax.tree.structure(out), leaves)


def linearize(function: Callable[..., Out], *primals: PyTree) -> tuple[Out, Callable[..., Out]]:
    """Computes the value of ``function`` and its derivative as a linear function of the tangents, like ``jax.linearize``.

    Raises:
      TypeError: if the function has no forward-mode derivative. The message names the alternatives.
    """
    with _refused():
        value, linear = jax.linearize(function, *primals)
        _check(jax.make_jaxpr(linear)(*jax.tree.map(jnp.zeros_like, primals)))
    return value, linear


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Replaces the error message for a missing forward-mode derivative."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        if str(error) == MESSAGE or not any(part in str(error) for part in REFUSALS):
            raise
        raise TypeError(MESSAGE) from error


def _check(traced: jax.extend.core.ClosedJaxpr) -> None:
    if MISSING_RULE in set(_operations(traced.jaxpr)):
        raise TypeError(MESSAGE)


def _operations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[str]:
    """Yields the names of all primitives, including those of inner functions (loops, jit, remat)."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda node: hasattr(node, "eqns")):
            if hasattr(inner, "eqns"):
                yield from _operations(getattr(inner, "jaxpr", inner))
