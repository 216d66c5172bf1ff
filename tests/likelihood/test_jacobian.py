"""Linearisations of functions of events, against a matrix in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.likelihood.jacobian import flatten, linearise

MATRIX = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.5], [-2.5, 0.25, 1.0]])
X = {"a": np.array([0.5, -1.0]), "b": np.array(2.0)}


def linear(x):
    y = jnp.asarray(MATRIX) @ jnp.append(x["a"], x["b"])
    return {"a": y[:2], "b": y[2]}


@pytest.mark.parametrize(("mode", "rows"), [("forward", MATRIX.T), ("reverse", MATRIX)])
def test_the_columns_are_those_of_the_jacobian_or_of_its_transpose(mode, rows):
    found = linearise("f(x)", linear, X, mode)
    assert (found.size, found.dtype) == (3, jnp.float64)
    np.testing.assert_allclose(flatten(found.value)[0], MATRIX @ [0.5, -1.0, 2.0], rtol=1e-15)
    np.testing.assert_array_equal(found.columns(), rows)
    np.testing.assert_allclose(found.column(jnp.array([1.0, -2.0, 3.0])), [1.0, -2.0, 3.0] @ rows, rtol=1e-15)


def test_the_function_is_called_once_for_all_columns():
    calls = []

    def counted(x):
        calls.append(x)
        return linear(x)

    linearise("f(x)", counted, X).columns()
    assert len(calls) == 1


def test_an_event_comes_back_from_its_vector_in_its_dtypes():
    x = {"a": jnp.array([[1.5, -2.0]], jnp.bfloat16), "b": jnp.array(3.25, jnp.float16)}
    flat, unflatten = flatten(x)
    assert flat.dtype == jnp.float32
    np.testing.assert_array_equal(flat, np.array([1.5, -2.0, 3.25], np.float32))
    back = unflatten(2 * flat)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), back) == {
        "a": ((1, 2), jnp.bfloat16),
        "b": ((), jnp.float16),
    }
    np.testing.assert_array_equal(back["a"].astype(jnp.float32), [[3.0, -4.0]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: linearise("f(x)", linear, {"a": np.arange(2), "b": 1.0}), TypeError, "^x: expected floating"),
        (lambda: linearise("f(x)", lambda x: x["a"], X), ValueError, r"^f\(x\): expected"),
        (lambda: linearise("f(x)", linear, X, "both"), ValueError, "^mode: expected one of 'forward'"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
