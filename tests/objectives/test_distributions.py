"""The squared energy distance: against closed forms and the double sum, unbiased in value and gradient."""

import functools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import objectives, times, types
from jflow.objectives.distributions import squared_energy_distance
from tests.objectives.perturbed_map import MAP, MEAN, PATH, STD

clone = jax.random.clone

SIZE = 6


def expected_distance(mean, std):
    """E|N(m, sigma^2)| = sigma sqrt(2/pi) e^{-m^2/2 sigma^2} + m erf(m / sigma sqrt 2)."""
    z = mean / (std * np.sqrt(2.0))
    return std * np.sqrt(2 / np.pi) * np.exp(-(z**2)) + mean * float(jax.scipy.special.erf(z))


def energy(mean, std, other_mean, other_std):
    """2 E|x - y| - E|x - x'| - E|y - y'| of two Gaussians in one dimension."""
    cross = expected_distance(mean - other_mean, np.hypot(std, other_std))
    return 2 * cross - expected_distance(0.0, std * np.sqrt(2)) - expected_distance(0.0, other_std * np.sqrt(2))


def marginal(t):
    return t * MEAN, np.sqrt((1 - t) ** 2 + (t * STD) ** 2)


@functools.cache
def sampled(size, s, t, a, b, batches=4000, groups=8):
    """Losses and gradients in (a, b), of batches of the objective."""
    law = times.independent(times.constant(s), times.constant(t))
    objective = objectives.energy_distance(MAP, PATH, size=size, pairs=law)

    def one(key):
        data_key, loss_key = jax.random.split(key)
        x1 = MEAN + STD * jax.random.normal(data_key, (groups * size, 1))
        return jax.value_and_grad(lambda p: objective(p, loss_key, types.Batch(x1))[0].mean())(jnp.array([a, b]))

    keys = jax.random.split(jax.random.key(5), batches)
    return jax.device_get(jax.jit(lambda ks: jax.lax.map(one, ks, batch_size=200))(keys))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize(("s", "t", "a", "b"), [(0.0, 1.0, 0.0, 0.0), (0.2, 0.9, 0.3, 0.0), (0.0, 1.0, -0.2, 0.5)])
def test_the_loss_is_unbiased(size, s, t, a, b, assert_mean):
    """With x_i compared with y_i, which comes of the same pair, or with i = j within x, the mean is another one."""
    mean, std = marginal(t)
    value = energy((1 + b) * mean + a, (1 + b) * std, mean, std)
    assert_mean(sampled(size, s, t, a, b)[0], value)


@pytest.mark.representatives("0.04-10000")
@pytest.mark.parametrize(("off", "batches"), [(0.04, 10_000), (0.02, 40_000)])
def test_the_expected_gradient_vanishes_at_the_exact_map_alone(off, batches):
    """Within four standard errors there, and beyond ten of them for a map that is a few per cent off.

    To second order the distance is a^2/(sigma sqrt pi), so that its slope at a = 0.02 sigma is 0.04/sqrt(pi) = 0.0226.
    """
    at_truth, beside = (sampled(SIZE, 0.0, 1.0, a, b, batches, 8)[1] for a, b in ((0.0, 0.0), (off * STD, off)))
    error = at_truth.std(0, ddof=1) / np.sqrt(batches)
    assert np.all(np.abs(at_truth.mean(0)) < 4 * error), at_truth.mean(0) / error
    error = beside.std(0, ddof=1) / np.sqrt(batches)
    assert np.max(np.abs(beside.mean(0)) / error) > 10, beside.mean(0) / error
    h = 1e-5
    slope = [
        (energy(MEAN * (1.0 + off) + off * STD + d * da, STD * (1.0 + off) + d * db, MEAN, STD))
        for d, da, db in ((h, 1, 0), (-h, 1, 0))
    ]
    assert abs(beside.mean(0)[0] - (slope[0] - slope[1]) / (2 * h)) < 4 * error[0]


def test_the_distance_against_the_double_sum(key):
    x, y = np.random.default_rng(0).normal(size=(2, 5, 3, 2))
    square = lambda a, b: np.sqrt(np.sum((a - b) ** 2))  # noqa: E731
    total = sum(
        2 * square(x[i], y[j]) - square(x[i], x[j]) - square(y[i], y[j]) for i in range(5) for j in range(5) if i != j
    )
    got = squared_energy_distance(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(got, total / 20, rtol=1e-12)
    tree = lambda z: {"a": jnp.asarray(z[:, 0]), "b": jnp.asarray(z[:, 1:])}  # noqa: E731
    np.testing.assert_allclose(squared_energy_distance(tree(x), tree(y)), total / 20, rtol=1e-12)
    for wrong in ((x[:1], y[:1]), (x, y[:4]), ({"a": x}, y)):
        with pytest.raises(ValueError, match=r"^x: expected"):
            squared_energy_distance(*jax.tree.map(jnp.asarray, wrong))


def test_equal_samples_give_finite_gradients(key):
    """Duplicates within x, within y, and x_i equal to y_j: the gradient of a distance of zero is zero."""
    still = types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: p * x)
    law = times.independent(times.constant(0.0), times.constant(1.0))
    objective = objectives.energy_distance(still, PATH, size=4, pairs=law)
    x = jnp.array([[1.0], [1.0], [2.0], [2.0]])
    for x0 in (x, x[::-1], jnp.zeros_like(x)):
        for theta in (0.0, 0.5):
            value, slope = jax.jit(
                jax.value_and_grad(lambda p, x0=x0: objective(p, clone(key), types.Batch(x, x0))[0].mean())
            )(theta)
            assert np.isfinite(value) and np.isfinite(slope)
    # All equal and at rest: no distance at all.
    ones = jnp.ones((4, 1))
    value, slope = jax.jit(jax.value_and_grad(lambda p: objective(p, clone(key), types.Batch(ones, ones))[0].mean()))(
        0.0
    )
    assert value == 0.0 and slope == 0.0


@pytest.mark.slow
def test_the_example_runs():
    lines = objectives.energy_distance.__doc__.split("classes::")[1].split("    Args:")[0]
    found = {}
    exec(textwrap.dedent(lines), found)
    assert found["loss"].shape == (8,) and np.isfinite(found["loss"]).all()
    assert int(found["aux"].metrics["energy/mixed_groups"].value()) == 0
