"""Differentiation of solves: Diffrax's adjoints by name, and errors for modes that an adjoint does not support.

Diffrax and lineax are imported on first use.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jflow import autodiff
from jflow.types import Event, PyTree

if TYPE_CHECKING:
    import diffrax
    import lineax

ADJOINTS = ("forward", "direct", "recursive", "backsolve")

_NO_REVERSE = (
    "adjoint: this solve has no reverse mode (jax.grad, jax.vjp), got adjoint='forward', the default of adaptive solves; "
    "expected 'recursive' (jax.grad only) or 'direct' (both modes, with memory for max_steps steps), or fixed steps"
)
_NO_FORWARD = (
    "adjoint: this solve has no forward mode (jax.jvp, jax.jacfwd), got adjoint={}; expected 'forward' (jax.jvp only) or "
    "'direct' (both modes, with memory for max_steps steps), or fixed steps"
)
_REVERSE_ONLY_VELOCITY = (
    "velocity: expected a velocity that can be differentiated forward (jax.jvp), got one that calls a function with a "
    "reverse rule alone (jax.custom_vjp), as many fused kernels have; use jax.grad with adjoint='recursive', or another kernel"
)


def make(adjoint: str | diffrax.AbstractAdjoint) -> diffrax.AbstractAdjoint:
    """Converts a name in ``ADJOINTS`` to Diffrax's adjoint; an adjoint object is returned.

    If a backward solve of ``BacksolveAdjoint`` does not reach its end, it raises an error unless the caller chose
    ``throw=False``; otherwise the gradient would be silently wrong.
    """
    import diffrax

    classes: dict[str, Callable[[], diffrax.AbstractAdjoint]] = {
        "forward": diffrax.ForwardMode,
        "direct": diffrax.DirectAdjoint,
        "recursive": diffrax.RecursiveCheckpointAdjoint,
        "backsolve": diffrax.BacksolveAdjoint,
    }
    made = classes[adjoint]() if isinstance(adjoint, str) else adjoint
    if isinstance(made, diffrax.BacksolveAdjoint):
        return diffrax.BacksolveAdjoint(**{"throw": True, **made.kwargs})
    return made


def has_reverse(adjoint: str | diffrax.AbstractAdjoint) -> bool:
    """Returns whether ``jax.grad`` can differentiate a solve with this adjoint."""
    if isinstance(adjoint, str):
        return adjoint != "forward"
    import diffrax

    return not isinstance(adjoint, diffrax.ForwardMode)


def is_reverse_only(adjoint: diffrax.AbstractAdjoint) -> bool:
    """Returns whether the adjoint is a ``jax.custom_vjp``, which has no forward mode."""
    import diffrax

    return isinstance(adjoint, diffrax.RecursiveCheckpointAdjoint | diffrax.BacksolveAdjoint)


def batched_like(x: Event, args: PyTree) -> Event:
    """Returns x unchanged, but batched by ``jax.vmap`` if any leaf of ``args`` is batched.

    Otherwise a part of the state that does not depend on the batch, such as the log-density of a linear flow, would be an
    output without the batch axis, and Diffrax's reverse rules would multiply its gradient by the batch size.
    """
    zero = jnp.zeros(())
    for leaf in jax.tree.leaves(args):
        if isinstance(leaf, jax.Array) and leaf.size and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            entry = leaf[(0,) * leaf.ndim]
            # Both branches are zero, so a NaN in ``entry`` does not spread. XLA removes this operation.
            zero = jnp.where(entry == entry, zero, jnp.zeros_like(zero))
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), x)


@contextlib.contextmanager
def explained(adjoint: diffrax.AbstractAdjoint) -> Iterator[None]:
    """Replaces jax's error message if an un-jitted ``jax.jvp`` meets a function without forward mode.

    Under ``jax.jit``, jax raises its own TypeError after the call, where it cannot be caught.

    Raises:
      TypeError: if the adjoint has no forward mode (the message names ``adjoint``), or the velocity has none (the message
        names ``velocity``).
    """
    try:
        yield
    except TypeError as error:
        # The message for a derivative inside the velocity, such as a divergence, already names the alternatives.
        if "custom_vjp" not in str(error) or str(error).startswith(autodiff.MESSAGE[:40]):
            raise
        message = _NO_FORWARD.format(type(adjoint).__name__) if is_reverse_only(adjoint) else _REVERSE_ONLY_VELOCITY
        raise TypeError(message) from error


@jax.custom_jvp
def forward_only(x: Event) -> Event:
    """Returns x. Forward mode differentiates it as the identity, and reverse mode raises an error.

    The tangent passes through a linear solve with the identity, whose transpose raises the error. It adds nothing to the
    compiled program.

    Raises:
      ValueError: in reverse mode; the message names ``adjoint``.
    """
    return x


@forward_only.defjvp
def _(primals: tuple[Event], tangents: tuple[Event]) -> tuple[Event, Event]:
    return forward_only(*primals), _one_way(*tangents)


@jax.custom_jvp
def _one_way(tangent: Event) -> Event:
    import lineax

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tangent)
    operator = lineax.FunctionLinearOperator(_same, shapes)
    return lineax.linear_solve(operator, tangent, _identity_solver()(), throw=False).value


@_one_way.defjvp
def _(primals: tuple[Event], tangents: tuple[Event]) -> tuple[Event, Event]:
    # Lineax's own rule would add a check with a host callback to the program.
    return _one_way(*primals), _one_way(*tangents)


def _same(x: Event) -> Event:
    return x


@functools.cache
def _identity_solver() -> Callable[[], lineax.AbstractLinearSolver]:
    import lineax

    class IdentityForward(lineax.AbstractLinearSolver):
        def init(self, operator: lineax.AbstractLinearOperator, options: dict[str, Any]) -> None:
            return None

        def compute(
            self, state: None, vector: Event, options: dict[str, Any]
        ) -> tuple[Event, lineax.RESULTS, dict[str, Any]]:
            return vector, lineax.RESULTS.successful, {}

        def transpose(self, state: None, options: dict[str, Any]) -> tuple[None, dict[str, Any]]:
            raise ValueError(_NO_REVERSE)

        def conj(self, state: None, options: dict[str, Any]) -> tuple[None, dict[str, Any]]:
            return state, options

        def assume_full_rank(self) -> bool:
            return True

    return IdentityForward
