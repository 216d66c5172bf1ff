"""Batches as functions of (seed, step): every row once an epoch."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import couplings, datasets, sharding
from jflow.datasets import ArrayDataset, SampledDataset, arrays
from jflow.types import Batch


@functools.cache
def compiled(size, batch_size, seed):
    return jax.jit(jax.vmap(ArrayDataset(Batch(np.zeros((size, 1), np.float32)), batch_size, seed).rows))


def rows(size, batch_size, steps, seed=0, first=0):
    return np.asarray(compiled(size, batch_size, seed)(np.arange(first, first + steps, dtype=np.int32)))


@pytest.mark.parametrize(("size", "batch_size"), [(50, 16), (101, 101), (5, 32), (1, 3)])
def test_an_epoch_holds_every_row_once(size, batch_size):
    steps = -(-4 * size // batch_size)
    taken = rows(size, batch_size, steps).reshape(-1)[: 4 * size].reshape(4, size)
    np.testing.assert_array_equal(np.sort(taken, axis=1), np.tile(np.arange(size), (4, 1)))
    if size > 20:
        assert len(np.unique(taken, axis=0)) == 4, "every epoch has its own order"


def test_rows_depend_on_seed_and_step_only():
    np.testing.assert_array_equal(rows(50, 16, 13)[4:], rows(50, 16, 13, first=4)[:9])
    assert not np.array_equal(rows(50, 16, 13), rows(50, 16, 13, seed=2**32 - 1))
    with jax.enable_x64(False):
        narrow = rows(50, 16, 13, seed=2**32 - 1)
    np.testing.assert_array_equal(narrow, rows(50, 16, 13, seed=2**32 - 1))


def test_orders_are_uniform():
    """Chi-squared over the ordered pair of the first two rows of 8,000 epochs: 110 degrees of freedom."""
    first = rows(11, 11, 8000)[:, :2]
    count = np.bincount(first[:, 0] * 11 + first[:, 1], minlength=121).reshape(11, 11)
    assert count.trace() == 0
    expected = 8000 / 110
    statistic = ((count[~np.eye(11, dtype=bool)] - expected) ** 2 / expected).sum()
    # Mean 109, standard deviation sqrt(218) = 15: five of them.
    assert abs(statistic - 109) < 5 * 15


def test_neighbouring_epochs_are_unrelated():
    order = rows(101, 101, 400)
    ranks = np.array([np.corrcoef(a, b)[0, 1] for a, b in itertools.pairwise(order)])
    # Independent orders: mean 0, standard deviation 1/sqrt(100), over 399 pairs.
    assert abs(ranks.mean()) < 5 * 0.1 / np.sqrt(399)
    assert 0.08 < ranks.std() < 0.12


@pytest.mark.parametrize(("batch_size", "size"), [(7, 3), (99_991, 1_000_003), (100_000, 2**28 - 1), (2**28 - 1, 5)])
def test_positions_do_not_overflow(batch_size, size):
    steps = np.array([0, 1, 12_345, 999_999, 2**31 - 1])
    with jax.enable_x64(False):
        epoch, place = jax.vmap(lambda step: arrays._position(step, batch_size, size))(
            jnp.asarray(steps.astype(np.int32))
        )
    exact = [int(step) * batch_size for step in steps]
    assert place.tolist() == [value % size for value in exact]
    assert epoch.tolist() == [value // size % 2**32 for value in exact]


def test_batches_are_taken_from_the_data_passed_in():
    data = Batch(x1=np.arange(20.0)[:, None] * np.ones((1, 3)), cond=np.arange(20))
    dataset = ArrayDataset(data, 6, seed=5)
    take = jax.jit(dataset.batch)
    batch = take(dataset.data, np.int32(3))
    assert batch.x1.shape == (6, 3) and batch.x0 is None
    np.testing.assert_array_equal(batch.x1[:, 2], batch.cond)
    np.testing.assert_array_equal(batch.cond, rows(20, 6, 4, seed=5)[3])
    other = take(jax.tree.map(np.negative, data), np.int32(3))
    np.testing.assert_array_equal(other.x1, -batch.x1)


def test_sampled_batches_are_functions_of_seed_and_step():
    dataset = SampledDataset(datasets.checkerboard, 5, seed=2)
    assert dataset.data is None
    take = jax.jit(dataset.batch)
    one = take(None, np.int32(7))
    assert isinstance(one, Batch) and one.x1.shape == (5, 2)
    np.testing.assert_array_equal(one.x1, take(None, np.int32(7)).x1)
    assert not np.array_equal(one.x1, take(None, np.int32(8)).x1)
    other = SampledDataset(datasets.checkerboard, 5, seed=3)
    assert not np.array_equal(one.x1, jax.jit(other.batch)(None, np.int32(7)).x1)
    paired = SampledDataset(lambda key, n: Batch(jnp.zeros((n, 1)), cond=jnp.arange(n)), 4)
    assert paired.batch(None, jnp.int32(0)).cond.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ArrayDataset(Batch(np.zeros((3, 1)), cond=np.zeros(4)), 2), "data: expected arrays with one common"),
        (lambda: ArrayDataset(Batch(np.zeros((0, 1))), 2), "data"),
        (lambda: ArrayDataset(Batch(np.zeros((3, 1))), 0), "batch_size"),
        (lambda: ArrayDataset(Batch(np.zeros((3, 1))), 2, seed=-1), "seed"),
        (lambda: SampledDataset(datasets.checkerboard, 0), "batch_size"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


MESHES = {"one": lambda: None, "mesh": lambda: sharding.mesh(devices=jax.devices()[:2])}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            Batch(np.zeros((3, 1)), cond=np.array([1, 2**32 + 1, 2])),
            r"data.cond: expected values that fit int32.* 4294967297",
        ),
        (Batch({"a": np.array([1.0, 1e40])}), r"data.x1\['a'\]: expected values that fit float32.* 1e\+40"),
        (Batch(np.zeros(2), x0=np.array([0, 2**63], np.uint64)), r"data.x0: expected values that fit uint32"),
    ],
)
def test_values_that_do_not_fit_on_the_device_are_refused(data, message, mesh):
    with jax.enable_x64(False), pytest.raises(ValueError, match=message):
        ArrayDataset(data, 2, mesh=MESHES[mesh]())
    ArrayDataset(data, 2, mesh=MESHES[mesh]())


@pytest.mark.parametrize("mesh", MESHES)
def test_values_that_fit_are_narrowed(mesh):
    x, y = np.array([0.1, np.nan, np.inf, 1e-300]), np.array([0, -(2**31), 2**31 - 1, 7])
    with jax.enable_x64(False):
        data = ArrayDataset(Batch(x, cond=y), 2, mesh=MESHES[mesh]()).data
        assert data.x1.dtype == jnp.float32 and data.cond.dtype == jnp.int32
        np.testing.assert_array_equal(data.x1, x.astype(np.float32))
        np.testing.assert_array_equal(data.cond, y)


def test_pairs_that_do_not_fit_are_refused():
    def couple(x0, x1, cond):
        return couplings.Assignment(x0.astype(np.float64) * 1e40, 1.0, 1.0)

    with jax.enable_x64(False):
        dataset = ArrayDataset(Batch(np.ones((4, 1), np.float32)), 2)
        with pytest.raises(ValueError, match=r"data.x0: expected values that fit float32"):
            datasets.coupled(dataset, 2, couple=couple)


ROWS = np.ones((16, 3), np.float32)


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda: datasets.ArrayDataset(np.array(["cat", "dog"]), 4),
            TypeError,
            "^data: expected arrays of numbers, got dtype <U3$",
            id="rows of words",
        ),
        pytest.param(
            lambda: datasets.ArrayDataset(Batch(x1=ROWS, cond=ROWS[:3]), 4),
            ValueError,
            r"^data: expected arrays with one common leading axis of rows, got \[\(3,\), \(16,\)\]$",
            id="rows of different numbers",
        ),
        pytest.param(
            lambda: datasets.ArrayDataset(ROWS[:0], 4),
            ValueError,
            r"^data: expected arrays with one common leading axis of rows, got \[\(0,\)\]$",
            id="no rows",
        ),
        pytest.param(
            lambda: datasets.ArrayDataset(ROWS, 0),
            ValueError,
            "^batch_size: expected a whole number of at least 1 and at most 268435455, got 0$",
            id="an empty batch",
        ),
        pytest.param(
            lambda: datasets.SampledDataset(jax.random.normal, 4, jax.random.key(0)),
            TypeError,
            "^seed: expected a whole number, got PRNGKeyArray",
            id="a key as the seed",
        ),
        pytest.param(
            lambda: datasets.coupled(datasets.ArrayDataset(Batch(x1=ROWS, x0=ROWS), 4), 1),
            ValueError,
            "^dataset: expected batches that are a Batch without x0",
            id="pairs paired again",
        ),
    ],
)
def test_refused_in_words(attempt, error, message):
    with pytest.raises(error, match=message) as caught:
        attempt()
    # Not by a sub-class that means something else.
    assert caught.type is error
