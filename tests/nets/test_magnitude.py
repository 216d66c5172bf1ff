"""Magnitudes of the layers of EDM2, by quadrature or on many samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jflow.nets import magnitude

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(80)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def test_silu_keeps_the_magnitude_of_a_normal():
    square = WEIGHTS @ np.square(magnitude.mp_silu(jnp.asarray(NODES)))
    np.testing.assert_allclose(np.sqrt(square), 1.0, atol=2e-3)


def test_sums_and_concatenations():
    a, b = np.eye(2)[:, :1] * np.ones(3), np.eye(2)[:, 1:] * np.ones(6)
    # Independent parts: the squares add.
    for weight in (0.3, 0.5):
        parts = magnitude.mp_sum(1.0, 0.0, weight), magnitude.mp_sum(0.0, 1.0, weight)
        np.testing.assert_allclose(np.sum(np.square(parts)), 1.0, rtol=1e-12)
        np.testing.assert_allclose(parts[1] / parts[0], weight / (1 - weight), rtol=1e-12)
        joined = np.asarray(magnitude.mp_concatenate(jnp.asarray(a[:1]), jnp.asarray(b[1:]), weight))[0]
        np.testing.assert_allclose(np.mean(joined**2), 1.0, rtol=1e-12)
        ratio = np.linalg.norm(joined[3:]) / np.linalg.norm(joined[:3])
        np.testing.assert_allclose(ratio, weight / (1 - weight), rtol=1e-12)


def test_normalised_weights_and_pixels():
    rng = np.random.RandomState(0)
    kernel = 7.0 * rng.normal(size=(3, 3, 4, 5))
    found = np.asarray(magnitude.normalise_weights(jnp.asarray(kernel)))
    expected = kernel / (1e-4 + np.sqrt(np.mean(kernel**2, axis=(0, 1, 2), keepdims=True)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    x = rng.normal(size=(2, 6))
    expected = x / (1e-4 + np.sqrt(np.mean(x**2, axis=1, keepdims=True)))
    np.testing.assert_allclose(magnitude.pixel_norm(jnp.asarray(x)), expected, rtol=1e-12)
    zero = jax.jit(jax.grad(lambda x: jnp.sum(magnitude.pixel_norm(x) + magnitude.normalise_weights(x))))
    assert np.all(np.isfinite(zero(jnp.zeros((2, 6)))))


def test_a_layer_does_not_depend_on_the_size_of_its_weights():
    layer = magnitude.MPConvolution(8, 3, "matmul", jnp.float64, jnp.float64)
    x = jnp.asarray(np.random.RandomState(0).normal(size=(20, 20, 16)))
    params = layer.init(jax.random.key(0), x)["params"]
    assert list(params) == [magnitude.KERNEL]
    run = jax.jit(lambda size: layer.apply({"params": {magnitude.KERNEL: size * params[magnitude.KERNEL]}}, x))
    out = run(1.0)
    np.testing.assert_allclose(run(1000.0), out, rtol=3e-4)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(out[1:-1, 1:-1]))), 1.0, atol=0.05)
