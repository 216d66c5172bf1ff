r"""Datasets of arrays in memory and of synthetic distributions, whose batches are pure functions of a seed and the step.

There is no iterator state to save: ``dataset.batch(data, step)`` is traced inside the training step, and a resumed run sees
the same batches as an uninterrupted one. The arrays are passed as ``data``; they are not constants of the compiled code.

An epoch visits every row exactly once, and no rows are dropped. The batch of a step has the positions p = step B, ...,
step B + B - 1, which continue across epochs. Position p is place p % N of epoch p // N, and its row is the image of the place
under the epoch's random permutation. The permutation is a swap-or-not shuffle (Hoang, Morris and Rogaway, 2012), computed for
each place without a table. Round r has a random k_r and replaces

.. math::

    x \leftarrow x \quad \text{or} \quad x \leftarrow (k_r - x) \bmod N,

depending on one bit that is hashed from the larger of the two values. Each round is its own inverse, and so a bijection for
every N.
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
      data: a Batch (or another pytree) of arrays with the same leading axis of N rows; copied to the device. If
        ``jax_enable_x64`` is off, float64 is rounded to float32, and int64 becomes int32.
      batch_size: B, the rows per batch; it may exceed N.
      seed: the seed of the order, from 0 to 2^32 - 1.
      mesh: a mesh from ``sharding.mesh`` over whose devices the rows are spread. Each process then reads only its own rows of
        the arrays, and only batches are sent between devices. The batches are the same. None for the default device.

    Raises:
      ValueError: if leading axes differ, there are no rows, N or B is 2^28 or more, the seed is out of range, or a value does
        not fit its dtype on the device (an int64 beyond int32, a finite float64 beyond float32; the message names the leaf).
      TypeError: if an array does not hold numbers, or ``batch_size`` or ``seed`` is not a whole number.

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
        """The batch of a step, with leaves ``[B, ...]`` like those of ``data``."""
        rows = self.rows(step)
        return jax.tree.map(lambda leaf: leaf[rows], data)

    def rows(self, step: Array) -> Array:
        """The indices of the rows in the batch of a step, ``[B]``, int32. ``step`` is an int32 scalar from 0."""
        epoch, place = _position(step, self.batch_size, self.size)
        # A batch reaches at most `ahead` epochs beyond its first one; their round keys are drawn together.
        ahead = (self.size + self.batch_size - 2) // self.size
        words = _round_keys(self.seed, epoch + jnp.arange(ahead + 1, dtype=jnp.uint32))
        places = place + jnp.arange(self.batch_size, dtype=jnp.uint32)
        mine = (places // self.size).astype(jnp.int32)
        offsets, salts = (words[0] % self.size)[:, mine], words[1][:, mine]
        return _shuffle(places % self.size, offsets, salts, self.size).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class SampledDataset:
    """New samples of a synthetic distribution at every step; its ``data`` is None.

    Attributes:
      sampler: ``(key, n) -> x1 [n, ...]``, which may also return a Batch of n rows; traced.
      batch_size: rows per batch.
      seed: the seed of the samples.

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
        """None, because no arrays are stored."""
        return None

    def batch(self, data: PyTree, step: Array) -> Batch:
        """The batch of a step, drawn with ``fold_in(key(seed), step)``; ``data`` is not used."""
        del data
        key = jax.random.fold_in(jax.random.key(self.seed, impl="threefry2x32"), step)
        drawn = self.sampler(key, self.batch_size)
        drawn = drawn if isinstance(drawn, Batch) else Batch(x1=drawn)
        if (lengths := {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(drawn)}) != {(self.batch_size,)}:
            raise ValueError(f"sampler: expected {self.batch_size} rows, got leading axes {sorted(lengths)}")
        return drawn


class CoupledDataset(ArrayDataset):
    """An ArrayDataset of pairs (x0, x1) made before training, with the cost of the coupling. See ``coupled``.

    Args:
      pairs: a Batch with x0.
      batch_size, seed: as in ArrayDataset.
      cost: the mean ``|x1 - x0|^2`` of the pairs, in squared units of the data.
      independent_cost: the same mean before the points were paired.

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
    """Makes a pool of training rows from minibatches of a dataset, each paired once, on the host, with base points.

    For example::

        pool = coupled(SampledDataset(checkerboard, batch_size=512), batches=100)
        chunk = make_chunk(step, pool.batch)
        fit(state, chunk, pool.data, ...)

    Minibatch k = 0, ..., batches - 1 is ``dataset.batch(dataset.data, k)``. Its x0 are drawn from the base with (seed, k), and
    paired by ``couple(x0, x1, cond)``. In training the rows of the pool are shuffled together, in a new order every epoch. The
    law of a single row is the same as in the minibatches. The batches of training may be smaller than the minibatches of the
    coupling, whose pairing improves with their size.

    The pool has the bias of minibatch optimal transport (``jflow.couplings``), and its noise is fixed. In N steps each pair is
    used N * batch_size / size times. Make the pool several times as large as the data, or replace it during training: the data
    of a pool with another seed fit the same compiled chunk. If the rows come from an ArrayDataset and the pool is not a whole
    number of epochs, some rows occur once more than others.

    Args:
      dataset: a dataset of unpaired batches; its batch size is that of the coupling.
      batches: the number of its batches in the pool.
      batch_size: rows per batch of training; by default the dataset's.
      seed: the seed of the base points and of the order.
      couple: ``(x0, x1, cond) -> Assignment``, of numpy arrays. The default is the exact assignment. It uses cond, if any, as
        labels, and exchanges rows only within a label. For cond that is not discrete, pass a function that makes labels from
        it or ignores it; ``jflow.couplings`` describes the consequence.
      base: the law of x0.

    Returns:
      A CoupledDataset of batches * dataset.batch_size rows, Batch(x1, x0, cond).

    Raises:
      ValueError: if a number is out of range, the batches are not a Batch without x0, and as ``couple``.
      TypeError: if a number has the wrong type, and as ``couple``.
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
    # No step has this number, so the keys differ from those of a SampledDataset with the same seed.
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
    """The quotient and remainder of step * batch_size divided by size, in uint32, without 64-bit integers.

    It is long division on the digits of step, which are so small that no product reaches 2^32.
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

    A hash is random enough for the order of rows; Threefry would triple the time to compile a batch.
    """
    mixed = _mix(_mix(jnp.uint32(seed ^ 0x9E3779B9)) ^ epochs)
    counters = jnp.arange(2 * ROUNDS, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    return _mix(_mix(mixed[None, :] ^ counters[:, None])).reshape(2, ROUNDS, -1)


def _shuffle(x: Array, offsets: Array, salts: Array, size: int) -> Array:
    """The swap-or-not shuffle of x [B] in [0, size), with round keys offsets [ROUNDS, B] in [0, size) and salts [ROUNDS, B]."""
    for offset, salt in zip(offsets, salts, strict=True):
        partner = offset + (size - x)
        partner = jnp.where(partner >= size, partner - size, partner)
        swap = _mix(jnp.maximum(x, partner) ^ salt) & 1 == 1
        x = jnp.where(swap, partner, x)
    return x


def _mix(word: Array) -> Array:
    """A bijection of uint32 that mixes all bits of the word (the finaliser of MurmurHash3)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
