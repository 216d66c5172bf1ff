"""Dequantised images: the way there and back, and bits per dimension against code lengths that are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import likelihood


@pytest.mark.parametrize(
    ("levels", "dtype"), [(17, jnp.float32), (256, jnp.float32), (1000, jnp.float32), (17, jnp.float64)]
)
def test_the_levels_come_back_exactly(levels, dtype, key):
    """17 levels (scikit-learn's digits) are no power of two: x is rounded, and the cell must hold nevertheless."""
    pixels = np.broadcast_to(np.arange(levels), (500, levels))
    x = jax.jit(lambda key, pixels: likelihood.dequantise(key, pixels, levels, dtype=dtype))(key, pixels)
    assert x.dtype == dtype and x.shape == pixels.shape
    assert np.min(x) > -1.0 and np.max(x) < 1.0
    back = jax.jit(lambda x: likelihood.quantise(x, levels))(x)
    assert back.dtype == jnp.int32
    np.testing.assert_array_equal(back, pixels)


def test_the_noise_fills_each_cell_evenly_and_is_new_for_each_entry(assert_mean, key):
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 17, (4000, 3)), jnp.uint8)
    x = np.asarray(likelihood.dequantise(key, pixels, 17))
    u = (x + 1.0) * 17 / 2 - np.asarray(pixels)
    assert u.min() >= 0.0 and u.max() <= 1.0
    assert_mean(np.stack([u, u**2, u**3]).transpose(1, 2, 0), np.broadcast_to([1 / 2, 1 / 3, 1 / 4], (3, 3)))
    assert_mean((u[:, 0] - 0.5) * (u[:, 1] - 0.5), 0.0)


def test_samples_outside_go_to_the_end_levels():
    x = jnp.asarray([-7.0, -1.0, -0.01, 0.0, 0.999, 1.0, 3.0])
    np.testing.assert_array_equal(likelihood.quantise(x, 4), [0, 0, 1, 2, 3, 3, 3])


def test_a_uniform_density_takes_all_bits():
    d = 12
    np.testing.assert_allclose(likelihood.bits_per_dim(jnp.asarray(-d * np.log(2.0)), d), 8.0, rtol=1e-14)
    np.testing.assert_allclose(likelihood.bits_per_dim(jnp.asarray(-d * np.log(2.0)), d, levels=17), np.log2(17))


def test_a_density_that_is_constant_in_each_cell_has_the_code_length_of_its_levels(key):
    """p(x) = P(q) (L/2)^d: then bits per dimension are -log2 P(q) / d to the last digit, without a bound."""
    levels, d = 17, 5
    chance = np.random.default_rng(1).dirichlet(np.ones(levels))
    pixels = np.random.default_rng(2).choice(levels, size=(50, d), p=chance)
    x = likelihood.dequantise(key, pixels, levels)
    log_density = np.sum(np.log(chance[likelihood.quantise(x, levels)] * levels / 2), axis=1)
    found = likelihood.bits_per_dim(jnp.asarray(log_density), d, levels=levels)
    np.testing.assert_allclose(found, -np.log2(chance[pixels]).mean(axis=1), rtol=1e-12)
    # Scaled by 1/3 the density is 3^d times higher, and the interval a third as wide: the same code.
    scaled = likelihood.bits_per_dim(jnp.asarray(log_density + d * np.log(3.0)), d, levels=levels, width=2 / 3)
    np.testing.assert_allclose(scaled, found, rtol=1e-12)


def test_a_density_that_is_not_is_scored_from_above(key):
    """Within a cell of slope, the mean of the log is below the log of the mean (1511.01844)."""
    levels, slope = 4, 1.8
    grid = np.linspace(-1.0, 1.0, levels + 1)
    chance = np.diff(np.exp(slope * grid)) / (np.exp(slope) - np.exp(-slope))
    pixels = jnp.broadcast_to(jnp.arange(levels)[:, None], (levels, 20_000))
    x = likelihood.dequantise(key, pixels, levels)
    log_density = slope * x + np.log(slope / (np.exp(slope) - np.exp(-slope)))
    bits = np.asarray(likelihood.bits_per_dim(log_density, 1, levels=levels)).mean(axis=1)
    # The gap in nats is log(sinh(h)/h), h half the rise of the log-density in a cell.
    h = slope / levels
    np.testing.assert_allclose(bits + np.log2(chance), np.log2(np.sinh(h) / h), atol=0.02)
    assert np.log2(np.sinh(h) / h) > 0.045


KEY = jax.random.key(0)
PIXELS = np.arange(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: likelihood.dequantise(KEY, PIXELS.astype(float)), TypeError, "pixels: expected integers.*float64"),
        (lambda: likelihood.dequantise(KEY, PIXELS, 4.0), TypeError, "levels: "),
        (lambda: likelihood.dequantise(KEY, PIXELS, 1), ValueError, "levels: "),
        (lambda: likelihood.dequantise(KEY, PIXELS, 3), ValueError, "pixels: expected levels from 0 to 2, got 0 to 3"),
        (lambda: likelihood.dequantise(KEY, -PIXELS, 3), ValueError, "pixels: .*got -3 to 0"),
        (lambda: likelihood.dequantise(KEY, PIXELS, dtype=jnp.bfloat16), ValueError, "dtype: .*256 levels.*bfloat16"),
        (lambda: likelihood.dequantise(KEY, PIXELS, dtype=jnp.int32), TypeError, "dtype: expected a floating"),
        (lambda: likelihood.quantise(PIXELS), TypeError, "x: expected floating"),
        (lambda: likelihood.quantise(np.ones(2), 0), ValueError, "levels: "),
        (lambda: likelihood.bits_per_dim(np.ones(2), 0), ValueError, "dims: "),
        (lambda: likelihood.bits_per_dim(np.ones(2), 2.0), TypeError, "dims: "),
        (lambda: likelihood.bits_per_dim(np.ones(2), 2, levels=1), ValueError, "levels: "),
        (lambda: likelihood.bits_per_dim(np.ones(2), 2, width=0.0), ValueError, "width: "),
        (lambda: likelihood.bits_per_dim(PIXELS, 2), TypeError, "log_density: expected floating"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
