"""Couplings: the joint law of base and data points, as ``(key, x1) -> x0`` on a batch.

A coupling made in the input pipeline (minibatch optimal transport, pairs from a solve) puts its x0 into the ``Batch``
instead, and the objective draws none.
"""

from __future__ import annotations

import jax

from jflow import trees
from jflow.types import Event, Key


def independent(key: Key, x1: Event) -> Event:
    """x0 ~ N(0, I), independent of x1, shaped and typed like it (drawn in at least float32)."""
    leaves, structure = jax.tree.flatten(x1)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(k, leaf.shape, trees.at_least_float32(leaf)).astype(leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)
