"""Fréchet and sliced Wasserstein distances against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import metrics


def sets(seed, n, m, dimension, mean=0.4, scale=1.5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dimension)), rng.normal(mean, scale, size=(m, dimension))


def test_frechet_distance_of_covariances_that_do_not_commute():
    x, y = sets(6, 50, 40, 3)
    x = x @ np.array([[1.0, 0.5, 0.0], [0.0, 2.0, -1.0], [0.0, 0.0, 0.7]])
    y = y @ np.array([[0.4, 0.0, 0.9], [0.0, 1.0, 0.3], [0.0, 0.0, 1.5]])
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    cross = np.sum(np.sqrt(np.linalg.eigvals(cov_x @ cov_y).real))
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov_x + cov_y) - 2 * cross
    np.testing.assert_allclose(metrics.frechet_distance(x, y), expected, rtol=1e-9)
    np.testing.assert_allclose(metrics.frechet_distance(x, x + 2.0), 12.0, rtol=1e-9)


def of_rank(rank, n, dimension, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, rank)) @ rng.normal(size=(rank, dimension))


def with_moments(mean, root, n, seed):
    """n points of exactly this mean and covariance root root'."""
    z = np.random.default_rng(seed).normal(size=(n, len(root)))
    z = np.linalg.qr(z - z.mean(axis=0))[0] * math.sqrt(n - 1)
    return mean + z @ root.T


@pytest.mark.representatives("0.0-20-12-64", "1000000.0-8-600-64", "1000000.0-1-9-1")
@pytest.mark.parametrize(
    ("rank", "n", "dimension"),
    [
        (8, 600, 64),
        (64, 600, 64),
        pytest.param(8, 3000, 256, marks=pytest.mark.slow),
        pytest.param(256, 3000, 256, marks=pytest.mark.slow),
        (20, 12, 64),
        (1, 2, 5),
        (1, 9, 1),
    ],
)
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_frechet_distance_of_a_set_with_itself_and_shifted(rank, n, dimension, offset):
    """At any rank, with fewer samples than features, and far from the origin."""
    # Multiples of 2^-20 below 2^10: the sums with the offset and the shift are exact.
    x = np.round(of_rank(rank, n, dimension) * 2.0**20) / 2.0**20
    shift = np.round(np.random.default_rng(1).normal(size=dimension) * 2.0**10) / 2.0**10
    trace = np.var(x, axis=0, ddof=1).sum()
    x = x + offset
    for y in (x, x[::-1]):
        assert 0.0 <= metrics.frechet_distance(x, y) <= 1e-12 * trace
    np.testing.assert_allclose(metrics.frechet_distance(x, x + shift), shift @ shift, rtol=1e-9)
    np.testing.assert_allclose(metrics.frechet_distance(x + shift, x[::-1]), shift @ shift, rtol=1e-9)


def test_frechet_distance_of_known_gaussians():
    """Commuting covariances: |a|² + sum (s - r)²; and planes at an angle φ: 2 - 2 |cos φ| for two lines of variance 1."""
    rng = np.random.default_rng(2)
    turn, shift = np.linalg.qr(rng.normal(size=(6, 6)))[0], rng.normal(size=6)
    first, second = np.array([3.0, 1.0, 0.5, 1e-6, 0.0, 0.0]), np.array([1.0, 2.0, 0.0, 1e-3, 0.7, 0.0])
    x = with_moments(0.0, turn * first, 40, 3)
    y = with_moments(shift, turn * second, 50, 4)
    expected = shift @ shift + np.sum((first - second) ** 2)
    np.testing.assert_allclose(metrics.frechet_distance(x, y), expected, rtol=1e-12)
    np.testing.assert_allclose(metrics.frechet_distance(y, x), expected, rtol=1e-12)
    for angle in (1e-5, 0.3, np.pi / 2, 3.0):
        line = np.array([-1.0, 1.0])[:, None] / math.sqrt(2)
        x, y = line * [1.0, 0.0], line * [math.cos(angle), math.sin(angle)]
        # 4 sin² of half the angle between the lines, which loses no digits.
        half = min(angle, np.pi - angle) / 2
        np.testing.assert_allclose(metrics.frechet_distance(x, y), 4 * math.sin(half) ** 2, rtol=1e-9)


def test_frechet_distance_is_that_of_the_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    x, y = of_rank(20, 300, 20) + 100.0, of_rank(20, 200, 20, 1)
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(cov_x @ cov_y).real
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov_x + cov_y - 2 * root)
    np.testing.assert_allclose(metrics.frechet_distance(x, y), expected, rtol=1e-9)
    np.testing.assert_allclose(jax.jit(metrics.frechet_distance)(x, y), expected, rtol=1e-9)


