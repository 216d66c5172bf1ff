"""Batches in which groups of consecutive rows share a label, for losses on groups (``objectives.group``)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.types import Array, Batch, BatchLike, PyTree, as_batch


@dataclasses.dataclass(frozen=True)
class GroupedDataset:
    """Rows of arrays in memory, drawn in groups with the same label; made by ``grouped``.

    Attributes:
      data: the rows, sorted by label, which are passed to ``batch``.
      starts: the first row of each label, ``[K]``.
      counts: the number of rows of each label, ``[K]``.
      batch_size: B, the rows per batch.
      size: M, the rows per group.
      seed: the seed of the draws.
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
        # Take the label of a random row, so that labels have the frequencies of the data.
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
    """A dataset whose batches consist of groups of ``size`` consecutive rows with the same label.

    A label is drawn with its frequency in the data. The rows of a group are drawn independently, with replacement, from the
    rows with that label. A group is thus a sample from the data given the label, as needed for unbiased losses on groups.

    Args:
      data: rows ``[N, ...]``; copied to the device.
      batch_size: B, the rows per batch, a multiple of ``size``.
      size: M, the rows per group.
      seed: the seed of the draws, a whole number from 0 to 2^32 - 1.
      labels: whole numbers ``[N]``; by default ``data.cond``.

    Raises:
      ValueError: if leading axes differ, there are no labels or they have another shape, ``size`` does not divide
        ``batch_size``, or a number is out of range.
      TypeError: if the labels are not whole numbers, or a number has the wrong type.
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
