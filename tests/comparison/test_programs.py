"""Compiled blocks and counts of FLOPs: conditions and noise of each sample, the last block, and loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import comparison
from jflow.comparison import Entry
from tests.comparison.cases import noise


def moved(params, t, x, cond=None, *, key=None):
    """The velocity of a user: a matrix, a condition and sampling noise."""
    v = params["matrix"] @ x + cond["shift"]
    return v if key is None else v + jax.random.normal(key, x.shape)


def test_a_velocity_with_parameters_condition_and_sampling_noise():
    matrix = jnp.arange(16.0).reshape(4, 4) / 16
    x0 = jax.random.normal(jax.random.key(2), (7, 4))
    shift = np.arange(28.0).reshape(7, 4)
    key = jax.random.key(3)
    drawn = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), (4,)) for i in range(7)])
    # One Euler step, by hand. Blocks of three: the last one is filled up.
    quiet = x0 + x0 @ matrix.T + shift
    entries = [
        Entry("quiet", moved, {"matrix": matrix}, solver="euler", steps=(1,)),
        Entry("noisy", moved, {"matrix": matrix}, solver="euler", steps=(1,), key=key, cond={"shift": 2 * shift}),
    ]
    table = comparison.compare(entries, x0, cond={"shift": shift}, reference=quiet, distances=(), batch=3, repeats=1)
    assert table.row("quiet, 1 step").rmse < 1e-14 and table.reference == "given end points"
    expected = np.sqrt(np.mean(np.square(np.asarray(drawn) + shift)))
    assert table.row("noisy, 1 step").rmse == pytest.approx(expected, rel=1e-12)
    # The product of a matrix and a vector, and the sum of two vectors.
    assert table.row("quiet, 1 step").flops == 2 * 16 + 4


def test_loops_are_counted_if_their_iterations_are_known():
    def looped(params, t, x, cond=None, *, key=None):
        return jax.lax.fori_loop(0, 3, lambda _, y: 0.5 * y, x)

    def endless(params, t, x, cond=None, *, key=None):
        return jax.lax.while_loop(lambda y: jnp.sum(y**2) > 1.0, lambda y: 0.5 * y, x)

    entries = [Entry(f.__name__, f, solver="euler", steps=(2,)) for f in (looped, endless)]
    rows = comparison.compare(entries, noise(3), reference=noise(3), distances=(), repeats=1).rows
    # Two calls; each has three products.
    assert rows[0].flops == 2 * 3 * noise(3).shape[1] and rows[0].nfe == 2
    assert rows[1].flops is None and rows[1].nfe == 2
