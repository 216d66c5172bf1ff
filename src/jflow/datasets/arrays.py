r"""Data: arrays in memory and synthetic distributions, whose batches are pure functions of a seed and the step.

There is no iterator to save: ``dataset.batch(data, step)`` is traced inside the training step, and a run resumed at any
step sees the batches it would have seen. The arrays are passed as ``data``, never baked into the compiled code.

An epoch visits every row exactly once, and nothing is dropped: positions p = step * B, ..., step * B + B - 1 run on
across epochs, epoch p // N and place p % N, and row = permutation_epoch(place). The permutation is a swap-or-not
shuffle (Hoang, Morris and Rogaway, 2012), computed place by place without a table: in round r, with random k_r::

    x  <-  either x or (k_r - x) mod N,   by one bit hashed from the larger of the two,

which is its own inverse, hence a bijection for any N.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jflow import bases, checks, couplings, sharding
from jflow.types import Array, Batch, Key, PyTree

ROUNDS = 24


class ArrayDataset:
    """Rows of arrays in memory, in a new random order every epoch.

    For example::

        dataset = ArrayDataset(Batch(x1=images, cond=labels), batch_size=128, seed=0)
        chunk = make_chunk(step, dataset.batch)
        fit(state, chunk, dataset.data, ...)

    A batch that spans the end of an epoch may hold a row twice.

    Args:
      data: a Batch (or another pytree) of arrays with the same leading axis of N rows; copied to the device. Where jax has
        no 64-bit types (``jax_enable_x64`` is off) float64 is rounded to float32, and int64 becomes int32.
      batch_size: B, rows per batch; may exceed N.
      seed: of the order; any whole number from 0.
      mesh: from ``sharding.mesh``, to spread the rows over its devices; each process then reads its own rows of the arrays
        only, and a batch alone travels between devices. The batches are the same. None for the default device.

    Raises:
      ValueError: if leading axes differ, there are no rows, N or B is 2^28 or more, or a value does not fit the dtype that
        it gets on the device: an int64 beyond int32, a finite float64 beyond float32. The message names the leaf.
      TypeError: for arrays that hold no numbers.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import datasets
      >>> dataset = datasets.ArrayDataset(jnp.arange(6.0, dtype=jnp.float32), batch_size=3)
      >>> batch = dataset.batch(dataset.data, jnp.int32(0))
      >>> batch.shape
      (3,)
    """

    def __init__(self, data: PyTree, batch_size: int, seed: int = 0, *, mesh: Mesh | None = None) -> None:
        rows = checks.rows("data", data)
        for leaf in jax.tree.leaves(data):
            dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
            if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_)):
                raise TypeError(f"data: expected arrays of numbers, got dtype {dtype}")
        self.size = checks.integer("the number of rows", rows, low=1, high=2**28 - 1)
        self.batch_size = checks.integer("batch_size", batch_size, low=1, high=2**28 - 1)
        self.seed = checks.integer("seed", seed, high=2**32 - 1)
        if mesh is not None:
            self.data = sharding.split(data, mesh, name="data")
            return
        checks.fits("data", data)
        self.data = jax.tree.map(jnp.asarray, data)

    def batch(self, data: PyTree, step: Array) -> PyTree:
        """The batch of a step: leaves ``[B, ...]`` like those of ``data``."""
        rows = self.rows(step)
        return jax.tree.map(lambda leaf: leaf[rows], data)

    def rows(self, step: Array) -> Array:
        """The rows ``[B]``, int32, of which the batch of a step consists; step is an int32 scalar from 0."""
        epoch, place = _position(step, self.batch_size, self.size)
        # A batch touches `ahead` epochs beside its first one at most; their round keys are drawn together.
        ahead = (self.size + self.batch_size - 2) // self.size
        words = _round_keys(self.seed, epoch + jnp.arange(ahead + 1, dtype=jnp.uint32))
        places = place + jnp.arange(self.batch_size, dtype=jnp.uint32)
        mine = (places // self.size).astype(jnp.int32)
        offsets, salts = (words[0] % self.size)[:, mine], words[1][:, mine]
        return _shuffle(places % self.size, offsets, salts, self.size).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class SampledDataset:
    """Fresh samples of a synthetic distribution at every step; there is no ``data`` (it is None).

    Attributes:
      sampler: ``(key, n) -> x1 [n, ...]``, or a Batch of n rows; traced.
      batch_size: rows per batch.
      seed: of the samples.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import datasets
      >>> dataset = datasets.SampledDataset(datasets.checkerboard, batch_size=4)
      >>> dataset.batch(dataset.data, jnp.int32(0)).x1.shape
      (4, 2)
    """

    sampler: Callable[[Key, int], Any]
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        checks.integer("batch_size", self.batch_size, low=1)
        checks.integer("seed", self.seed, high=2**32 - 1)

    @property
    def data(self) -> None:
        """None: nothing is kept."""
        return None

    def batch(self, data: PyTree, step: Array) -> Batch:
        """The batch of a step, drawn with ``fold_in(key(seed), step)``; ``data`` is not looked at."""
        del data
        key = jax.random.fold_in(jax.random.key(self.seed, impl="threefry2x32"), step)
        drawn = self.sampler(key, self.batch_size)
        drawn = drawn if isinstance(drawn, Batch) else Batch(x1=drawn)
        if (lengths := {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(drawn)}) != {(self.batch_size,)}:
            raise ValueError(f"sampler: expected {self.batch_size} rows, got leading axes {sorted(lengths)}")
        return drawn


class CoupledDataset(ArrayDataset):
    """Pairs (x0, x1) made before training: an ArrayDataset of them, with what the coupling cost. See ``coupled``.

    Args:
      pairs: a Batch with x0.
      batch_size, seed: as in ArrayDataset.
      cost: the mean ``|x1 - x0|^2`` of the pairs, in squared units of the data.
      independent_cost: the same of the points before they were paired.

    Raises:
      ValueError: as ArrayDataset.
    """

    def __init__(self, pairs: Batch, batch_size: int, seed: int, *, cost: float, independent_cost: float) -> None:
        super().__init__(pairs, batch_size, seed)
        self.cost, self.independent_cost = cost, independent_cost


def coupled(
    dataset: ArrayDataset | SampledDataset,
    batches: int,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    couple: Callable[[PyTree, PyTree, PyTree], couplings.Assignment] = couplings.assignment,
    base: bases.Base = bases.STANDARD_NORMAL,
) -> CoupledDataset:
    """Minibatches of a dataset, each paired with base points on the host, once, as a pool of rows to train on.

    For example::

        pool = coupled(SampledDataset(checkerboard, batch_size=512), batches=100)
        chunk = make_chunk(step, pool.batch)
        fit(state, chunk, pool.data, ...)

    Minibatch k is ``dataset.batch(dataset.data, k)``, k = 0, ..., batches - 1, with x0 ~ base from (seed, k), paired by
    ``couple(x0, x1, cond)``. The rows of the pool are then shuffled together, every epoch anew. A row's law is the same
    as if the minibatches were kept (the mean of their pairings), whereas the batches of training change from epoch to
    epoch, and may be smaller than the minibatches of the coupling, which pair the better the larger they are.

    Beside the bias of minibatch optimal transport (``jflow.couplings``), the noise of the pool is fixed: in N steps each
    pair is seen N * batch_size / size times, so let the pool hold several times the rows of the data, or exchange it: the
    data of a pool of another seed fit the same compiled chunk. Of an ArrayDataset some rows are in the pool once more
    than others, unless it is a whole number of epochs.

    Args:
      dataset: of unpaired batches; its batch size is that of the coupling.
      batches: how many of its batches make the pool.
      batch_size: rows per batch of training; by default the dataset's.
      seed: of the base points and of the order.
      couple: ``(x0, x1, cond) -> Assignment``, of numpy arrays. By default the exact assignment, with cond, where there
        is any, as the labels within which rows are exchanged; for cond that is not discrete pass a function that makes
        labels of it, or that ignores it, with the consequence that ``jflow.couplings`` states.
      base: the law of x0.

    Returns:
      CoupledDataset of batches * dataset.batch_size rows, Batch(x1, x0, cond).

    Raises:
      ValueError, TypeError: for numbers out of range or of the wrong type, batches that are paired already, and as
        ``couple``.
      ImportError: as ``couple``.

    Example:
      >>> from jflow import datasets
      >>> pool = datasets.coupled(datasets.SampledDataset(datasets.checkerboard, batch_size=8), batches=1)
      >>> pool.cost < pool.independent_cost
      True
    """
    checks.integer("batches", batches, low=1, high=2**31 - 1)
    independent = couplings.Independent(base)
    checks.integer("seed", seed, high=2**32 - 1)
    # No step has this number: the keys differ from those of a SampledDataset of the same seed.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), 2**32 - 1)

    @jax.jit
    def draw(data: PyTree, step: Array) -> tuple[Batch, PyTree]:
        batch = dataset.batch(data, step)
        if not isinstance(batch, Batch) or batch.x0 is not None:
            raise ValueError("dataset: expected batches that are a Batch without x0")
        return batch, independent(jax.random.fold_in(key, step), batch.x1)

    checks.fits("dataset: data", dataset.data)
    pairs, costs = [], []
    for step in range(batches):
        batch, x0 = jax.device_get(draw(dataset.data, np.int32(step)))
        found = couple(x0, batch.x1, batch.cond)
        pairs.append(batch._replace(x0=found.x0))
        costs.append((found.cost, found.independent_cost))
    cost, independent_cost = np.mean(costs, axis=0)
    return CoupledDataset(
        jax.tree.map(lambda *leaves: np.concatenate(leaves), *pairs),
        dataset.batch_size if batch_size is None else batch_size,
        seed,
        cost=float(cost),
        independent_cost=float(independent_cost),
    )


def _position(step: Array, batch_size: int, size: int) -> tuple[Array, Array]:
    """(step * batch_size) divided by size, as quotient and remainder, uint32, without 64-bit integers.

    Long division on the digits of step: they are taken so small that no product passes 2^32.
    """
    quotient, remainder = divmod(batch_size, size)
    bits = 31 - size.bit_length()
    step = jnp.asarray(step).astype(jnp.uint32)
    epoch, place = jnp.uint32(0), jnp.uint32(0)
    for shift in reversed(range(0, 31, bits)):
        digit = (step >> shift) & (2**bits - 1)
        place = (place << bits) + digit * remainder
        epoch = (epoch << bits) + digit * quotient + place // size
        place = place % size
    return epoch, place


def _round_keys(seed: int, epochs: Array) -> Array:
    """Random words [2, ROUNDS, E], uint32, for each of E epochs.

    Hashed, since the order of rows asks little of them and Threefry would triple the time to compile a batch.
    """
    mixed = _mix(_mix(jnp.uint32(seed ^ 0x9E3779B9)) ^ epochs)
    counters = jnp.arange(2 * ROUNDS, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    return _mix(_mix(mixed[None, :] ^ counters[:, None])).reshape(2, ROUNDS, -1)


def _shuffle(x: Array, offsets: Array, salts: Array, size: int) -> Array:
    """Swap-or-not: x [B] in [0, size), with its round keys offsets [ROUNDS, B] in [0, size) and salts [ROUNDS, B]."""
    for offset, salt in zip(offsets, salts, strict=True):
        partner = offset + (size - x)
        partner = jnp.where(partner >= size, partner - size, partner)
        swap = _mix(jnp.maximum(x, partner) ^ salt) & 1 == 1
        x = jnp.where(swap, partner, x)
    return x


def _mix(word: Array) -> Array:
    """A bijection of uint32 that spreads every bit over all (the finaliser of MurmurHash3)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
