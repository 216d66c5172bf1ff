"""The Jacobian of a function of events, as a function of flat vectors, from one linearisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jflow import autodiff, checks, trees
from jflow.types import Array, Event

Mode = Literal["forward", "reverse"]


class Linear(NamedTuple):
    """The value and the derivative of a function f of events at a point x with n entries.

    Attributes:
      value: f(x), an event.
      column: z -> J z for vectors ``[n]`` of ``dtype``, where J is the Jacobian; in reverse mode z -> J'z.
      size: n.
      dtype: the widest dtype of x, and at least float32, so that sums over columns are precise.
    """

    value: Event
    column: Callable[[Array], Array]
    size: int
    dtype: jnp.dtype

    def columns(self) -> Array:
        """The transposed Jacobian, ``[n, n]``, whose row i is J e_i; in reverse mode the Jacobian, whose row i is J'e_i."""
        return jax.vmap(self.column)(jnp.eye(self.size, dtype=self.dtype))


def flatten(x: Event) -> tuple[Array, Callable[[Array], Event]]:
    """The entries of an event as one vector, in the widest dtype and at least float32, and the inverse of this function."""
    x = jax.tree.map(jnp.asarray, x)
    dtype = trees.at_least_float32(x)
    flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(dtype), x))
    return flat, lambda vector: jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), unravel(vector), x)


def linearise(name: str, f: Callable[[Event], Event], x: Event, mode: Mode = "forward") -> Linear:
    """Linearises f at x, with one call of f; each later column costs one pass in forward or reverse mode.

    Args:
      name: the name of f(x) in error messages.
      f: a function of events like x, with an output shaped like its argument.
      x: a pytree of floating-point arrays.
      mode: "forward", or "reverse" for functions without a derivative in forward mode. The columns are then those of J'.

    Raises:
      ValueError: if f(x) is not shaped like x, or the mode is unknown.
      TypeError: if x or f(x) is not floating-point, or f has no derivative in forward mode (the message names the
        alternatives).
    """
    checks.floating("x", x)
    checks.choice("mode", mode, ("forward", "reverse"))
    x = jax.tree.map(jnp.asarray, x)
    flat, unflatten = flatten(x)

    def checked(x: Event) -> Event:
        return checks.output(name, f(x), x)

    if mode == "forward":
        value, linear = autodiff.linearize(checked, x)
    else:
        value, back = jax.vjp(checked, x)

        def linear(z: Event) -> Event:
            return back(z)[0]

    return Linear(value, lambda z: flatten(linear(unflatten(z)))[0].astype(flat.dtype), flat.size, flat.dtype)
