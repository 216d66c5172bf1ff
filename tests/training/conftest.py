"""A small regression problem: an MLP in plain jax, noisy targets, and something of everything in the info."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import reports
from jflow.datasets import ArrayDataset
from jflow.training import init_state, make_chunk, make_step
from jflow.types import Aux, Batch

BATCH = 16


class Problem(NamedTuple):
    params: Any
    objective: Any
    optimizer: Any
    dataset: ArrayDataset
    step: Any
    chunk: Any

    def state(self, seed: int = 1, **kwargs: Any) -> Any:
        return init_state(self.params, self.optimizer, jax.random.key(seed), ema=(0.9, 0.99), **kwargs)


def init_params(key: Any, dtype: Any = jnp.float32) -> Any:
    first, second = jax.random.split(key)
    return {
        "hidden": {"kernel": jax.random.normal(first, (3, 8), dtype) / 2, "bias": jnp.zeros((8,), dtype)},
        "out": {"kernel": jax.random.normal(second, (8, 2), dtype) / 3, "bias": jnp.zeros((2,), dtype)},
    }


def apply(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"][None]


def objective(params: Any, key: Any, batch: Batch, context: Any) -> Any:
    noisy = batch.cond + 0.1 * jax.random.normal(key, batch.cond.shape, batch.cond.dtype)
    predicted = apply(params, batch.x1)
    loss = jnp.sum((predicted - noisy) ** 2, axis=1)
    if context.ema is not None:
        loss = loss + 0.1 * jnp.sum((predicted - apply(context.ema, batch.x1)) ** 2, axis=1)
    place = (batch.x1[:, 0] > 0).astype(loss.dtype)
    metrics = {
        "fit/raw": reports.Residual(reports.mean(loss), {"t": reports.binned(loss, place / 2, 2)}),
        "diagonal_rows": reports.PerRow(batch.x1[:, 1] > 0),
        "largest": reports.Largest(jnp.max(loss)),
        "plain": jnp.sum(loss),
    }
    return loss, Aux(metrics=metrics)


def make_problem(dtype: Any = jnp.float32) -> Problem:
    random = np.random.default_rng(0)
    x = random.normal(size=(50, 3))
    y = np.stack([np.sin(x[:, 0]) + x[:, 1], x[:, 2] ** 2], axis=1)
    dataset = ArrayDataset(Batch(x1=x.astype(dtype), cond=y.astype(dtype)), BATCH, seed=3)
    optimizer = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(optax.linear_schedule(1e-2, 1e-3, 40)))
    step = make_step(objective, optimizer, ema=(0.9, 0.99))
    return Problem(
        init_params(jax.random.key(7), dtype), objective, optimizer, dataset, step, make_chunk(step, dataset.batch)
    )


@pytest.fixture(scope="session")
def problem() -> Problem:
    return make_problem()


@pytest.fixture(scope="session")
def problem64() -> Problem:
    return make_problem(jnp.float64)


@pytest.fixture
def assert_same():
    """Two pytrees are equal bit for bit, dtypes included."""

    def plain(leaf: Any) -> np.ndarray:
        key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf)

    def check(a: Any, b: Any) -> None:
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
            left, right = plain(left), plain(right)
            assert left.dtype == right.dtype, path
            assert left.tobytes() == right.tobytes(), (jax.tree_util.keystr(path), left, right)

    return check
