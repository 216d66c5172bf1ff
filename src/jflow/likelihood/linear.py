"""Functions of events as functions of flat vectors, with all columns of their Jacobians from one linearisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jflow import checks, trees
from jflow.types import Array, Event


class Linear(NamedTuple):
    """A function f of events at a point x, and its derivative there; n is the number of entries of x.

    Attributes:
      value: f(x), an event.
      column: z -> J z of vectors ``[n]`` in the dtype below, J the Jacobian.
      size: n.
      dtype: the widest of x, float32 at least: what is summed over columns keeps its digits.
    """

    value: Event
    column: Callable[[Array], Array]
    size: int
    dtype: jnp.dtype

    def columns(self) -> Array:
        """``[n, n]``, the transposed Jacobian: row i is J e_i."""
        return jax.vmap(self.column)(jnp.eye(self.size, dtype=self.dtype))


def flatten(x: Event) -> tuple[Array, Callable[[Array], Event]]:
    """The entries of an event as one vector, in the widest dtype of its leaves and float32 at least; and the way back."""
    x = jax.tree.map(jnp.asarray, x)
    dtype = trees.at_least_float32(x)
    flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(dtype), x))
    return flat, lambda vector: jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), unravel(vector), x)


def linearise(name: str, f: Callable[[Event], Event], x: Event) -> Linear:
    """The ``Linear`` of f at x, by one call of f and, later, one forward-mode pass per column.

    Args:
      name: how messages call f(x).
      f: of events like x; shaped like its argument.
      x: a pytree of floating-point arrays.

    Raises:
      ValueError: when f(x) is not shaped like x; TypeError when x is not floating-point.
    """
    checks.floating("x", x)
    flat, unflatten = flatten(x)
    value, linear = jax.linearize(f, x)
    checks.same_structure(name, value, "x", x)
    return Linear(value, lambda z: flatten(linear(unflatten(z)))[0].astype(flat.dtype), flat.size, flat.dtype)
