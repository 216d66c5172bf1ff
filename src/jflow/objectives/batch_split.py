"""Splits a batch into diagonal and off-diagonal rows: fixed numbers of each, chosen at random within equal blocks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflow.types import Array, Key, PyTree


class BatchSplit(NamedTuple):
    """The positions of diagonal and off-diagonal rows within each block.

    Rows are selected within blocks, so no row leaves its device if each device holds whole blocks.

    Attributes:
      diagonal: positions of the diagonal rows, ``[blocks, n]``; None if all rows are of one kind.
      off_diagonal: positions of the other rows, ``[blocks, m]``; None if all rows are of one kind.
      counts: the numbers of diagonal and of off-diagonal rows in the batch.
    """

    diagonal: Array | None
    off_diagonal: Array | None
    counts: tuple[int, int]

    @property
    def mask(self) -> Array:
        """A mask of the diagonal rows, ``[B]``."""
        on, off = self.counts
        return self.put(jnp.ones((on,), bool) if on else None, jnp.zeros((off,), bool) if off else None)

    def take(self, tree: PyTree) -> tuple[PyTree, PyTree]:
        """Returns the diagonal and the off-diagonal rows, ordered by block; None for a kind without rows."""
        on, off = self.counts
        return (_take(tree, self.diagonal) if on else None), (_take(tree, self.off_diagonal) if off else None)

    def put(self, on: Array | None, off: Array | None) -> Array:
        """Merges the values of diagonal and off-diagonal rows into batch order, ``[B]``; pass None for a kind without rows."""
        if on is None or off is None or self.diagonal is None or self.off_diagonal is None:
            whole = off if on is None else on
            assert whole is not None
            return whole
        blocks = self.diagonal.shape[0]
        whole = jnp.zeros((blocks, sum(self.counts) // blocks), jnp.result_type(on))
        for places, values in ((self.diagonal, on), (self.off_diagonal, off)):
            put = jax.vmap(lambda block, place, value: block.at[place].set(value))
            whole = put(whole, places, values.reshape(places.shape))
        return whole.reshape(-1)


def split_batch(key: Key, size: int, share: float, blocks: int) -> BatchSplit:
    """Draws a random split. Each block has ``share`` times its size diagonal rows, rounded.

    Raises:
      ValueError: if ``size`` is not divisible by ``blocks``, or a block is too small to hold rows of both kinds.
    """
    if size % blocks:
        raise ValueError(f"batch: expected a size divisible by blocks = {blocks}, got {size}")
    block = size // blocks
    diagonal = round(share * block)
    if (share > 0 and diagonal == 0) or (share < 1 and diagonal == block):
        raise ValueError(
            f"batch: {size} rows in {blocks} blocks leave none for one kind at diagonal = {share:g}; "
            "expected a larger batch or another share"
        )
    counts = (diagonal * blocks, (block - diagonal) * blocks)
    if 0 in counts:
        return BatchSplit(None, None, counts)
    order = jax.vmap(lambda k: jax.random.permutation(k, block))(jax.random.split(key, blocks))
    return BatchSplit(order[:, :diagonal], order[:, diagonal:], counts)


def _take(tree: PyTree, places: Array | None) -> PyTree:
    if places is None:
        return tree

    def rows(leaf: Array) -> Array:
        blocks = leaf.reshape(places.shape[0], -1, *leaf.shape[1:])
        return jax.vmap(lambda block, place: block[place])(blocks, places).reshape(-1, *leaf.shape[1:])

    return jax.tree.map(rows, tree)