def test_frechet_distance_of_constant_features_is_the_squared_shift():
    x = np.tile(np.array([3.0, -2.0, 1e5]), (7, 1))
    assert metrics.frechet_distance(x, x[:4]) == 0.0
    np.testing.assert_allclose(metrics.frechet_distance(x, x + np.array([1.0, 2.0, 2.0])), 9.0, rtol=1e-12)


@pytest.mark.representatives("True-bfloat16", "False-float16", "False-float32")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("x64", [True, False])
def test_frechet_distance_of_narrow_features_is_that_of_their_values(dtype, x64):
    x, y = (of_rank(4, n, 30, n).astype(dtype) for n in (200, 150))
    expected = metrics.frechet_distance(x.astype(np.float64), y.astype(np.float64))
    with jax.enable_x64(x64):
        got = metrics.frechet_distance(x, y)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected, rtol=1e-12)
        jitted, dtype = jax.jit(metrics.frechet_distance), jnp.float64 if x64 else jnp.float32
        assert jitted(x, y).dtype == dtype and jitted(x, y) == got.astype(dtype)
        assert jnp.isnan(jitted(jnp.asarray(x).at[0, 0].set(jnp.nan), y))
        both = jax.vmap(metrics.frechet_distance, (0, None))(jnp.stack([x[:150], y]), y)
        assert both[1] <= 1e-12 * np.var(y.astype(np.float64), axis=0).sum() < both[0]


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("scale", [1e-150, 1e25, 1e150])
def test_frechet_distance_scales_with_its_features(scale, x64):
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(12, 3)), rng.normal(size=(9, 3)) + 1.0
    with jax.enable_x64(x64):
        expected = metrics.frechet_distance(x, y)
        assert expected.dtype == np.float64
        np.testing.assert_allclose(metrics.frechet_distance(scale * x, scale * y) / scale / scale, expected, rtol=1e-12)


@pytest.mark.parametrize("offset", [1e200, 1.7e308])
def test_frechet_distance_of_features_whose_squares_overflow(offset):
    """It is right if float64 can hold the distance itself, and refused by name if not."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(12, 1)), rng.normal(size=(9, 1))
    wide = [np.concatenate([np.full_like(z, offset), z], axis=1) for z in (x, y)]
    np.testing.assert_allclose(metrics.frechet_distance(*wide), metrics.frechet_distance(x, y), rtol=1e-12)
    with pytest.raises(ValueError, match=r"^x, y: expected features whose squared distance float64 can hold"):
        metrics.frechet_distance(offset * (x / 8.0), offset * (y / 8.0))
    with pytest.raises(ValueError, match=r"^x: expected finite samples, got NaN or infinity in 12 of 12"):
        metrics.frechet_distance(np.inf * x, y)


@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd])
def test_frechet_distance_has_no_derivative(derivative):
    x = jnp.asarray(np.random.default_rng(7).normal(size=(4, 2)))
    with pytest.raises(TypeError, match=r"^x, y: expected no derivative of frechet_distance, which runs on the host"):
        derivative(lambda x: metrics.frechet_distance(x, x + 1.0))(x)


def test_frechet_distance_needs_two_samples():
    with pytest.raises(ValueError, match="y: expected at least 2 samples, got shape \\(1, 3\\)"):
        metrics.frechet_distance(np.ones((2, 3)), np.ones((1, 3)))


@pytest.mark.parametrize("p", [1, 2])
def test_sliced_wasserstein_on_the_line_couples_quantiles(p):
    x, y = (z[:, 0] for z in sets(7, 6, 4, 1))
    # Both sets repeated to a common size have a sorted coupling one to one.
    left, right = np.sort(np.repeat(x, 2)), np.sort(np.repeat(y, 3))
    expected = np.mean(np.abs(left - right) ** p) ** (1 / p)
    got = metrics.sliced_wasserstein(jax.random.key(8), x, y, p=p, projections=3)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    shift, projections = np.array([0.3, -1.2, 0.4]), 4000
    x, _ = sets(9, 20, 1, 3)
    got = metrics.sliced_wasserstein(jax.random.key(8), x, x + shift, projections=projections) ** 2
    square = np.sum(shift**2)
    # Var (θ·a)² = |a|⁴ (3/(d(d+2)) - 1/d²).
    error = square * math.sqrt((3 / 15 - 1 / 9) / projections)
    assert abs(got - square / 3) < 4 * error
    assert metrics.sliced_wasserstein(jax.random.key(9), x, x[::-1]) < 1e-12
