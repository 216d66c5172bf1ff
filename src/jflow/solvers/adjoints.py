"""How solves are differentiated: Diffrax's adjoints by name, and errors for the mode that an adjoint does not have.

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
    """Diffrax's adjoint of a name in ``ADJOINTS``, or the given one.

    A backward solve by ``BacksolveAdjoint`` that does not reach its end raises, unless the caller chose ``throw=False``:
    otherwise the gradient would be wrong without notice.
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
    """Whether ``jax.grad`` goes through a solve with this adjoint."""
    if isinstance(adjoint, str):
        return adjoint != "forward"
    import diffrax

    return not isinstance(adjoint, diffrax.ForwardMode)


def is_reverse_only(adjoint: diffrax.AbstractAdjoint) -> bool:
    """Whether the adjoint is a ``jax.custom_vjp``, which has no forward mode."""
    import diffrax

    return isinstance(adjoint, diffrax.RecursiveCheckpointAdjoint | diffrax.BacksolveAdjoint)


def batched_like(x: Event, args: PyTree) -> Event:
    """x with the same values, batched by ``jax.vmap`` wherever any leaf of ``args`` is.

    A part of the state that does not depend on the batch, such as the log-density of a linear flow, would otherwise be an
    output without the batch axis, and Diffrax's reverse rules would multiply its gradient by the batch size.
    """
    zero = jnp.zeros(())
    for leaf in jax.tree.leaves(args):
        if isinstance(leaf, jax.Array) and leaf.size and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            entry = leaf[(0,) * leaf.ndim]
            # Zero in both branches, so that a NaN does not spread; XLA removes it.
            zero = jnp.where(entry == entry, zero, jnp.zeros_like(zero))
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), x)


@contextlib.contextmanager
def explained(adjoint: diffrax.AbstractAdjoint) -> Iterator[None]:
    """Names the argument if an un-jitted ``jax.jvp`` meets a function without forward mode.

    Under ``jax.jit`` jax raises its own TypeError after the call, where it cannot be caught.

    Raises:
      TypeError: naming ``adjoint``, or ``velocity`` where the adjoint does have a forward mode.
    """
    try:
        yield
    except TypeError as error:
        # The error of a derivative within the velocity, such as a divergence, already names the alternatives.
        if "custom_vjp" not in str(error) or str(error).startswith(autodiff.MESSAGE[:40]):
            raise
        message = _NO_FORWARD.format(type(adjoint).__name__) if is_reverse_only(adjoint) else _REVERSE_ONLY_VELOCITY
        raise TypeError(message) from error


@jax.custom_jvp
def forward_only(x: Event) -> Event:
    """x, whose derivatives are those of the identity in forward mode and an error in reverse mode.

    The tangent passes through a linear solve of the identity, whose transpose raises. The compiled program contains nothing
    of it.

    Raises:
      ValueError: naming ``adjoint``, where a cotangent arrives.
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
    # Lineax's own rule would put a check, and its host callback, into the program.
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
