"""Batches whose groups of consecutive rows share a label: for losses on groups (``objectives.group``)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.types import Array, Batch, BatchLike, PyTree, as_batch


@dataclasses.dataclass(frozen=True)
class GroupedDataset:
    """Rows of arrays in memory, drawn in groups of one label; made by ``grouped``.

    Attributes:
      data: the rows, those of a label together; what ``batch`` gets.
      starts: the first row of each label, ``[K]``.
      counts: the number of rows of each label, ``[K]``.
      batch_size: B, rows per batch.
      size: M, rows per group.
      seed: of the draws.
    """

    data: Batch
    starts: np.ndarray
    counts: np.ndarray
    batch_size: int
    size: int
    seed: int

    def batch(self, data: PyTree, step: Array) -> Batch:
        """The batch of a step, ``[B, ...]``: rows kM, ..., kM + M - 1 have the same label."""
        groups = self.batch_size // self.size
        key = jax.random.fold_in(jax.random.key(self.seed, impl="threefry2x32"), step)
        label_key, row_key = jax.random.split(key)
        # The label of a row drawn from all rows: labels come as often as they are in the data.
        drawn = jax.random.randint(label_key, (groups,), 0, int(self.counts.sum()), jnp.int32)
        label = jnp.searchsorted(jnp.asarray(self.starts), drawn, side="right") - 1
        start, count = jnp.asarray(self.starts)[label], jnp.asarray(self.counts)[label]
        among = jnp.broadcast_to(count[:, None], (groups, self.size))
        places = jax.random.randint(row_key, among.shape, 0, among, jnp.int32)
        rows = (start[:, None] + places).reshape(-1)
        return jax.tree.map(lambda leaf: leaf[rows], data)


def grouped(
    data: BatchLike, batch_size: int, size: int, seed: int = 0, *, labels: Array | np.ndarray | None = None
) -> GroupedDataset:
    """A dataset whose batches consist of groups of ``size`` consecutive rows of one label.

    The label of a group comes as often as it is in the data, and its rows are drawn independently, with replacement, among
    the rows of that label: a group is a sample from the data given the label, which unbiased losses on groups need.

    Args:
      data: rows ``[N, ...]``; copied to the device.
      batch_size: B, rows per batch, a multiple of ``size``.
      size: M, rows per group.
      seed: the seed of the draws, a whole number of at least 0.
      labels: whole numbers ``[N]``; by default ``data.cond``.

    Raises:
      ValueError: for leading axes that differ, labels of another shape, no labels, or a batch that the groups do not divide.
      TypeError: for labels that are not whole numbers, or numbers of the wrong type.
    """
    data = as_batch(data, "data")
    rows = checks.rows("data", data)
    checks.integer("size", size, low=1)
    checks.integer("batch_size", batch_size, low=1)
    checks.integer("seed", seed, high=2**32 - 1)
    if batch_size % size:
        raise ValueError(f"batch_size: expected a multiple of the group's {size} rows, got {batch_size}")
    found = data.cond if labels is None else labels
    if found is None or len(jax.tree.leaves(found)) != 1:
        raise ValueError("labels: expected one array of whole numbers [N], where data.cond is not one")
    checks.shape("labels", found, (rows,))
    found = np.asarray(found)
    if not np.issubdtype(found.dtype, np.integer):
        raise TypeError(f"labels: expected whole numbers, got dtype {found.dtype}")
    order = np.argsort(found, kind="stable")
    _, starts, counts = np.unique(found[order], return_index=True, return_counts=True)
    placed = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[order]), data)
    return GroupedDataset(placed, starts.astype(np.int32), counts.astype(np.int32), batch_size, size, seed)
