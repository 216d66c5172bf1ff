"""What all distances ask of their samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import metrics


def normal(key, n, mean=0.0, scale=1.0, shape=(), dtype=jnp.float64):
    return mean + scale * jax.random.normal(key, (n, *shape), dtype)


def sets(seed, n, m, dimension, mean=0.4, scale=1.5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dimension)), rng.normal(mean, scale, size=(m, dimension))


@pytest.mark.representatives("12-energy_distance", "12-mmd", "12-sliced_wasserstein", "12-median_bandwidth")
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
