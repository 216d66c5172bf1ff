"""A small smooth map, its parameters, batches and objectives that the tests of this folder share."""

import jax
import jax.numpy as jnp

from jflow import interpolants, objectives, types


def mean_velocity(params, s, t, x, cond=None, *, key=None):
    """A small smooth map with two parameters, nonlinear in everything."""
    a, b = params
    return jnp.sin(a * x[::-1] + s * b) + b * jnp.cos(t + s * a) * x


FLOW_MAP = types.FlowMap(mean_velocity, types.BOTH)
PARAMS = jnp.array([0.8, -0.6])


def batch_of(n, seed=0):
    first, second = jax.random.split(jax.random.key(seed))
    return types.Batch(jax.random.normal(first, (n, 2)) + 0.5, jax.random.normal(second, (n, 2)))


def make(name, path=None, **choices):
    path = interpolants.linear() if path is None else path
    method = objectives.METHODS[name]
    if method.cost:
        choices.setdefault("diagonal", 0.5)
    path = interpolants.INTERPOLANTS[method.paths[0]]() if method.paths else path
    return method.constructor(FLOW_MAP, path, **choices)


DIM = 784


def published(name, flow_map=None, **choices):
    flow_map = still() if flow_map is None else flow_map
    recipe = objectives.METHODS[name].published()
    return objectives.METHODS[name].constructor(flow_map, interpolants.linear(), **{**recipe, **choices})


def still():
    """v = theta for all points and times: its derivatives vanish, and every residual is theta - (x1 - x0)."""
    return types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: p * jnp.ones_like(x), types.BOTH)
