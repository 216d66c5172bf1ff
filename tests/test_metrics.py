"""Distances against closed forms, brute force and their own standard errors."""

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


@pytest.mark.parametrize(("rank", "n", "dimension"), [(8, 600, 64), (64, 600, 64), (20, 12, 64), (1, 2, 5), (1, 9, 1)])
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


@pytest.mark.parametrize("name", ["energy_distance", "mmd", "sliced_wasserstein", "median_bandwidth"])
@pytest.mark.parametrize("dimension", [2, 12])
def test_a_common_offset_changes_no_digits(name, dimension):
    """Float64 samples far from the origin, where jax has no float64: they are moved before they are rounded."""
    x, y = (np.round(z * 2.0**12) / 2.0**12 for z in sets(18, 60, 50, dimension))
    measure = getattr(metrics, name)
    if name == "sliced_wasserstein":
        measure = lambda x, y: metrics.sliced_wasserstein(jax.random.key(8), x, y)  # noqa: E731
    with jax.enable_x64(False):
        expected, moved = measure(x, y), measure(x + 1e9, y + 1e9)
    np.testing.assert_allclose(jax.tree.leaves(moved), jax.tree.leaves(expected), rtol=1e-4)


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


def checkerboard(key, n):
    cell_key, place_key = jax.random.split(key)
    cell = jax.random.randint(cell_key, (n,), 0, 8)
    corner = jnp.stack([cell // 2, 2 * (cell % 2) + (cell // 2) % 2], axis=1)
    return -1 + 0.5 * (corner.astype(jnp.float64) + jax.random.uniform(place_key, (n, 2)))


def on_board(x):
    cell = jnp.floor((x + 1) / 0.5).astype(jnp.int32)
    return (cell[0] + cell[1]) % 2 == 0


def board_density(x):
    return jnp.where(on_board(x), 0.5, 0.0)


@pytest.mark.parametrize(
    ("bins", "samples", "low", "high"),
    [
        # Bins on the support over twice the number of samples: 2048/200,000 and so on.
        (64, 100_000, 0.0095, 0.0113),
        (48, 64_000, 0.0080, 0.0105),
        (52, 64_000, 0.0095, 0.0125),
        (64, 64_000, 0.0150, 0.0180),
        # Edges on bin centres cost log 2 on the four lines of bins that they cut, .055, on top.
        (50, 64_000, 0.0640, 0.0690),
        (50, 100_000, 0.0600, 0.0650),
    ],
)
def test_histogram_floor_of_the_checkerboard(bins, samples, low, high):
    floor = metrics.histogram_kl_floor(
        jax.random.key(10), checkerboard, board_density, bins=bins, samples=samples, repeats=3
    )
    assert low < float(floor.value) < high
    assert 0 < float(floor.standard_error) < 0.002


def test_histogram_counts_lost_mass_and_keeps_its_axes():
    points = jax.random.uniform(
        jax.random.key(11), (4000, 2), minval=jnp.array([-1.0, -1.0]), maxval=jnp.array([0.0, 0.5])
    )

    def density(x):
        return jnp.where((x[0] < 0.0) & (x[1] < 0.5), 1 / 1.5, 0.0)

    inside = metrics.histogram_kl(points, density, bins=8)
    # Half of the samples lost: ρ̂ halves wherever ρ is, and the quadrature of ρ is one here.
    lost = jnp.concatenate([points, jnp.full((2000, 2), 1e30), jnp.full((2000, 2), -1.01)])
    np.testing.assert_allclose(metrics.histogram_kl(lost, density, bins=8) - inside, math.log(2), rtol=1e-6)
    assert inside < 0.01
    assert metrics.histogram_kl(points[:, ::-1], density, bins=8) > 1.0
    centres = metrics.bin_centres(8)
    array = jax.vmap(jax.vmap(density))(jnp.asarray(centres))
    assert metrics.histogram_kl(points, array, bins=8) == inside
    jitted = jax.jit(lambda z: metrics.histogram_kl(z, density, bins=8))
    np.testing.assert_allclose(jitted(points), inside, rtol=1e-12)
    assert jnp.isnan(jitted(points.at[0, 0].set(jnp.nan)))


def test_histogram_of_a_few_points_by_hand():
    # 2 x 2 bins of area 1; the upper edge 2 belongs to the last bin, the inner edge 1 to the upper one.
    points = jnp.array([[0.0, 0.0], [0.5, 1.0], [2.0, 2.0], [1.0, 0.2]])
    density = jnp.array([[0.1, 0.2], [0.3, 0.4]])
    expected = float(jnp.sum(density * jnp.log(density / 0.25)))
    got = metrics.histogram_kl(points, density, bins=2, low=0.0, high=2.0, pseudo_density=0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    empty = metrics.histogram_kl(points[:3], density, bins=2, low=0.0, high=2.0)
    np.testing.assert_allclose(
        empty, float(jnp.sum(density * jnp.log(density / jnp.array([[1 / 3, 1 / 3], [1e-8, 1 / 3]]))))
    )


def test_mass_off_support():
    good, bad = checkerboard(jax.random.key(12), 900), jnp.tile(jnp.array([[0.25, -0.25]]), (100, 1))
    got = metrics.mass_off_support(jnp.concatenate([good, bad, bad + 3.0, 0 * bad + 0.75]), on_board)
    # (3.25, 2.75) lies outside the square, but this indicator goes on periodically.
    np.testing.assert_allclose(got.value, 200 / 1200)
    np.testing.assert_allclose(got.standard_error, math.sqrt(200 / 1200 * 1000 / 1200 / 1200))
    assert metrics.mass_off_support(good, on_board).value == 0.0
    with pytest.raises(TypeError, match="indicator"):
        metrics.mass_off_support(good, lambda x: x[0])


def cases(x):
    key = jax.random.key(13)
    return {
        "energy_distance": lambda y: metrics.energy_distance(x, y),
        "mmd": lambda y: metrics.mmd(x, y),
        "kernel_distance": lambda y: metrics.kernel_distance(x, y),
        "frechet_distance": lambda y: metrics.frechet_distance(x, y),
        "sliced_wasserstein": lambda y: metrics.sliced_wasserstein(key, x, y),
        "histogram_kl": lambda y: metrics.histogram_kl(y, board_density),
        "mass_off_support": lambda y: metrics.mass_off_support(y, on_board),
    }


@pytest.mark.parametrize("name", cases(None))
def test_bad_samples_are_refused(name):
    x = checkerboard(jax.random.key(14), 10)
    measure = cases(x)[name]
    for value in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match="finite samples, got NaN or infinity in 1 of 10"):
            measure(x.at[3, 1].set(value))
    with pytest.raises(ValueError, match="at least"):
        measure(x[:0])
    with pytest.raises(TypeError, match="floating-point"):
        measure(jnp.ones((10, 2), jnp.int32))
    with pytest.raises(ValueError, match="expected samples"):
        measure(jnp.float64(1.0))
    if name != "mass_off_support":
        with pytest.raises(ValueError, match="dimension"):
            measure(jnp.ones((10, 3)))


def test_images_are_flattened_and_half_precision_is_widened():
    x = normal(jax.random.key(15), 12, shape=(2, 3), dtype=jnp.bfloat16)
    y = normal(jax.random.key(16), 12, shape=(2, 3), dtype=jnp.bfloat16)
    flat = metrics.energy_distance(x.reshape(12, 6).astype(jnp.float32), y.reshape(12, 6).astype(jnp.float32))
    assert metrics.energy_distance(x, y) == flat


def test_other_bad_arguments():
    x = checkerboard(jax.random.key(17), 10)
    with pytest.raises(ValueError, match="density"):
        metrics.histogram_kl(x, jnp.full((64, 64), -1.0))
    with pytest.raises(ValueError, match="density"):
        metrics.histogram_kl(x, jnp.ones((4, 4)))
    with pytest.raises(ValueError, match="high"):
        metrics.histogram_kl(x, board_density, low=1.0, high=1.0)
    with pytest.raises(ValueError, match="p: expected one of"):
        metrics.sliced_wasserstein(jax.random.key(18), x, x, p=3)
    with pytest.raises(ValueError, match="chunk"):
        metrics.energy_distance(x, x, chunk=0)
