"""Attention and rotary positions against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import flops, nets
from jflow.nets.attention import angles_2d, attention, rotate


def draw(*shape):
    return np.random.RandomState(sum(shape)).normal(size=shape)


def by_hand(q, k, v, scale, mask=None):
    logits = scale * np.einsum("nhs,mhs->hnm", q, k)
    if mask is not None:
        logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("hnm,mhs->nhs", weights / weights.sum(axis=-1, keepdims=True), v)


def test_attention_its_derivative_and_cost():
    q, k, v = draw(5, 2, 4), draw(7, 2, 4), draw(7, 2, 4) + 1.0
    mask = np.random.RandomState(0).uniform(size=(2, 5, 7)) < 0.7
    mask[..., 0] = True

    @jax.jit
    def run(q, k, v, mask):
        tangent = jax.jvp(nets.attention, (q, k, v), (k[:5], k, v))[1]
        return nets.attention(q, k, v), nets.attention(q, k, v, scale=0.3, mask=mask), tangent

    plain, masked, tangent = run(q, k, v, mask)
    np.testing.assert_allclose(plain, by_hand(q, k, v, 0.5), rtol=1e-12)
    np.testing.assert_allclose(masked, by_hand(q, k, v, 0.3, mask), rtol=1e-12)
    h = 1e-6
    difference = by_hand(q + h * k[:5], k + h * k, v + h * v, 0.5) - by_hand(q - h * k[:5], k - h * k, v - h * v, 0.5)
    np.testing.assert_allclose(tangent, difference / (2 * h), rtol=1e-7, atol=1e-8)
    assert flops.by_primitive(attention, q, k, v)["dot_general"] == 4 * 5 * 7 * 2 * 4
    assert attention(*(jnp.asarray(a, jnp.bfloat16) for a in (q, k, v))).dtype == jnp.bfloat16


def test_the_output_has_the_dtype_of_the_queries():
    q = jnp.ones((3, 2, 4), jnp.float32)
    assert attention(q, q, q.astype(jnp.bfloat16)).dtype == jnp.float32


def test_rotary_positions_depend_on_differences():
    """The product of two rotated vectors is the same for all pairs of tokens at the same distance."""
    q, k = (np.broadcast_to(draw(1, 1, 8 + i)[..., :8], (12, 1, 8)) for i in (0, 1))
    angles = angles_2d(3, 4, 8)
    products = np.einsum("nhs,mhs->nm", rotate(jnp.asarray(q), angles), rotate(jnp.asarray(k), angles)).reshape(
        3, 4, 3, 4
    )
    np.testing.assert_allclose(products[1:, 1:, 1:, 1:], products[:-1, :-1, :-1, :-1], rtol=1e-10, atol=1e-12)
    assert np.abs(products[0, 0, 0, 1] - products[0, 0, 1, 0]) > 1e-3
    np.testing.assert_allclose(np.linalg.norm(rotate(jnp.asarray(q), angles)), np.linalg.norm(q), rtol=1e-12)
    np.testing.assert_array_equal(angles_2d(3, 4, 8, before=2)[:2], 0.0)
    np.testing.assert_array_equal(angles_2d(3, 4, 8, before=2)[2:], angles)


def test_refusals():
    q = jnp.ones((3, 2, 4))
    with pytest.raises(ValueError, match=r"k: expected an array of shape \(any, 2, 4\), got \(3, 2, 5\)"):
        attention(q, jnp.ones((3, 2, 5)), q)
    with pytest.raises(ValueError, match=r"mask: expected an array of shape \(2 or 1, 3, 3\), got \(3, 3\)"):
        attention(q, q, q, mask=jnp.ones((3, 3), bool))
    with pytest.raises(TypeError, match="mask: expected bools, True where a query may see a key, got dtype float"):
        attention(q, q, q, mask=jnp.full((1, 3, 3), -jnp.inf))
    with pytest.raises(TypeError, match="floating-point"):
        attention(jnp.ones((3, 2, 4), jnp.int32), q, q)
    with pytest.raises(ValueError, match="size: expected a multiple of 4"):
        angles_2d(2, 2, 6)
