"""The oracle's map of Gaussian data in two dimensions, bound to its parameters, with a grid and a point."""

from __future__ import annotations

import jax.numpy as jnp

from jflow import interpolants, oracles

PATH = interpolants.trigonometric()
ORACLE = oracles.gaussian(PATH)
PARAMS = oracles.gaussian_params([0.7, -0.4], [[0.3, 0.1], [0.1, 0.2]])
BOUND = ORACLE.flow_map.bind(PARAMS)
GRID = [0.1, 0.35, 0.6, 1.0]
X = jnp.array([0.4, -1.2])
