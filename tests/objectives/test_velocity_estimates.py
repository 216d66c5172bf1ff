"""Estimates of the velocity: the posterior mean over the batch against Bayes' rule, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bases, interpolants, objectives, types
from tests.objectives.cases import FLOW_MAP, PARAMS, batch_of

clone = jax.random.clone


def row_of(path, t, batch, i):
    """A diagonal row as an estimate sees it."""
    leg = objectives.Leg(FLOW_MAP, PARAMS, None, None)
    x = path.interpolate(t, batch.x0[i], batch.x1[i])
    own = {"own": leg, "frozen": leg, "ema": None, "teacher": None, "estimate": objectives.velocity_estimates.pair}
    drawn = {"s": t, "t": t, "x0": batch.x0[i], "x1": batch.x1[i], "x": x, "cond": None, "key": None, "gamma": None}
    return objectives.Row(
        **drawn, **own, step=jnp.int32(0), data=batch.x1, interpolant=path, base=bases.STANDARD_NORMAL
    )


def test_the_batch_velocity_is_the_posterior_mean_over_the_batch(key):
    """Against Bayes' rule written out, on every path; the last row is near the data, where it is the pair's own."""
    batch = batch_of(6)
    t = jnp.array([0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    for name in interpolants.INTERPOLANTS:
        path = interpolants.INTERPOLANTS[name]()

        @jax.jit
        def run(batch, path=path):
            rows = [row_of(path, t[i], batch, i) for i in range(6)]
            pairs = jax.vmap(path.derivative)(t, batch.x0, batch.x1)
            return [objectives.velocity_estimates.batch(row) for row in rows], jax.vmap(path.coefficients)(t), pairs

        got, coefficients, pairs = jax.tree.map(np.asarray, run(batch))
        for i in range(6):
            c = jax.tree.map(lambda leaf, i=i: leaf[i], coefficients)
            x0, x1 = np.asarray(batch.x0), np.asarray(batch.x1)
            x = c.alpha * x0[i] + c.beta * x1[i]
            if c.alpha < 2e-2:
                np.testing.assert_allclose(got[i], pairs[i], rtol=1e-6)
                continue
            noise = (x[None] - c.beta * x1) / c.alpha
            weight = np.exp(-0.5 * np.sum(noise**2, 1))
            each = c.alpha_dot * noise + c.beta_dot * x1
            np.testing.assert_allclose(got[i], (weight[:, None] * each).sum(0) / weight.sum(), rtol=1e-8)


def test_the_batch_velocity_has_the_same_expected_gradient_and_less_variance(key):
    path = interpolants.linear()

    def gradients(estimate):
        objective = objectives.flow_matching(FLOW_MAP, path, velocity=estimate)

        def one(k):
            first, second = jax.random.split(k)
            skewed = types.Batch(jnp.exp(0.5 * jax.random.normal(first, (64, 2))))
            return jax.grad(lambda p: objective(p, second, skewed)[0].mean())(PARAMS)

        return np.asarray(jax.jit(lambda ks: jax.lax.map(one, ks, batch_size=50))(jax.random.split(clone(key), 2000)))

    pair, batch = gradients(objectives.velocity_estimates.pair), gradients(objectives.velocity_estimates.batch)
    error = np.sqrt((pair - batch).var(0) / 2000)
    assert np.all(np.abs((pair - batch).mean(0)) < 4 * error)
    assert np.all(batch.var(0) < 0.8 * pair.var(0))


def test_the_batch_velocity_refuses_pairs_that_are_not_independent(key):
    objective = objectives.flow_matching(FLOW_MAP, interpolants.linear(), velocity=objectives.velocity_estimates.batch)
    with pytest.raises(ValueError, match="neither x0 nor cond"):
        objective(PARAMS, key, batch_of(4))
