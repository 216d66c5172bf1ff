"""Windows and their transpose, and normalisation, against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.nets import layers


@pytest.mark.parametrize(("shape", "window", "stride"), [((28, 28, 1), 8, 4), ((5, 7, 3), 4, 2), ((6, 4, 2), 3, 3)])
def test_windows(shape, window, stride):
    x = np.random.RandomState(0).normal(size=shape)
    found = np.asarray(jax.jit(lambda x: layers.windows(x, window, stride))(x))
    rows, columns = (-(-n // stride) for n in shape[:2])
    assert found.shape == (rows, columns, window**2 * shape[2])
    missing = [(n - 1) * stride + window - m for n, m in zip((rows, columns), shape[:2], strict=True)]
    padded = np.pad(x, (*((m // 2, m - m // 2) for m in missing), (0, 0)))
    for i in range(rows):
        for j in range(columns):
            part = padded[i * stride : i * stride + window, j * stride : j * stride + window]
            # The entries are those of the window, in an order by blocks.
            np.testing.assert_array_equal(np.sort(found[i, j]), np.sort(part.ravel()))
    # The transpose, over window/stride.
    y = np.random.RandomState(1).normal(size=found.shape)
    back = np.asarray(jax.jit(lambda y: layers.overlap_add(y, shape, window, stride))(y))
    assert back.shape == shape
    np.testing.assert_allclose(np.vdot(found, y) / (window // stride), np.vdot(x, back), rtol=1e-12)


def test_patches_are_put_back():
    x = jnp.asarray(np.random.RandomState(0).normal(size=(7, 5, 2)))
    np.testing.assert_array_equal(layers.overlap_add(layers.windows(x, 2, 2), x.shape, 2, 2), x)


def test_normalise():
    h = np.random.RandomState(0).normal(size=(3, 5))
    rms = h / np.sqrt(np.mean(h**2, axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layers.normalise(h), rms, rtol=1e-12)
    centred = h - h.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(
        layers.normalise(h, "layer"), centred / np.sqrt(h.var(axis=1, keepdims=True) + 1e-6), rtol=1e-12
    )
    assert layers.normalise(jnp.zeros((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16


def test_widths():
    assert layers.hidden_width(384, 4.0, "gelu") == 1536 and layers.hidden_width(384, 4.0, "swiglu") == 1024
