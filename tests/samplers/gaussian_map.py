"""The closed-form map of normal data, its marginals, and a test of their moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jflow import interpolants, types

MEAN, STD = 0.7, 0.4
PATHS = {
    "linear": interpolants.linear(),
    "trigonometric": interpolants.trigonometric(),
    # These two do not end at alpha = 0, and the last does so visibly.
    "variance_preserving": interpolants.variance_preserving(),
    "variance_exploding": interpolants.variance_exploding(sigma_min=0.3),
}
GRID = [0.1, 0.35, 0.6, 1.0]


def moments(path, params, t):
    mean, std = params
    return path.beta(t) * mean, jnp.sqrt(jnp.square(path.alpha(t)) + jnp.square(path.beta(t) * std))


def exact_map(path, domain=types.BOTH):
    """The flow map of data N(mean, std²) in every coordinate: X_{s,t}(x) = m_t + (σ_t/σ_s)(x - m_s)."""

    def jump(params, s, t, x, cond=None, *, key=None):
        (m_s, std_s), (m_t, std_t) = moments(path, params, s), moments(path, params, t)
        return jax.tree.map(lambda leaf: m_t + std_t / std_s * (leaf - m_s), x)

    def velocity(params, t, x, cond=None, *, key=None):
        return jax.jvp(lambda u: jump(params, t, u, x), (t,), (jnp.ones_like(t),))[1]

    def mean_velocity(params, s, t, x, cond=None, *, key=None):
        raise AssertionError("the overrides should have been called")

    return types.FlowMap(mean_velocity, domain, jump_override=jump, velocity_override=velocity)


def bound_map(path, domain=types.BOTH):
    return exact_map(path, domain).bind((jnp.float64(MEAN), jnp.float64(STD)))


def start(path, key, n, grid=GRID):
    mean, std = moments(path, (MEAN, STD), jnp.float64(grid[0]))
    return mean + std * jax.random.normal(key, (n,), jnp.float64)


def assert_moments(samples, mean, std):
    """Mean, standard deviation and kurtosis of normal samples, each within four standard errors."""
    n = samples.size
    scaled = (np.asarray(samples) - float(mean)) / float(std)
    assert abs(scaled.mean()) < 4 / np.sqrt(n)
    assert abs(np.mean(scaled**2) - 1) < 4 * np.sqrt(2 / n)
    assert abs(np.mean(scaled**4) - 3) < 4 * np.sqrt(96 / n)
