"""The exact map of Gaussian data and noise for it, which the tests of this folder share."""

from __future__ import annotations

import jax

from jflow import interpolants, oracles

ORACLE = oracles.gaussian(interpolants.linear())
PARAMS = oracles.gaussian_params([1.0, -0.5], [[0.5, 0.2], [0.2, 0.3]])
N = 21


def noise(n=N):
    return jax.random.normal(jax.random.key(1), (n, 2))
