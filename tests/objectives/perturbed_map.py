"""The exact jump of a Gaussian, moved and stretched by two parameters."""

import jax.numpy as jnp

from jflow import interpolants, oracles, types

PATH = interpolants.linear()
ORACLE = oracles.gaussian(PATH)
MEAN, STD = 0.7, 0.6
TRUTH = oracles.gaussian_params(jnp.array([MEAN]), jnp.array([[STD**2]]))


def perturbed(params, s, t, x, cond=None, *, key=None):
    """X = X* + a + b X*: the exact jump, moved and stretched."""
    a, b = params
    gap = jnp.where(t == s, 1.0, t - s)
    exact = ORACLE.flow_map.jump(TRUTH, s, t, x)
    return (exact + a + b * exact - x) / gap


MAP = types.FlowMap(perturbed)
