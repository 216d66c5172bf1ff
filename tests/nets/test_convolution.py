"""Both convolutions against numpy, with their derivatives; the changes of resolution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import flops
from jflow.nets import convolution


@pytest.mark.parametrize("side", [1, 3])
def test_both_methods_agree_with_numpy_and_with_each_other(side):
    rng = np.random.RandomState(0)
    x, kernel = rng.normal(size=(5, 4, 2)), rng.normal(size=(side, side, 2, 3))
    padded = np.pad(x, ((side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(0, 1))
    expected = np.einsum("hwcij,ijcd->hwd", patches, kernel)

    @jax.jit
    def both(x, kernel):
        found = []
        for method in convolution.METHODS:
            f = lambda x, k, method=method: convolution.convolve(x, k, method)  # noqa: E731
            value, tangent = jax.jvp(f, (x, kernel), (x**2, kernel**2))
            gradient = jax.grad(lambda x, k, f=f: jnp.sum(jnp.sin(f(x, k))), (0, 1))(x, kernel)
            found.append((value, tangent, gradient))
        return found

    lax, matmul = both(x, kernel)
    np.testing.assert_allclose(lax[0], expected, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), lax, matmul)
    by_matmul = flops.by_primitive(lambda x, k: convolution.convolve(x, k, "matmul"), x, kernel)
    assert by_matmul["dot_general"] == 2 * side**2 * 2 * 3 * 20


def test_resolutions():
    x = np.random.RandomState(0).normal(size=(4, 6, 2))
    small = np.asarray(convolution.halve(jnp.asarray(x)))
    np.testing.assert_allclose(small[1, 2], x[2:4, 4:6].mean(axis=(0, 1)), rtol=1e-12)
    np.testing.assert_array_equal(convolution.double(jnp.asarray(x)), np.repeat(np.repeat(x, 2, axis=0), 2, axis=1))


def test_refusals():
    x = jnp.zeros((4, 4, 2))
    with pytest.raises(ValueError, match="kernel: expected an odd side, got 2"):
        convolution.convolve(x, jnp.zeros((2, 2, 2, 1)))
    with pytest.raises(ValueError, match=r"kernel: expected an array of shape \(3, 3, 2, any\)"):
        convolution.convolve(x, jnp.zeros((3, 3, 1, 1)))
    with pytest.raises(ValueError, match="method"):
        convolution.convolve(x, jnp.zeros((3, 3, 2, 1)), "fft")
