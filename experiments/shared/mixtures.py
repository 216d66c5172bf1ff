"""The asymmetric mixture of Gaussians in the plane that several experiments learn, with its exact flow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared.model import Problem
from jflow import datasets, interpolants, oracles


def target() -> oracles.MixtureParams:
    """Three components of unequal weight, place and shape: no symmetry."""
    return oracles.mixture_params(
        jnp.array([0.5, 0.3, 0.2]),
        jnp.array([[-1.0, 0.3], [1.1, 0.9], [0.4, -1.3]]),
        jnp.array([[[0.12, 0.05], [0.05, 0.08]], [[0.05, -0.02], [-0.02, 0.12]], [[0.2, 0.0], [0.0, 0.03]]]),
    )


def oracle(path: str) -> oracles.Oracle:
    """The exact velocity and map on a path; in float32 its solve has a tolerance of 1e-5."""
    return oracles.mixture(interpolants.INTERPOLANTS[path]())


def problem(path: str, batch: int, seed: int) -> Problem:
    """The data and how samples are compared."""
    exact, params = oracle(path), target()

    def sample(key: jax.Array, n: int) -> jax.Array:
        return exact.sample(params, key, n).astype(jnp.float32)

    return Problem(
        dataset=datasets.SampledDataset(sample, batch, seed),
        event=(2,),
        scale=1.0,
        reference=lambda key, n: np.asarray(sample(key, n)),
    )
