"""Energy distance and kernel distances against double sums and closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import metrics

SQUARED = {"energy": metrics.energy_distance, "mmd": functools.partial(metrics.mmd, bandwidths=[0.7, 2.0])}


def normal(key, n, mean=0.0, scale=1.0, shape=(), dtype=jnp.float64):
    return mean + scale * jax.random.normal(key, (n, *shape), dtype)


def mean_absolute(shift, std):
    """E|Z| of Z ~ N(shift, std²)."""
    scaled = shift / (std * math.sqrt(2))
    return std * math.sqrt(2 / math.pi) * math.exp(-(scaled**2)) + shift * math.erf(scaled)


def mean_gaussian(shift, std, widths):
    """E mean_h exp(-Z²/(2h²)) of Z ~ N(shift, std²)."""
    values = [h / math.hypot(h, std) * math.exp(-(shift**2) / (2 * (h * h + std * std))) for h in widths]
    return sum(values) / len(values)


def closed_form(name, mean, scale):
    """The squared distance between N(0, 1) and N(mean, scale²)."""
    between, first, second = math.hypot(1.0, scale), math.sqrt(2), math.sqrt(2) * scale
    if name == "energy":
        return 2 * mean_absolute(mean, between) - mean_absolute(0.0, first) - mean_absolute(0.0, second)
    kernel = functools.partial(mean_gaussian, widths=[0.7, 2.0])
    return kernel(0.0, first) + kernel(0.0, second) - 2 * kernel(mean, between)


def kernels(name, x, y):
    distance = np.sqrt(np.sum((x[:, None] - y[None]) ** 2, axis=-1))
    return -distance if name == "energy" else np.mean([np.exp(-((distance / h) ** 2) / 2) for h in (0.7, 2.0)], 0)


def brute_force(name, x, y, biased):
    xx, yy, xy = kernels(name, x, x), kernels(name, y, y), kernels(name, x, y)
    if not biased:
        xx, yy = (k[~np.eye(len(k), dtype=bool)] for k in (xx, yy))
    return xx.mean() + yy.mean() - 2 * xy.mean()


def sets(seed, n, m, dimension, mean=0.4, scale=1.5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dimension)), rng.normal(mean, scale, size=(m, dimension))


@pytest.mark.parametrize(("name", "dimension"), [("energy", 1), ("energy", 12), ("mmd", 3)])
def test_two_sample_statistics_are_the_double_sums(name, dimension):
    x, y = sets(0, 23, 17, dimension)
    for biased in (False, True):
        expected = brute_force(name, x, y, biased)
        # Blocks that do not divide the sets, with padding on both sides.
        got = SQUARED[name](x, y, biased=biased, chunk=5)
        np.testing.assert_allclose(got.value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SQUARED)
def test_jackknife_error_is_that_of_leaving_samples_out(name):
    x, y = sets(1, 9, 7, 2)
    left = np.array([brute_force(name, np.delete(x, i, 0), y, False) for i in range(9)])
    right = np.array([brute_force(name, x, np.delete(y, i, 0), False) for i in range(7)])
    expected = math.sqrt(8 * left.var() + 6 * right.var())
    np.testing.assert_allclose(SQUARED[name](x, y).standard_error, expected, rtol=1e-8)


@pytest.mark.parametrize("name", SQUARED)
@pytest.mark.parametrize(("mean", "scale"), [(0.8, 1.6), (0.0, 1.0)])
def test_unbiased_around_the_closed_form_with_an_honest_error(name, mean, scale):
    repeats = 200
    x_key, y_key = jax.random.split(jax.random.key(2))
    x, y = normal(x_key, repeats, shape=(60,)), normal(y_key, repeats, mean, scale, shape=(80,))
    draws = jax.jit(jax.vmap(SQUARED[name]))(x, y)
    spread = np.std(draws.value, ddof=1)
    assert abs(np.mean(draws.value) - closed_form(name, mean, scale)) < 4 * spread / math.sqrt(repeats)
    reported = np.sqrt(np.mean(np.square(draws.standard_error)))
    # The spread itself is known to 5 %; at equal laws the jackknife is conservative, by about √2.
    assert 0.8 * spread < reported < (1.3 if mean else 2.0) * spread


def test_float32_keeps_the_digits_of_a_small_energy_distance():
    x, y = (z + 5.0 for z in sets(3, 3000, 2500, 2, 0.0, 1.0))
    wide = metrics.energy_distance(x, y)
    narrow = metrics.energy_distance(x.astype(np.float32), y.astype(np.float32))
    assert narrow.value.dtype == jnp.float32
    assert abs(float(narrow.value) - float(wide.value)) < 0.02 * float(wide.standard_error)


def test_bandwidths_follow_the_median_and_bad_ones_are_refused():
    x, y = sets(4, 40, 30, 3)
    pooled = np.concatenate([x, y])
    distance = np.sqrt(np.sum((pooled[:, None] - pooled[None]) ** 2, axis=-1))
    median = np.median(distance[np.triu_indices(70, 1)])
    np.testing.assert_allclose(metrics.median_bandwidth(x, y), median, rtol=1e-12)
    stated = metrics.mmd(x, y, bandwidths=[0.5 * median, median, 2 * median])
    np.testing.assert_allclose(metrics.mmd(x, y).value, stated.value, rtol=1e-12)
    for bad in ([], [1.0, -1.0], [float("nan")], 1.0):
        with pytest.raises(ValueError, match="bandwidths"):
            metrics.mmd(x, y, bandwidths=bad)


def test_kernel_distance_is_the_cubic_double_sum():
    x, y = sets(5, 11, 13, 4)
    xx, yy, xy = ((a @ b.T / 4 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    off = [k[~np.eye(len(k), dtype=bool)].mean() for k in (xx, yy)]
    np.testing.assert_allclose(metrics.kernel_distance(x, y).value, sum(off) - 2 * xy.mean(), rtol=1e-9)


def test_kernel_distance_of_float32_features_with_a_large_mean():
    """The kernel is 1e6 here, and the statistic 1e-4 of it: the double sums in float64 say what it is."""
    x, y = (z.astype(np.float32) for z in sets(19, 300, 250, 30, 0.0, 1.02))
    x, y = x + np.float32(10), y + np.float32(10.01)
    wide, narrow = (metrics.kernel_distance(x.astype(d), y.astype(d)) for d in (np.float64, np.float32))
    xx, yy, xy = (
        (a @ b.T / 30 + 1) ** 3
        for a, b in ((x, x), (y, y), (x, y))
        for a, b in [(a.astype(np.float64), b.astype(np.float64))]
    )
    off = [k[~np.eye(len(k), dtype=bool)].mean() for k in (xx, yy)]
    np.testing.assert_allclose(wide.value, sum(off) - 2 * xy.mean(), rtol=1e-7)
    np.testing.assert_allclose(narrow.value, wide.value, rtol=1e-4)
    np.testing.assert_allclose(narrow.standard_error, wide.standard_error, rtol=1e-4)
