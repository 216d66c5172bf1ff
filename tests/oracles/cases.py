"""Parameters and marginals of the oracles that the tests of this folder share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jflow import interpolants, oracles

WEIGHTS = np.array([0.6, 0.4])
MEANS = np.array([[-1.0, 0.5], [1.2, -0.3]])
COVS = np.array([[[0.5, 0.2], [0.2, 0.3]], [[0.15, -0.05], [-0.05, 0.4]]])
MEAN, COV = np.array([0.7, -1.1]), np.array([[0.6, 0.25], [0.25, 0.3]])
LINE = ([0.5, 0.3, 0.2], [[-1.3], [0.4], [2.1]], [[0.2], [0.05], [0.4]])
# The closed form is tested on every path; the others share its coefficients and are slow to compile.
CASES = [("gaussian", path) for path in interpolants.INTERPOLANTS]
CASES += [("quantile", path) for path in ("linear", "trigonometric", "variance_exploding")]
CASES += [("mixture", path) for path in ("linear", "cosine", "variance_preserving")]


@functools.cache
def params(name):
    if name == "gaussian":
        return oracles.gaussian_params(MEAN, COV)
    return oracles.mixture_params(*(LINE if name == "quantile" else (WEIGHTS, MEANS, COVS)))


@functools.cache
def make(name, path):
    interpolant = interpolants.INTERPOLANTS[path]()
    options = {"rtol": 1e-11, "atol": 1e-11} if name == "mixture" else {}
    return oracles.ORACLES[name](interpolant, **options)


def draw(name, path, s, seed):
    """One point of the marginal at each time s, in numpy."""
    rng, p = np.random.default_rng(seed), jax.tree.map(np.asarray, params(name))
    k = rng.choice(len(p.log_weights), size=len(s), p=np.exp(p.log_weights))
    x1 = p.means[k] + np.einsum("nij,nj->ni", p.bases[k], np.sqrt(p.variances)[k] * rng.normal(size=p.means[k].shape))
    c = make(name, path).interpolant
    alpha, beta = (np.array([float(f(u)) for u in s]) for f in (c.alpha, c.beta))
    return alpha[:, None] * rng.normal(size=x1.shape) + beta[:, None] * x1


@functools.cache
def pointwise(path):
    """log rho, its gradient, the score, the denoiser, b, and the terms of the continuity equation."""
    oracle = make("mixture", path)

    def at(p, t, x):
        log_rho, gradient = jax.value_and_grad(lambda x: oracle.log_density(p, t, x))(x)
        in_time = jax.jvp(lambda t: oracle.log_density(p, t, x), (t,), (jnp.ones_like(t),))[1]
        b = oracle.velocity(p, t, x)
        divergence = jnp.trace(jax.jacfwd(lambda x: oracle.velocity(p, t, x))(x))
        terms = jnp.stack([in_time, divergence, jnp.dot(gradient, b)])
        return log_rho, gradient, oracle.score(p, t, x), oracle.denoiser(p, t, x), b, terms

    return jax.jit(jax.vmap(at, (None, 0, 0)))
