"""Functions of events as functions of flat vectors, with all columns of their Jacobians from one linearisation."""

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
    """A function f of events at a point x, and its derivative there; n is the number of entries of x.

    Attributes:
      value: f(x), an event.
      column: z -> J z of vectors ``[n]`` in the dtype below, J the Jacobian; in reverse mode z -> J'z.
      size: n.
      dtype: the widest of x, float32 at least: what is summed over columns keeps its digits.
    """

    value: Event
    column: Callable[[Array], Array]
    size: int
    dtype: jnp.dtype

    def columns(self) -> Array:
        """``[n, n]``, the transposed Jacobian: row i is J e_i. In reverse mode the Jacobian itself: row i is J'e_i."""
        return jax.vmap(self.column)(jnp.eye(self.size, dtype=self.dtype))


def flatten(x: Event) -> tuple[Array, Callable[[Array], Event]]:
    """The entries of an event as one vector, in the widest dtype of its leaves and float32 at least; and the way back."""
    x = jax.tree.map(jnp.asarray, x)
    dtype = trees.at_least_float32(x)
    flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(dtype), x))
    return flat, lambda vector: jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), unravel(vector), x)


def linearise(name: str, f: Callable[[Event], Event], x: Event, mode: Mode = "forward") -> Linear:
    """The ``Linear`` of f at x, by one call of f and, later, one pass of forward or reverse mode per column.

    Args:
      name: how messages call f(x).
      f: of events like x; shaped like its argument.
      x: a pytree of floating-point arrays.
      mode: "forward", or "reverse" for functions without forward-mode derivative; the columns are then those of J'.

    Raises:
      ValueError: if f(x) is not shaped like x, or for another mode.
      TypeError: if x or f(x) is not floating-point, or for a function without forward-mode derivative (the message names
        the alternatives).
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
