"""Features of times and points against their formulas, dtypes and derivatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.nets import embeddings

SCALARS = {"sinusoidal": embeddings.sinusoidal, "fourier": embeddings.fourier}
POINTS = {
    "octaves": lambda x: embeddings.octaves(x, 3),
    "random_fourier": lambda x: embeddings.random_fourier(x, 6),
}


def test_sinusoidal_formula():
    t, got = 0.3, embeddings.sinusoidal(0.3, 6, lowest=0.25, highest=4.0)
    phases = 2 * np.pi * np.array([0.25, 1.0, 4.0]) * t
    np.testing.assert_allclose(got, np.concatenate([np.sin(phases), np.cos(phases)]), rtol=1e-12)


def test_fourier_frequencies_are_constants():
    t = jnp.float64(1e-6)
    frequencies = embeddings.fourier(t, 4000, scale=2.0, seed=3)[:2000] / (2 * np.pi * t)
    # Standard error of a standard deviation: sigma / sqrt(2 n).
    assert abs(frequencies.std() - 2.0) < 4 * 2.0 / np.sqrt(4000)
    assert abs(frequencies.mean()) < 4 * 2.0 / np.sqrt(2000)
    np.testing.assert_array_equal(embeddings.fourier(0.3, 8, seed=1), embeddings.fourier(0.3, 8, seed=1))
    assert not np.allclose(embeddings.fourier(0.3, 8, seed=1), embeddings.fourier(0.3, 8, seed=2))
    # The stream is frozen: these numbers are part of every checkpoint made with them.
    first = np.random.RandomState(0).standard_normal(1)[0]
    np.testing.assert_allclose(first, 1.764052345967664)
    np.testing.assert_allclose(embeddings.fourier(0.3, 2, scale=0.5)[0], np.sin(2 * np.pi * 0.5 * first * 0.3))


def test_octaves_formula():
    x = np.array([0.2, -0.7])
    phases = np.concatenate([np.pi * x, 2 * np.pi * x, 4 * np.pi * x])
    np.testing.assert_allclose(
        embeddings.octaves(jnp.asarray(x), 3), np.concatenate([x, np.sin(phases), np.cos(phases)]), rtol=1e-12
    )


def test_random_fourier_formula():
    x = np.array([0.2, -0.7, 0.4])
    phases = 2 * np.pi * 0.5 * np.random.RandomState(7).standard_normal((4, 3)) @ x
    np.testing.assert_allclose(
        embeddings.random_fourier(jnp.asarray(x), 8, scale=0.5, seed=7),
        np.concatenate([x, np.sin(phases), np.cos(phases)]),
        rtol=1e-12,
    )


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_times_never_below_float32(name, dtype):
    got = SCALARS[name](jnp.asarray(0.5, dtype), 8)
    expected = jnp.float64 if dtype == "float64" else jnp.float32
    assert got.dtype == expected and got.shape == (8,)
    np.testing.assert_allclose(got, SCALARS[name](0.5, 8), atol=1e-6)


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_points_never_below_float32(name, dtype):
    got = POINTS[name](jnp.asarray([0.5, -0.25], dtype))
    assert got.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    np.testing.assert_allclose(got, POINTS[name](jnp.asarray([0.5, -0.25])), atol=1e-5)


@pytest.mark.parametrize("name", SCALARS)
def test_derivatives_are_bounded_by_the_frequencies(name):
    for t in (-1.0, 0.0, 0.37, 1.0):
        _, first = jax.jvp(lambda u: SCALARS[name](u, 16), (t,), (1.0,))
        _, second = jax.jvp(lambda u: jax.jvp(lambda w: SCALARS[name](w, 16), (u,), (1.0,))[1], (t,), (1.0,))
        assert np.all(np.isfinite(first)) and np.all(np.isfinite(second))
    _, first = jax.jvp(lambda u: embeddings.sinusoidal(u, 16, highest=3.0), (0.37,), (1.0,))
    assert np.abs(first).max() <= 2 * np.pi * 3.0


TABLE = jnp.arange(514.0).reshape(257, 2)


@pytest.mark.representatives("int8", "uint8", "int32", "uint64")
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_labels_of_every_dtype(dtype):
    """The table has 257 rows, a number that wraps around to 1 in 8 bits."""
    low, high = jnp.iinfo(dtype).min, jnp.iinfo(dtype).max
    traced = jax.jit(lambda index: embeddings.label(TABLE, index))
    for value in {0, 1, 127, 255, 256} & set(range(256 if high == 255 else min(257, high + 1))):
        index = jnp.asarray(value, dtype)
        for got in (embeddings.label(TABLE, index), embeddings.label(TABLE, np.asarray(index)), traced(index)):
            np.testing.assert_array_equal(got, TABLE[value])
    for value in (
        v for v in (low, -1, -257, 257, 258, 2**32, 2**32 + 1, high) if low <= v <= high and not 0 <= v < 257
    ):
        index = jnp.asarray(value, dtype)
        assert np.all(np.isnan(traced(index)))
        with pytest.raises(ValueError, match=f"label: expected a label from 0 to 256 .*got {value}"):
            embeddings.label(TABLE, index)


def test_labels_have_gradients_only_in_their_own_row():
    gradient = jax.jit(jax.grad(lambda table, index: jnp.sum(embeddings.label(table, index) ** 2)))
    expected = np.zeros(TABLE.shape)
    expected[5] = 2 * TABLE[5]
    np.testing.assert_array_equal(gradient(TABLE, 5), expected)


def test_labels_refused():
    for index in (1.0, True):
        with pytest.raises(TypeError, match="y: expected an integer label, got dtype"):
            embeddings.label(TABLE, index, name="y")
    with pytest.raises(ValueError, match="label: expected a scalar"):
        embeddings.label(TABLE, jnp.arange(2))
    with pytest.raises(ValueError, match="table: expected an array of shape"):
        embeddings.label(TABLE[0], 0)
    with jax.enable_x64(False), pytest.raises(ValueError, match="label: expected values that fit int32"):
        embeddings.label(jnp.ones((3, 2)), np.int64(2**32 + 1))


def test_refusals():
    with pytest.raises(ValueError, match=r"t: expected a scalar .*got shape \(3,\)"):
        embeddings.sinusoidal(jnp.zeros(3), 8)
    with pytest.raises(ValueError, match=r"features: expected an even number.*got 7"):
        embeddings.sinusoidal(0.1, 7)
    with pytest.raises(ValueError, match="highest"):
        embeddings.sinusoidal(0.1, 8, lowest=1.0, highest=0.5)
    with pytest.raises(ValueError, match="scale"):
        embeddings.fourier(0.1, 8, scale=0.0)
    with pytest.raises(ValueError, match=r"x: expected an array of shape \(any\)"):
        embeddings.octaves(jnp.zeros((2, 2)), 2)
    with pytest.raises(TypeError, match="t: expected floating-point"):
        embeddings.sinusoidal(jnp.asarray(True), 8)
