"""Quantile maps: derivatives, tails, gaps and float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jflow import oracles
from tests.oracles.cases import draw, make, params

PAIRS = [(0.0, 1.0), (1.0, 0.0), (0.2, 0.9), (0.7, 0.1), (0.0, 0.0), (1.0, 1.0), (0.45, 0.45), (0.3, 0.3001)]
ROWS = np.repeat(np.array([*PAIRS, (0.0, 0.5), (1.0, 0.6)]), 3, axis=0)


@functools.cache
def flow(name, path):
    """v_{s,t}(x) with its derivative along (ds, dt, dx), and b, of many rows."""
    oracle = make(name, path)

    def along(p, s, t, x, ds, dt, dx):
        return jax.jvp(lambda *a: oracle.flow_map.mean_velocity(p, *a), (s, t, x), (ds, dt, dx))

    rows = jax.jit(jax.vmap(along, (None, 0, 0, 0, 0, 0, 0)))
    velocity = jax.jit(jax.vmap(oracle.velocity, (None, 0, 0)))
    p = params(name)
    return (lambda *a: tuple(map(np.asarray, rows(p, *a)))), (lambda t, x: np.asarray(velocity(p, t, x)))


def test_quantiles_are_twice_differentiable_in_both_modes():
    """The gradient in x of the derivative along t, against central differences of that derivative."""
    along, _ = flow("quantile", "linear")
    oracle, p = make("quantile", "linear"), params("quantile")

    def in_time(s, t, x):
        return jax.jvp(lambda t: oracle.flow_map.mean_velocity(p, s, t, x)[0], (t,), (jnp.ones_like(t),))[1]

    s, t = ROWS.T
    x, h = draw("quantile", "linear", s, 4), 1e-5
    zero, one, still = np.zeros_like(s), np.ones_like(s), np.zeros_like(x)
    got = jax.jit(jax.vmap(jax.grad(in_time, argnums=2)))(s, t, x)
    above, below = (along(s, t, x + sign * h, zero, one, still)[1] for sign in (1.0, -1.0))
    np.testing.assert_allclose(got, (above - below) / (2 * h), rtol=1e-4, atol=1e-5)


def test_quantiles_hold_in_tails_gaps_and_float32():
    """Components thirty deviations apart, points far outside: finite, monotone, and the same in float32."""
    oracle = make("quantile", "linear")
    far = oracles.mixture_params([0.9, 0.1], [[-6.0], [6.0]], [[0.04], [0.09]])
    x = np.array([-40.0, -12.0, -6.0, -1.0, 0.0, 1.3, 5.0, 12.0, 40.0])[:, None]
    run = jax.jit(jax.vmap(oracle.flow_map.mean_velocity, (None, None, None, 0)))
    for s, t in ((0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (0.2, 0.9)):
        v = np.asarray(run(far, s, t, x))
        assert np.all(np.isfinite(v))
        # Not strictly: in the gap the distribution function is flat to rounding, and so is the map to the base.
        assert np.all(np.diff((x + (t - s) * v)[:, 0]) >= -1e-9)
        single = run(far, np.float32(s), np.float32(t), x.astype(np.float32))
        assert single.dtype == jnp.float32
        np.testing.assert_allclose(single.astype(jnp.float64), v, rtol=2e-5, atol=2e-5)
