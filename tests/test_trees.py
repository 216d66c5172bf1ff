"""Arithmetic on pytrees against numpy, leaf by leaf, in the dtypes of the leaves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import trees

X = {"a": np.array([[1.5, -2.0]]), "b": (np.array(0.25),)}
Y = {"a": np.array([[4.0, 0.5]]), "b": (np.array(-3.0),)}


def assert_leaves(found, a, b):
    assert jax.tree.structure(found) == jax.tree.structure(X)
    np.testing.assert_array_equal(found["a"], a)
    np.testing.assert_array_equal(found["b"][0], b)


def test_linear_combinations():
    assert_leaves(trees.scale(2.0, X), [[3.0, -4.0]], 0.5)
    assert_leaves(trees.add(X, Y), [[5.5, -1.5]], -2.75)
    assert_leaves(trees.sub(X, Y), [[-2.5, -2.5]], 3.25)
    assert_leaves(trees.axpy(2.0, X, Y), [[7.0, -3.5]], -2.5)
    assert_leaves(trees.combine(2.0, X, -1.0, Y), [[-1.0, -4.5]], 3.5)
    assert_leaves(trees.zeros_like(X), [[0.0, 0.0]], 0.0)


def test_size_and_squared_norm_are_over_all_leaves():
    assert trees.size(X) == 3 and trees.size({}) == 0
    np.testing.assert_allclose(trees.sq_norm(X), 1.5**2 + 2.0**2 + 0.25**2, rtol=1e-15)
    assert trees.sq_norm({}) == 0.0


@pytest.mark.parametrize("scalar", [0.5, np.float64(0.5), jnp.float32(0.5)])
def test_a_scalar_takes_the_dtype_of_each_leaf(scalar):
    x = {"narrow": jnp.ones(2, jnp.bfloat16), "wide": jnp.ones(2, jnp.float64)}
    for found in (trees.scale(scalar, x), trees.axpy(scalar, x, x), trees.combine(scalar, x, scalar, x)):
        assert {name: leaf.dtype for name, leaf in found.items()} == {"narrow": jnp.bfloat16, "wide": jnp.float64}


def test_sums_are_accumulated_in_the_widest_dtype_and_float32_at_least():
    bfloat16, float64 = jnp.ones(1, jnp.bfloat16), jnp.ones(1, jnp.float64)
    assert trees.at_least_float32(bfloat16) == trees.at_least_float32({}) == jnp.float32
    assert trees.at_least_float32([bfloat16, float64]) == jnp.float64
    # 256 + 1 is not a number of bfloat16.
    found = trees.sq_norm(jnp.ones(257, jnp.bfloat16))
    assert found.dtype == jnp.float32 and found == 257.0


def test_keys_are_told_from_numbers_and_handled_by_their_words():
    key = jax.random.key(3, impl="rbg")
    assert trees.is_key(key) and not trees.is_key(jax.random.key_data(key)) and not trees.is_key(np.ones(2))
    seen = []

    def keep(words):
        seen.append(words)
        return words + 1

    moved = trees.on_words(keep, key)
    assert seen[0].dtype == jnp.uint32 and jax.random.key_impl(moved) == jax.random.key_impl(key)
    np.testing.assert_array_equal(jax.random.key_data(moved), jax.random.key_data(key) + 1)
    np.testing.assert_array_equal(trees.on_words(keep, np.arange(3)), [1, 2, 3])
