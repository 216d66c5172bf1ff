"""A small smooth map that sees its condition, with parameters, batches and pairs of times."""

import jax.numpy as jnp
import numpy as np

from jflow import times, types

S, T = 0.2, 0.7
PARAMS, EMA, TEACHER = jnp.array([0.8, -0.6]), jnp.array([0.5, -0.2]), jnp.array([0.7, -0.5])


def mean_velocity(params, s, t, x, cond=None, *, key=None):
    """A smooth map of two parameters, which sees its condition."""
    a, b = params
    return jnp.sin(a * x[::-1] + s * b) + b * jnp.cos(t + s * a) * x + (0.0 if cond is None else cond * t * a)


MAP = types.FlowMap(mean_velocity, types.BOTH)


def batch_of(n=4, cond=True):
    x = np.random.default_rng(0).normal(size=(2, n, 2))
    return types.Batch(jnp.asarray(x[0] + 0.5), jnp.asarray(x[1]), jnp.linspace(-1.0, 2.0, n) if cond else None)


def fixed(s=S, t=T):
    return times.independent(times.constant(s), times.constant(t))
