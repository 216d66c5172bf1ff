"""Draws any number of samples, in blocks of one size that are compiled once, on one device or over a mesh."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jflow import bases, checks, sharding
from jflow.samplers.steps import Grid, Sampler, check_key, check_length, check_sampler, run, times_of
from jflow.types import Array, Cond, Event, Key


def draw(
    sampler: Sampler[Key],
    key: Key,
    n: int,
    grid: Grid,
    cond: Cond = None,
    *,
    like: Event | None = None,
    x0: Event | None = None,
    base: bases.Base | None = None,
    block: int = 1024,
    mesh: Mesh | None = None,
) -> Event:
    """Draws n samples with a sampler. The base points are given, or drawn from the base.

    For example::

        samples = draw(Jumps(bound), key, 50_000, uniform_grid(4), labels, like=jax.ShapeDtypeStruct((28, 28), jnp.float32))

    Sample i uses the key ``fold_in(key, i)``, split into one key for its base point and one for the sampler. The samples
    therefore do not depend on the block size or the devices, except for rounding in batched products. The first m of n
    samples are those that a call for m samples gives, and different samplers with the same key start from the same base
    points.

    Call it outside ``jax.jit``. A block is compiled once for each sampler structure, block size and grid shape; the last
    block is padded to the same size.

    Args:
      sampler: a sampler such as ``Jumps``, ``Renoise`` or ``SDE``; a pytree, whose arrays are passed to the compiled function.
      key: a PRNG key.
      n: the number of samples.
      grid: concrete times, ``[K + 1]``.
      cond: conditioning of each sample, leaves ``[n, ...]``, or None.
      like: one event, arrays or ``jax.ShapeDtypeStruct``, for which base points are drawn.
      x0: base points ``[n, ...]``, instead of ``like``.
      base: the law of x0; by default ``sampler.base`` if the sampler has one, else the standard normal.
      block: the largest number of samples made at once on all devices together; rounded up to a multiple of the number of
        devices.
      mesh: a mesh from ``sharding.mesh``. Each device makes its share of a block; the sampler's arrays are replicated.

    Returns:
      Samples ``[n, ...]``, numpy arrays on the host.

    Raises:
      ValueError: if neither or both of ``like`` and ``x0`` are given, ``base`` is given together with ``x0``, a leaf does not
        have length n, or the grid is traced or not valid for the sampler.
      TypeError: if ``sampler`` is not a sampler, ``key`` is not a PRNG key, points are not floating-point, or a number has
        a wrong type.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import FlowMap, interpolants, samplers
      >>> bound = FlowMap(lambda params, s, t, x, cond=None, *, key=None: params * jnp.ones_like(x)).bind(jnp.float32(2.0))
      >>> x0 = jnp.zeros(2, jnp.float32)
      >>> samplers.draw(samplers.Jumps(bound), jax.random.key(0), 5, samplers.uniform_grid(2), like=x0).shape
      (5, 2)
    """
    check_sampler(sampler)
    check_key(key)
    checks.integer("n", n, low=1)
    checks.integer("block", block, low=1)
    if (like is None) == (x0 is None):
        raise ValueError("like, x0: expected one of them, an event to draw base points for or the points themselves")
    if x0 is not None and base is not None:
        raise ValueError("base: expected none beside x0, which is given")
    law: bases.Base = getattr(sampler, "base", bases.STANDARD_NORMAL) if base is None else base
    bases.check(law)
    if checks.concrete(grid) is None:
        raise ValueError("grid: expected concrete times, got traced ones")
    check_length(grid)
    sampler.check(grid)
    x0, cond = jax.tree.map(np.asarray, (x0, cond))
    for name, rows in (("x0", x0), ("cond", cond)):
        for leaf in jax.tree.leaves(rows):
            if leaf.shape[:1] != (n,):
                raise ValueError(f"{name}: expected leaves with a leading axis of n = {n}, got shape {leaf.shape}")
    checks.floating("like", like)
    times = times_of(jax.tree.map(lambda leaf: np.zeros((), leaf.dtype), like if x0 is None else x0), grid)
    devices = 1 if mesh is None else mesh.size
    size = -(-min(block, n) // devices) * devices
    # A base that is not a pytree (it is its own leaf) is a static argument.
    static = law if jax.tree.structure(law) == jax.tree.structure(0) else None
    events = None if like is None else _Event.of(like)
    ends = []
    for first in range(0, n, size):
        # Pad the last block with copies of the last sample.
        rows = np.minimum(np.arange(first, first + size), n - 1)
        taken = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (x0, cond))
        end = _block(
            sampler, law if static is None else None, key, times, rows.astype(np.uint32), *taken, static, events, mesh
        )
        ends.append(jax.tree.map(lambda leaf, first=first: leaf[: n - first], sharding.local(end)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *ends)


class _Event(NamedTuple):
    """The structure, shapes and dtypes of an event, in a hashable form."""

    structure: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, like: Event) -> _Event:
        leaves, structure = jax.tree.flatten(like)
        return cls(structure, tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves))


@functools.partial(jax.jit, static_argnums=(7, 8, 9))
def _block(
    sampler: Sampler[Key],
    base: bases.Base | None,
    key: Key,
    times: Array,
    rows: Array,
    x0: Event | None,
    cond: Cond,
    static: bases.Base | None,
    like: _Event | None,
    mesh: Mesh | None,
) -> Event:
    """Draws one block of samples; ``rows`` are their indices."""

    def one(
        sampler: Sampler[Key], base: Any, key: Key, times: Array, row: Array, x0: Event | None, cond: Cond
    ) -> Event:
        base_key, sampler_key = jax.random.split(jax.random.fold_in(key, row))
        if like is not None:
            event = jax.tree.unflatten(like.structure, like.leaves)
            x0 = (base if static is None else static).sample(base_key, event)
        return run(sampler, sampler_key, x0, times, cond)

    axes = (None, None, None, None, 0, 0, 0)
    mapped = jax.vmap(one, axes) if mesh is None else sharding.vmap(one, mesh, axes)
    return mapped(sampler, base, key, times, rows, x0, cond)
