"""Arithmetic on events. An event is one sample, a pytree of arrays.

Scalars are cast to the dtype of each leaf, so that multiplying a bfloat16 state by a float32 time does not promote it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Scalar = Array | float
PyTree = Any
Tree = TypeVar("Tree")


def scale(a: Scalar, x: Tree) -> Tree:
    """Returns a x."""
    return jax.tree.map(lambda leaf: jnp.asarray(a).astype(leaf.dtype) * leaf, x)


def add(x: Tree, y: Tree) -> Tree:
    """Returns x + y."""
    return jax.tree.map(jnp.add, x, y)


def sub(x: Tree, y: Tree) -> Tree:
    """Returns x - y."""
    return jax.tree.map(jnp.subtract, x, y)


def axpy(a: Scalar, x: Tree, y: Tree) -> Tree:
    """Returns a x + y."""
    return add(scale(a, x), y)


def combine(a: Scalar, x: Tree, b: Scalar, y: Tree) -> Tree:
    """Returns a x + b y."""
    return add(scale(a, x), scale(b, y))


def sq_norm(x: PyTree) -> Array:
    """Returns the squared norm ``|x|^2``, a scalar: the sum over all leaves and axes, accumulated in at least float32."""
    dtype = at_least_float32(x)
    return sum((jnp.sum(jnp.square(leaf.astype(dtype))) for leaf in jax.tree.leaves(x)), start=jnp.zeros((), dtype))


def size(x: PyTree) -> int:
    """Returns the number of entries of all leaves."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(x))


def at_least_float32(x: PyTree) -> jnp.dtype:
    """Returns the widest dtype of the leaves, or float32 if all are narrower. It is used for times, sums and random draws."""
    return max((jnp.dtype(leaf.dtype) for leaf in (*jax.tree.leaves(x), jnp.zeros((), jnp.float32))), key=_bits)


def _bits(dtype: jnp.dtype) -> int:
    return jnp.finfo(dtype).bits


def zeros_like(x: Tree) -> Tree:
    """Returns zeros with the shapes and dtypes of x."""
    return jax.tree.map(jnp.zeros_like, x)


def is_key(leaf: object) -> bool:
    """Returns whether a leaf is an array of typed PRNG keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def on_words(function: Callable[[Any], Any], leaf: Any) -> Any:
    """Applies ``function`` to an array of numbers, or to the key data of typed PRNG keys, and returns numbers or keys."""
    if not is_key(leaf):
        return function(leaf)
    return jax.random.wrap_key_data(function(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
