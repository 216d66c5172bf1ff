"""Null conditions: replaced with the given probability, recognised, and in the dtype that holds both values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import conditions, types
from jflow.conditions import Scaled


def test_a_share_of_the_rows_is_replaced_whole(key):
    """All leaves of a row together, and no other row."""
    n, p = 2000, 0.3
    cond = {"label": jnp.arange(n) % 5, "size": jnp.ones((n, 3))}
    got = jax.jit(lambda k: conditions.drop(k, cond, {"label": 9, "size": np.zeros(3)}, p))(key)
    dropped = np.asarray(got["label"]) == 9
    assert abs(dropped.mean() - p) < 4 * np.sqrt(p * (1 - p) / n)
    np.testing.assert_array_equal(got["label"], np.where(dropped, 9, cond["label"]))
    np.testing.assert_array_equal(got["size"], np.where(dropped[:, None], 0.0, 1.0) * np.ones(3))


@pytest.mark.parametrize(("labels", "null", "dtype"), [
    (np.uint8, 10, np.uint8),
    (np.uint8, 256, np.int64),  # as jax reads a Python number with x64
    (np.int32, 10, np.int32),
    (np.int8, np.int8(-1), np.int8),
])  # fmt: skip
def test_dtypes_hold_both(labels, null, dtype, key):
    cond = np.arange(8, dtype=labels)
    none, all_of_them = (
        conditions.drop(k, cond, null, p) for k, p in zip(jax.random.split(key), (0.0, 1.0), strict=True)
    )
    assert none.dtype == all_of_them.dtype == dtype
    np.testing.assert_array_equal(none, cond)
    np.testing.assert_array_equal(all_of_them, np.full(8, null))


def test_null_rows_are_recognised_whatever_their_scale():
    cond = Scaled(jnp.array([0, 7, 2]), jnp.array([1.0, 3.0, 2.0]))
    is_null = jax.jit(jax.vmap(lambda c: conditions.is_null(c, 7)))(cond)
    np.testing.assert_array_equal(is_null, [False, True, False])
    vectors = {"a": jnp.array([[0.0, 0.0], [0.0, 1.0]]), "b": jnp.array([0.0, 0.0])}
    both = jax.jit(jax.vmap(lambda c: conditions.is_null(c, {"a": np.zeros(2), "b": 0.0})))(vectors)
    np.testing.assert_array_equal(both, [True, False])
    assert bool(conditions.is_null(np.uint8(44), 300)) is False  # 300 would wrap to 44


def test_the_null_condition_takes_the_form_of_the_condition():
    assert conditions.null_like(3, jnp.asarray(1)) == 3
    assert conditions.null_like(3, Scaled(jnp.asarray(1), 2.0)) == Scaled(3, 1.0, None)
    assert conditions.null_like(3, Scaled(jnp.asarray(1), 2.0, (0.1, 0.2))) == Scaled(3, 1.0, (0.0, 1.0))


@pytest.mark.parametrize(("cond", "null", "probability", "error", "match"), [
    (None, 3, 0.1, ValueError, "cond: expected the conditions"),
    (np.zeros((4, 2)), 0.0, 0.1, ValueError, "cond: expected the shape of null"),
    ({"a": np.zeros(4)}, 0.0, 0.1, ValueError, "cond: expected the pytree structure"),
    (np.zeros(4), 0.0, 1.1, ValueError, "probability"),
    (np.zeros(4, np.int32), 0.5, 0.1, TypeError, "expected a null condition of the kind"),
    (np.zeros(4, bool), 2, 0.1, TypeError, "a bool has no third value"),
])  # fmt: skip
def test_refusals(cond, null, probability, error, match, key):
    with pytest.raises(error, match=match):
        conditions.drop(key, cond, null, probability)


def velocity(params, s, t, x, cond=None, *, key=None):
    return x


def test_maps_with_equal_null_conditions_are_equal():
    """The null condition may hold arrays; maps are static arguments of jit, so they are compared and hashed."""
    one, same = (types.FlowMap(velocity, null={"a": np.zeros(3)}) for _ in range(2))
    other = types.FlowMap(velocity, null={"a": np.ones(3)})
    assert one == same and hash(one) == hash(same) and one != other and one != types.FlowMap(velocity)
    assert one.bind(1.0).null is one.null
    with pytest.raises(TypeError, match="null: expected a concrete condition"):
        jax.jit(lambda null: types.FlowMap(velocity, null=null).velocity(None, 0.0, jnp.ones(1)))(1.0)
